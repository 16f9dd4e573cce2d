"""`gqa_attention` on Triton kernels: what its forward and backward ops run where `serves` says so.

One launch projects, norms and rotates; attention is ours or a library's (`attention_backend`); the output
projection and dx are cuBLAS products, weight gradients go through `bank_grad.add_matmul`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import attention_backend, launch, reference
from pgolf_fast.ops.attention_backend import Shape
from pgolf_fast.ops.bank_grad import add_matmul
from pgolf_fast.ops.launch import Launch

OP = "gqa_attention"

# Rows named _128 are for heads of more than 64 channels. Not measured: the largest tiles that the assembler
# fits into registers, with a margin where the presets' heads of 64 are concerned.
launch.declare(
    "attention_projection",
    sm90=Launch(128, 128, 64, num_warps=8, num_stages=3),
    sm80=Launch(128, 128, 32, num_warps=8, num_stages=3),
)
launch.declare(
    "flash_attention_forward",
    sm90=Launch(128, 128, num_warps=8, num_stages=2),
    sm80=Launch(128, 64, num_warps=8, num_stages=3),
)
launch.declare(
    "flash_attention_forward_128",
    sm90=Launch(128, 64, num_warps=8, num_stages=2),
    sm80=Launch(128, 32, num_warps=8, num_stages=2),
)
launch.declare(
    "flash_attention_dkdv",
    sm90=Launch(64, 128, num_warps=8, num_stages=2),
    sm80=Launch(32, 128, num_warps=8, num_stages=2),
)
launch.declare("flash_attention_dkdv_128", sm90=Launch(32, 64, num_warps=8, num_stages=2))
launch.declare(
    "flash_attention_dq",
    sm90=Launch(64, 64, num_warps=4, num_stages=2),
    sm80=Launch(128, 32, num_warps=8, num_stages=2),
)
launch.declare(
    "flash_attention_dq_128",
    sm90=Launch(64, 64, num_warps=4, num_stages=2),
    sm80=Launch(64, 32, num_warps=4, num_stages=1),
)
# XSA and norms, forward and backward, row by row
launch.declare("attention_rows", sm90=Launch(32, num_warps=4))
launch.declare("attention_rows_128", sm90=Launch(16, num_warps=4))


class Saved(NamedTuple):
    """What backward needs, as the forward op returns it. With W queries (T without a window):

    | field  | shape          | PyTorch                        | kernels                          |
    | q      | (B, W, H, hd)  | RMS-normed heads               | the same, rotated, * sign(gain)  |
    | k      | (B, T, KV, hd) | RMS-normed heads               | the same, rotated                |
    | v      | (B, T, KV, hd) | with the value embedding       | the same                         |
    | q_rstd, k_rstd | q or k with 1 channel  | 1 / rms        | the same                         |
    | y      | (B, W, H, hd)  | attention output before XSA    | after XSA                        |
    | lse    | (B, H, W)      | natural logsumexp of scores    | the same                         |
    | along  | (B, H, W) if XSA, else (0,) | zeros             | y.u, what XSA took away          |

    After XSA, because that is what the gradient of the output projection multiplies, and the one before is
    context + along u, u the unit vector of the token's own value.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rstd: Tensor
    k_rstd: Tensor
    y: Tensor
    lse: Tensor
    along: Tensor


class Weights(NamedTuple):
    """The four matrices of a layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def weights_of(qo_bank: Tensor, kv_bank: Tensor, slot: int) -> Weights:
    """Those of layer `slot`."""
    layers = qo_bank.shape[0] // 2
    return Weights(qo_bank[slot], kv_bank[slot], kv_bank[layers + slot], qo_bank[layers + slot])


def serves(x: Tensor, head_dim: int) -> bool:
    """Whether the kernels take this call; wider heads and empty batches are left to PyTorch."""
    fits = 0 < head_dim <= attention_backend.LARGEST_HEAD_DIM and x.numel() > 0
    return fits and launch.uses_kernels(OP, x)


def _tiles(kernel: str, heads: Tensor) -> Launch:
    """The row for (B, T, heads, hd); float32 has no tensor cores here and fits small tiles of scores only."""
    wide = heads.shape[-1] > 64
    row = launch.launch(f"{kernel}_128" if wide else kernel, heads)
    if heads.element_size() > 2 and kernel != "attention_rows":
        row = replace(row, block_m=16 if wide else 32, block_n=32, num_warps=8, num_stages=1)
    return row


def _backend(q: Tensor, k: Tensor) -> str:
    windowed = q.shape[1] != k.shape[1]
    return attention_backend.backend(Shape(q.device, q.dtype, q.shape[-1], windowed))


def _gained(q: Tensor, gain: Tensor) -> Tensor:
    """Saved q times |gain|, rounded once: what a library takes for q."""
    return torch.mul(q, gain.abs()[:, None], out=torch.empty_like(q))


def forward(
    x: Tensor,
    weights: Weights,
    q_gain: Tensor,
    value_embed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    xsa: bool,
    queries: int,
) -> tuple[Tensor, Saved]:
    """The output (B, W, D) and what backward needs; `queries` is W."""
    with launch.on_device_of(x):
        q, k, v, q_rstd, k_rstd = _project(x, weights, q_gain, value_embed, cos, sin, num_kv_heads, queries)
        context, along, lse = _attend(q, k, v, q_gain, xsa)
    out = F.linear(context.flatten(2), weights.out)
    return out, Saved(q, k, v, q_rstd, k_rstd, context, lse, along)


def _project(
    x: Tensor,
    weights: Weights,
    q_gain: Tensor,
    value_embed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    queries: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from pgolf_fast.kernels.attention_projection import launch_attention_projection

    (batch, length, dim), num_heads = x.shape, q_gain.shape[0]
    q = x.new_empty(batch, queries, num_heads, dim // num_heads)
    k = x.new_empty(batch, length, num_kv_heads, dim // num_heads)
    v = torch.empty_like(k)
    q_rstd = x.new_empty(*q.shape[:3], 1, dtype=torch.float32)
    k_rstd = x.new_empty(*k.shape[:3], 1, dtype=torch.float32)
    launch_attention_projection(
        x.contiguous(),
        *(w.contiguous() for w in weights[:3]),
        None if value_embed is None else value_embed.contiguous(),
        q_gain.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        q,
        k,
        v,
        q_rstd,
        k_rstd,
        eps=reference.RMS_EPS,
        tile=launch.launch("attention_projection", x),
    )
    return q, k, v, q_rstd, k_rstd


def _attend(q: Tensor, k: Tensor, v: Tensor, q_gain: Tensor, xsa: bool) -> tuple[Tensor, Tensor, Tensor]:
    from pgolf_fast.kernels.flash_attention import launch_flash_attention_fwd, launch_xsa_fwd

    context, per_row = torch.empty_like(q), (q.shape[0], q.shape[2], q.shape[1])
    along = q.new_empty(per_row if xsa else 0, dtype=torch.float32)
    name = _backend(q, k)
    if name == "triton":
        lse, tiles = q.new_empty(per_row, dtype=torch.float32), _tiles("flash_attention_forward", q)
        launch_flash_attention_fwd(q, k, v, q_gain.contiguous(), context, along, lse, xsa=xsa, tile=tiles)
        return context, along, lse
    y, lse = attention_backend.forward(name, _gained(q, q_gain), k, v)
    y = y.contiguous()
    if xsa:
        launch_xsa_fwd(y, v, context, along, tile=_tiles("attention_rows", q))
    else:
        context = y
    return context, along, lse.contiguous()


def backward(
    dout: Tensor,
    x: Tensor,
    weights: Weights,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    s: Saved,
    xsa: bool,
    has_value_embed: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """dx, factors of the gradients of q, k, v and out weights, dgain, and dvalue (empty if not wanted)."""
    (batch, length, dim), queries = x.shape, s.q.shape[1]
    kv_dim, x_rows, x_tail = weights.k.shape[0], x.reshape(-1, dim), x[:, length - queries :]
    outer = dout.reshape(-1, dim)
    with launch.on_device_of(x):
        dcontext = (outer @ weights.out).view(s.y.shape)
        if queries == length:  # one matrix, so that dx is one product
            merged = x.new_empty(batch * length, dim + 2 * kv_dim)
            dq, dk, dv = merged.split((dim, kv_dim, kv_dim), dim=1)
        else:
            merged = x.new_empty(batch * length, 2 * kv_dim)
            dq, (dk, dv) = x.new_empty(batch * queries, dim), merged.split(kv_dim, dim=1)
        dgain = _attend_backward(dcontext, s, q_gain, cos, sin, xsa, dq, dk, dv)
    if queries == length:
        dx = merged @ torch.cat(weights[:3])
    else:
        dx = merged @ torch.cat(weights[1:3])
        dx.view(x.shape)[:, length - queries :] += (dq @ weights.q).view(batch, queries, dim)
    factors = [
        (dq.T, x_tail.reshape(-1, dim)),
        (dk.T, x_rows),
        (dv.T, x_rows),
        (outer.T, s.y.view(-1, dim)),
    ]
    dvalue = x.new_empty(0)
    if has_value_embed:
        dvalue = dv.reshape(batch, length, kv_dim).clone(memory_format=torch.contiguous_format)
    return dx.view(x.shape), factors, dgain, dvalue


def add_factors(factors: list[tuple[Tensor, Tensor]], grad_qo: Tensor, grad_kv: Tensor, slot: int) -> None:
    """Add the products to their slots of the gradient banks."""
    layers = grad_qo.shape[0] // 2
    places = ((grad_qo, slot), (grad_kv, slot), (grad_kv, layers + slot), (grad_qo, layers + slot))
    for (bank, place), (left, right) in zip(places, factors, strict=True):
        add_matmul(bank, place, left, right)


def _attend_backward(
    dcontext: Tensor,
    s: Saved,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    xsa: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Gradients of the three projections into dq, dk, dv, whose rows may lie apart; returns the gain's.

    Overwrites dcontext.
    """
    from pgolf_fast.kernels.attention_projection import launch_rope_norm_bwd
    from pgolf_fast.kernels.flash_attention_backward import launch_flash_attention_bwd_delta

    gain, cos, sin = (t.contiguous() for t in (q_gain, cos, sin))
    rows = _tiles("attention_rows", s.q)
    delta = torch.empty_like(s.lse)
    own = None
    if xsa:  # in float32: it may cancel most of what dv is elsewhere
        own = s.v.new_empty(*s.q.shape[:2], *s.v.shape[2:], dtype=torch.float32)
    name, dy = _backend(s.q, s.k), dcontext
    y = s.y if name == "triton" or not xsa else torch.empty_like(s.y)  # libraries take delta from it
    before_xsa = None if y is s.y else y
    launch_flash_attention_bwd_delta(
        dcontext, s.y, s.along, s.v, dy, delta, own, before_xsa, xsa=xsa, tile=rows
    )
    if name == "triton":
        dq_heads, dk_heads = _own_backward(s, gain, dy, delta, own, dv)
    else:
        gained = _gained(s.q, gain)
        dq_heads, dk_heads, dv_heads = attention_backend.backward(name, dy, gained, s.k, s.v, y, s.lse)
        if own is not None:  # rounded as dv is, so that both can cancel
            dv_heads[:, -own.shape[1] :] += own.to(dv_heads.dtype)
        dv.copy_(dv_heads.reshape(dv.shape))
    blocks = -(-s.q.shape[0] * s.q.shape[1] // rows.block_m)
    dgain = s.lse.new_empty(blocks, gain.shape[0])
    launch_rope_norm_bwd(dq_heads.contiguous(), s.q, s.q_rstd, gain, cos, sin, dq, dgain, tile=rows)
    launch_rope_norm_bwd(dk_heads.contiguous(), s.k, s.k_rstd, None, cos, sin, dk, None, tile=rows)
    return dgain.sum(0)


def _own_backward(
    s: Saved, gain: Tensor, dy: Tensor, delta: Tensor, own: Tensor | None, dv: Tensor
) -> tuple[Tensor, Tensor]:
    from pgolf_fast.kernels import flash_attention_backward as kernels

    dq_heads, dk_heads = torch.empty_like(s.q), torch.empty_like(s.k)
    kernels.launch_flash_attention_bwd_dkdv(
        s.q, s.k, s.v, gain, dy, s.lse, delta, own, dk_heads, dv, tile=_tiles("flash_attention_dkdv", s.q)
    )
    kernels.launch_flash_attention_bwd_dq(
        s.q, s.k, s.v, gain, dy, s.lse, delta, dq_heads, tile=_tiles("flash_attention_dq", s.q)
    )
    return dq_heads, dk_heads
