"""The operations of the network, as torch ops `pgolf::*` with CPU implementation, fake and autograd.

One file per op; `reference.py` holds the formulas they are judged against.
"""

from pgolf_fast.ops.bits import dequantize_bits, pack_bits, unpack_bits
from pgolf_fast.ops.gqa_attention import gqa_attention
from pgolf_fast.ops.int6 import int6_matmul, int6_pack, int6_unpack
from pgolf_fast.ops.lzma import lzma_compress, lzma_decompress
from pgolf_fast.ops.mlp import mlp
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum
from pgolf_fast.ops.newton_schulz import newton_schulz
from pgolf_fast.ops.ngram_hash import ngram_hash_embed
from pgolf_fast.ops.reference import rms_norm
from pgolf_fast.ops.residual_norm import residual_norm, smear_gate
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
    "residual_norm",
    "rms_norm",
    "smear_gate",
    "softcap_cross_entropy",
    "unpack_bits",
]
