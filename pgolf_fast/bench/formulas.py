"""Ops in plain PyTorch over plain weights, for peers: the same mathematics, open to torch.compile."""

import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.model.attention import attend
from pgolf_fast.ops import reference, reference_bytes


def mlp(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Compute `ops.mlp` from one layer's two weights."""
    return F.linear(reference.activation(F.linear(x, up), activation), down)


def sdpa_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    q_gain: Tensor,
    value_embed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    num_kv_heads: int,
    xsa: bool,
) -> Tensor:
    """Compute `ops.gqa_attention` from one layer's four weights and PyTorch's attention, all in x's dtype."""
    q, k, v = (F.linear(x, weight) for weight in (query, key, value))
    context = attend(
        *(q, k, v, q_gain, cos, sin),
        num_kv_heads=num_kv_heads,
        xsa=xsa,
        value_embed=value_embed,
        inner=_sdpa,
        dtype=x.dtype,
    )
    return F.linear(context, out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention of (B, T, heads, hd); the backend is the caller's choice."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def int6_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Compute `ops.int6_matmul`, unpacking on every call and multiplying in x's dtype."""
    codes = reference_bytes.unpack_bits(packed, x.shape[-1], 6)
    return F.linear(x, (codes.to(scale.dtype) * scale[:, None]).to(x.dtype))
