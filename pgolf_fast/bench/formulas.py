"""Peers' side of a comparison: the same mathematics in PyTorch, over plain weights, open to torch.compile."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import reference, reference_bytes


def mlp(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """`ops.mlp` from one layer's two weights."""
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
    """`ops.gqa_attention` from one layer's four weights and PyTorch's attention, all in x's dtype."""
    heads = q_gain.shape[0]
    q = F.linear(x, query).unflatten(-1, (heads, -1))
    k = F.linear(x, key).unflatten(-1, (num_kv_heads, -1))
    v = F.linear(x, value)
    v = (v if value_embed is None else v + value_embed).unflatten(-1, (num_kv_heads, -1))
    q = reference.rotate(reference.rms_norm(q), cos, sin) * q_gain.to(q.dtype)[:, None]
    k = reference.rotate(reference.rms_norm(k), cos, sin)
    q, k, values = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, values, is_causal=True, enable_gqa=True).transpose(1, 2)
    return F.linear((reference.exclusive(y, v) if xsa else y).flatten(2), out)


def softcap_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, z_loss: float = 0.0
) -> Tensor:
    """`ops.softcap_cross_entropy` for states of any leading shape."""
    flat = reference.softcap_cross_entropy(x.flatten(0, -2), weight, targets.flatten(), softcap, z_loss)
    return flat.view(targets.shape)


def ngram_hash_embed(
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    *,
    pos_conditional: bool,
    trigram: bool,
) -> Tensor:
    """`ops.ngram_hash_embed`, in the table's dtype."""
    rows = reference.ngram_hash_embed(
        tokens, table, has_leading_space, scale, boost, pos_conditional, trigram
    )
    return rows.to(table.dtype)


def int6_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """`ops.int6_matmul`, unpacking at every call and multiplying in x's dtype."""
    codes = reference_bytes.unpack_bits(packed, x.shape[-1], 6)
    return F.linear(x, (codes.to(scale.dtype) * scale[:, None]).to(x.dtype))
