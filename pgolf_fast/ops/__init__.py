"""The network's operations as torch ops: `torch.ops.pgolf.*` exists after `import pgolf_fast.ops`.

One file per op: the public function, checks, `_cpu` and `_cuda` implementations, fake, and the same for
backward. `reference.py` holds the formulas, `cases.py` the catalog of inputs (a `case.Case` each) and
`judge.py` the comparison with float64; neither is imported here.

The implementation is chosen inside the op (`tiles.uses_kernels`), not by `register_kernel("cuda")`: tests run
the Triton kernels on CPU tensors in Triton's interpreter, and `pgolf aot` compiles them for GPUs that are not
present, which dispatch by device would rule out. It also lets a call fall back where no kernel applies
(float64, heads wider than 128, GPUs older than sm_80).
"""

from pgolf_fast.ops.bits import dequantize_bits, pack_bits, unpack_bits
from pgolf_fast.ops.gqa_attention import gqa_attention, projected_attention
from pgolf_fast.ops.int6 import int6_matmul, int6_pack, int6_unpack
from pgolf_fast.ops.lzma import lzma_compress, lzma_decompress
from pgolf_fast.ops.mlp import mlp
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum
from pgolf_fast.ops.newton_schulz import newton_schulz
from pgolf_fast.ops.ngram_hash import ngram_hash_embed
from pgolf_fast.ops.residual_norm import residual_norm, rms_norm, smear_gate
from pgolf_fast.ops.softcap_cross_entropy import softcap_cross_entropy

__all__ = [
    "dequantize_bits",
    "gqa_attention",
    "int6_matmul",
    "int6_pack",
    "int6_unpack",
    "lzma_compress",
    "lzma_decompress",
    "mlp",
    "muon_apply",
    "muon_momentum",
    "newton_schulz",
    "ngram_hash_embed",
    "pack_bits",
    "projected_attention",
    "residual_norm",
    "rms_norm",
    "smear_gate",
    "softcap_cross_entropy",
    "unpack_bits",
]
