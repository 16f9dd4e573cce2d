"""The peer that training is judged by: the same network in plain PyTorch, open to torch.compile.

Inside `plain_ops`, the model's calls to `pgolf_fast.ops` run the reference formulas with PyTorch's own
attention and autograd, so that Inductor sees and fuses everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgolf_fast import ops
from pgolf_fast.ops import reference

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "any": None}


def attention(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, *, num_kv_heads, xsa, **_) -> Tensor:
    """`ops.gqa_attention` from PyTorch's parts."""
    layers, heads = qo_bank.shape[0] // 2, q_gain.shape[0]
    q = F.linear(x, qo_bank[slot]).unflatten(-1, (heads, -1))
    k = F.linear(x, kv_bank[slot]).unflatten(-1, (num_kv_heads, -1))
    v = F.linear(x, kv_bank[layers + slot])
    v = (v if value_embed is None else v + value_embed).unflatten(-1, (num_kv_heads, -1))
    q = reference.rotate(reference.rms_norm(q), cos, sin) * q_gain.to(q.dtype)[:, None]
    k = reference.rotate(reference.rms_norm(k), cos, sin)
    q, k, values = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, values, is_causal=True, enable_gqa=True).transpose(1, 2)
    return F.linear((reference.exclusive(y, v) if xsa else y).flatten(2), qo_bank[layers + slot])


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    flat = reference.softcap_cross_entropy(x.flatten(0, -2), weight, targets.flatten(), softcap)
    return flat.view(targets.shape)


def ngram(tokens, table, spaces, scale, boost, *, pos_conditional, trigram, out_dtype=None) -> Tensor:
    rows = reference.ngram_hash_embed(tokens, table, spaces, scale, boost, pos_conditional, trigram)
    return rows.to(out_dtype or table.dtype)


PLAIN = {
    "gqa_attention": attention,
    "mlp": lambda x, up, down, slot, activation, **_: reference.mlp(x, up, down, slot, activation),
    "residual_norm": reference.residual_norm,
    "smear_gate": reference.smear_gate,
    "softcap_cross_entropy": cross_entropy,
    "ngram_hash_embed": ngram,
}


@contextlib.contextmanager
def plain_ops(backend: str = "any") -> Iterator[None]:
    """Within this block models run in plain PyTorch, with that attention backend."""
    kept = {name: getattr(ops, name) for name in PLAIN}
    chosen = BACKENDS[backend]
    with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
        try:
            for name, function in PLAIN.items():
                setattr(ops, name, function)
            yield
        finally:
            for name, function in kept.items():
                setattr(ops, name, function)
