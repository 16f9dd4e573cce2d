"""The attention core for projections that do not come straight from a bank.

`ops.gqa_attention` computes the same function from banks. Decoding (cached keys), low-rank adapters (changed
projections) and the benchmark's formulas (plain weights) project in their own way and share this core.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.ops import reference

# q (B, W, H, hd), k and v (B, T, KV, hd), normalized and rotated -> (B, W, H, hd)
InnerAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last W of T positions, q (B, W, H, hd), k and v (B, T, KV, hd).

    Runs in the dtype of v on a GPU and in at least float32 on a CPU, where bfloat16 is slower.
    """
    dtype = torch.promote_types(v.dtype, torch.float32) if v.device.type == "cpu" else v.dtype
    groups, (queries, keys) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    # v is widened before it is repeated: backward sums its gradient over the group in that dtype
    heads = (q, k.repeat_interleave(groups, 2), v.to(dtype).repeat_interleave(groups, 2))
    q, k, v = (t.to(dtype).transpose(1, 2) for t in heads)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    # is_causal would align the first query with the first key; ours end together
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_kv_heads: int,
    xsa: bool,
    value_embed: Tensor | None = None,
    inner: InnerAttention = causal,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of the last W of T positions before the output projection, (B, W, D).

    `q` (B, W, D), `k` and `v` (B, T, KV*hd) are projections; `gain` is (H,), `cos` and `sin` (T, r/2). Heads
    are RMS-normalized, rotated and scaled in `dtype` (default: at least float32) and handed to `inner`.
    """
    wide, first = dtype or torch.promote_types(q.dtype, torch.float32), k.shape[1] - q.shape[1]
    q = reference.rms_norm(q.unflatten(-1, (len(gain), -1)))
    k = reference.rms_norm(k.unflatten(-1, (num_kv_heads, -1)))
    v = (v if value_embed is None else v + value_embed).unflatten(-1, (num_kv_heads, -1))
    queries = reference.rotate(q.to(wide), cos[first:], sin[first:]) * gain.to(wide)[:, None]
    y = inner(queries, reference.rotate(k.to(wide), cos, sin), v).to(q.dtype)
    return (reference.exclusive(y, v[:, first:]) if xsa else y).flatten(2)


def rope_base(config: ModelConfig, context: int) -> float:
    """Return the base for `context` tokens: base * (context / trained)^(r / (r - 2)) beyond `trained`."""
    dims = config.rotary_dims
    if context <= config.rope_train_seq_len or dims <= 2:
        return config.rope_base
    return config.rope_base * (context / config.rope_train_seq_len) ** (dims / (dims - 2))


def _tables(config: ModelConfig, length: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    dims = config.rotary_dims
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
        frequencies = rope_base(config, context) ** -exponents
        positions = torch.arange(length, dtype=torch.float32, device=device)
        if config.rope_bf16_tables and context <= config.rope_train_seq_len:
            frequencies, positions = frequencies.bfloat16(), positions.bfloat16()
        angles = torch.outer(positions, frequencies)
        stored = torch.bfloat16 if config.rope_bf16_tables else angles.dtype
        return angles.cos().to(stored).float(), angles.sin().to(stored).float()


# never evicted: captured CUDA graphs keep reading them
_cached_tables = functools.cache(_tables)


def rope_tables(
    config: ModelConfig, length: int, device: torch.device, context: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, r/2) float32, for positions 0 .. length-1.

    `context` (default: length) sets only the base: text that grows token by token uses its final length.
    """
    if torch.compiler.is_compiling():  # the graph keeps the tables; a cached function would only warn
        return _tables(config, length, context or length, device)
    return _cached_tables(config, length, context or length, device)
