"""pgolf::gqa_attention: bank-indexed grouped-query attention with QK norm, partial RoPE, gain and XSA.

Sources: PR 1501 (banks, XSA, value embedding, q gain); Su et al. 2021 (RoPE); Ainslie et al. 2023 (GQA).
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import attention_backend, native, reference
from pgolf_fast.ops import gqa_attention_kernels as kernels
from pgolf_fast.ops.bank_grad import scatter_slots
from pgolf_fast.ops.checks import expect_shape, expect_slot, same_device, same_dtype_device
from pgolf_fast.ops.gqa_attention_kernels import Call, Gradients, Saved, weights_of


def gqa_attention(
    x: Tensor,
    qo_bank: Tensor,
    kv_bank: Tensor,
    q_gain: Tensor,
    value_embed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slot: int,
    *,
    num_kv_heads: int,
    xsa: bool,
    grad_qo: Tensor | None = None,
    grad_kv: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute causal attention of one block, from normalized input to output projection.

    With n layers: q = x qo[slot]^T, k = x kv[slot]^T, v = x kv[n + slot]^T + value_embed. q and k are
    RMS-normed per head and rotated (RoPE on the first channels), and q is multiplied by its head's gain. Then
    causal softmax attention at scale 1/sqrt(hd); query head h reads KV head h // (H / KV). XSA removes the
    component along the token's own value. The result is context qo[n + slot]^T.

    x (B, T, D); qo_bank (2n, D, D); kv_bank (2n, KV*hd, D); q_gain (H,); value_embed (B, T, KV*hd) or None;
    cos, sin (T, r/2) with cos^2 + sin^2 = 1 up to rounding. With `grad_qo` and `grad_kv` (shaped like the
    banks), backward adds weight gradients into their slots. With `window`, only the last `window` positions
    are queries: the result is (B, window, D), the end of the full one, for less work.
    Raises ValueError if shapes, dtypes, devices, the slot or the window do not match.
    """
    return torch.ops.pgolf.gqa_attention(
        x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv, window
    )[0]


def _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, window) -> None:
    op = "gqa_attention"
    expect_shape(op, "x", x, (None, None, None))
    batch, length, dim = x.shape
    expect_shape(op, "qo_bank", qo_bank, (None, dim, dim))
    expect_shape(op, "q_gain", q_gain, (None,))
    num_heads = q_gain.shape[0]
    if num_heads == 0 or dim % num_heads or num_heads % num_kv_heads:
        why = f"pgolf::{op}: width {dim}, {num_heads} heads and {num_kv_heads} KV heads do not divide"
        raise ValueError(why)
    kv_dim = dim // num_heads * num_kv_heads
    expect_shape(op, "kv_bank", kv_bank, (qo_bank.shape[0], kv_dim, dim))
    if value_embed is not None:
        expect_shape(op, "value_embed", value_embed, (batch, length, kv_dim))
        same_dtype_device(op, x=x, value_embed=value_embed)
    expect_shape(op, "cos", cos, (length, None))
    expect_shape(op, "sin", sin, tuple(cos.shape))
    if 2 * cos.shape[1] > dim // num_heads:
        raise ValueError(f"pgolf::{op}: cos turns {2 * cos.shape[1]} channels of {dim // num_heads} per head")
    expect_slot(op, slot, qo_bank.shape[0] // 2)
    same_dtype_device(op, x=x, qo_bank=qo_bank, kv_bank=kv_bank)
    same_device(op, x=x, q_gain=q_gain, cos=cos, sin=sin)
    if window is not None and not 1 <= window <= length:
        raise ValueError(f"pgolf::{op}: window is {window}, but x has {length} positions: give 1 to {length}")


@torch.library.custom_op(
    "pgolf::gqa_attention",
    mutates_args=(),
    schema="(Tensor x, Tensor qo_bank, Tensor kv_bank, Tensor q_gain, Tensor? value_embed, Tensor cos, "
    "Tensor sin, SymInt slot, SymInt num_kv_heads, bool xsa, Tensor? grad_qo, Tensor? grad_kv, "
    "SymInt? window=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gqa_attention(
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv, window=None
) -> tuple[Tensor, ...]:
    _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, window)
    queries = x.shape[1] if window is None else window
    call = Call(x, weights_of(qo_bank, kv_bank, slot), q_gain, cos, sin, xsa)
    run = kernels.forward if kernels.supports(x, x.shape[2] // q_gain.shape[0]) else _forward_cpu
    out, saved = run(call, value_embed, num_kv_heads, queries)
    return (out, *saved)


@_gqa_attention.register_fake
def _(
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv, window=None
):
    _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, window)
    (batch, length, dim), num_heads = x.shape, q_gain.shape[0]
    queries = length if window is None else window
    wide = torch.promote_types(x.dtype, torch.float32)
    q, kv = (batch, queries, num_heads, dim // num_heads), (batch, length, num_kv_heads, dim // num_heads)
    per_row = (batch, num_heads, queries)
    low = (x.new_empty(shape) for shape in ((batch, queries, dim), q, kv, kv))
    rstds = (x.new_empty(*shape[:3], 1, dtype=wide) for shape in (q, kv))
    rows = (x.new_empty(shape, dtype=wide) for shape in (per_row, per_row if xsa else (0,)))
    return (*low, *rstds, x.new_empty(q), *rows)


def _forward_cpu(call: Call, value_embed: Tensor | None, num_kv_heads, queries) -> tuple[Tensor, Saved]:
    """Compute `kernels.forward` by the fused pass, or in PyTorch."""
    x, weights, q_gain, cos, sin, xsa = call
    q = F.linear(_last(x, queries), weights.q).unflatten(-1, (q_gain.shape[0], -1))
    k = F.linear(x, weights.k).unflatten(-1, (num_kv_heads, -1))
    v = F.linear(x, weights.v)
    v = (v if value_embed is None else v.add_(value_embed)).unflatten(-1, (num_kv_heads, -1))
    # 13.5 for 33.9 ms (backward 29 for 86) on AVX2, 16 x 256 tokens, 4 heads of 64, float32, one thread; with
    # the portable pass 30 for 33 (64 for 79)
    if fused := native.passes("gqa_attention", x):
        context, saved = _forward_fused(fused, call, q.contiguous(), k.contiguous(), v.contiguous())
        return F.linear(context.flatten(2), weights.out), saved
    q_unit, q_rstd = _unit(q)
    k_unit, k_rstd = _unit(k)
    y, lse = _sdpa(*_rotated(q_unit, k_unit, cos, sin, q_gain), v)
    context = _exclusive(y, _last(v, queries)) if xsa else y
    out = F.linear(context.flatten(2), weights.out)
    along = lse.new_zeros(lse.shape if xsa else (0,))
    return out, Saved(*(t.contiguous() for t in (q_unit, k_unit, v, q_rstd, k_rstd, y, lse, along)))


def _forward_fused(fused: ModuleType, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
    """Return the context and the tensors saved; q and k become their normalized heads."""
    tables = (t.float() for t in (call.q_gain, call.cos, call.sin))
    y, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    context = torch.empty_like(q) if call.xsa else y
    q_rstd, k_rstd = (t.new_empty(*t.shape[:3], 1, dtype=torch.float32) for t in (q, k))
    native.call(fused.attention, q, k, v, *tables, y, context, q_rstd, k_rstd, lse, call.xsa)
    along = lse.new_zeros(lse.shape if call.xsa else (0,))
    return context, Saved(q, k, v, q_rstd, k_rstd, y, lse, along)


def _last(t: Tensor, queries: int) -> Tensor:
    return t[:, t.shape[1] - queries :]


def _unit(heads: Tensor) -> tuple[Tensor, Tensor]:
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(heads.shape[-1]).add_(reference.RMS_EPS).rsqrt_()
    return (wide * rstd).to(heads.dtype), rstd


def _rotated(q_unit: Tensor, k_unit: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Apply RoPE, and to q the gain; q holds the last positions."""
    first = k_unit.shape[1] - q_unit.shape[1]
    wide = torch.promote_types(q_unit.dtype, torch.float32)
    q = reference.rotate(q_unit.to(wide), cos[first:], sin[first:]) * gain.to(wide)[:, None]
    k = reference.rotate(k_unit.to(wide), cos, sin)
    return q.to(q_unit.dtype), k.to(k_unit.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return causal attention of the last positions, (B, W, H, hd), and its logsumexp (B, H, W)."""
    if q.numel() == 0:
        shape = (q.shape[0], q.shape[2], q.shape[1])
        return torch.empty_like(q), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return attention_backend.forward(_backend(q, k), q, k, v)


def _backend(q: Tensor, k: Tensor) -> str:
    return attention_backend.without_kernels(attention_backend.shape_of(q, k))


@torch.library.custom_op(
    "pgolf::gqa_attention_backward",
    mutates_args=("grad_qo", "grad_kv"),
    schema="(Tensor dout, Tensor x, Tensor qo_bank, Tensor kv_bank, Tensor q_gain, Tensor cos, Tensor sin, "
    "Tensor[] saved, SymInt slot, bool xsa, Tensor(a10!)? grad_qo, Tensor(a11!)? grad_kv, "
    "bool has_value_embed=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gqa_attention_backward(
    dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, slot, xsa, grad_qo, grad_kv, has_value_embed=True
) -> tuple[Tensor, ...]:
    call = Call(x, weights_of(qo_bank, kv_bank, slot), q_gain, cos, sin, xsa)
    run = kernels.backward if kernels.supports(x, x.shape[2] // q_gain.shape[0]) else _backward_cpu
    dx, factors, dgain, dvalue = run(dout, call, Saved(*saved), has_value_embed)
    dgain = dgain.to(q_gain.dtype)
    if grad_qo is None or grad_kv is None:
        dq, dk, dv, dout_weight = (left @ right for left, right in kernels.apart(factors))
        return dx, torch.stack((dq, dout_weight)), torch.stack((dk, dv)), dgain, dvalue
    kernels.add_factors(factors, grad_qo, grad_kv, slot)
    return dx, x.new_empty(0), x.new_empty(0), dgain, dvalue


@_gqa_attention_backward.register_fake
def _(dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, slot, xsa, grad_qo, grad_kv, has_value_embed=True):
    dense = grad_qo is None or grad_kv is None
    dqo, dkv = (x.new_empty((2, *b.shape[1:]) if dense else (0,)) for b in (qo_bank, kv_bank))
    dvalue = x.new_empty((*x.shape[:2], kv_bank.shape[1]) if has_value_embed else (0,))
    return x.new_empty(x.shape), dqo, dkv, q_gain.new_empty(q_gain.shape), dvalue


def _backward_cpu(dout: Tensor, call: Call, s: Saved, has_value_embed: bool) -> Gradients:
    """Compute `kernels.backward` by the fused pass, or in PyTorch."""
    x, weights = call.x, call.weights
    dim, queries = x.shape[2], s.q.shape[1]
    first, dcontext = x.shape[1] - queries, (dout @ weights.out).view(s.y.shape)
    if fused := native.passes("gqa_attention", x):
        context, dq, dk, dv, dgain = _backward_fused(fused, dcontext, call, s)
    else:
        context, dq, dk, dv, dgain = _backward_torch(dcontext, call, s)
    context, dq, dk, dv = (t.to(x.dtype).reshape(-1, t.shape[2] * t.shape[3]) for t in (context, dq, dk, dv))
    if first == 0:
        dx = (dq @ weights.q).addmm_(dk, weights.k).addmm_(dv, weights.v).view(x.shape)
    else:
        dx = (dk @ weights.k).addmm_(dv, weights.v).view(x.shape)
        _last(dx, queries).add_((dq @ weights.q).view(x.shape[0], queries, dim))
    rows, tail, outer = x.reshape(-1, dim), _last(x, queries).reshape(-1, dim), dout.reshape(-1, dim)
    factors = [(dq.T, tail), (dk.T, rows), (dv.T, rows), (outer.T, context)]
    dvalue = dv.view(*x.shape[:2], dv.shape[1]) if has_value_embed else x.new_empty(0)
    return dx, factors, dgain, dvalue


def _backward_fused(fused: ModuleType, dcontext: Tensor, call: Call, s: Saved) -> tuple[Tensor, ...]:
    """Return the context, the gradients of the three projections, and the gain's."""
    tables = (t.float() for t in (call.q_gain, call.cos, call.sin))
    given = (dcontext, s.q, s.k, s.v, s.y, s.q_rstd, s.k_rstd, s.lse)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in s[:3])
    context = torch.empty_like(dq) if call.xsa else s.y
    dgain = call.q_gain.new_empty(call.q_gain.shape, dtype=torch.float32)
    native.call(fused.attention_backward, *given, *tables, context, dq, dk, dv, dgain, call.xsa)
    return context, dq, dk, dv, dgain


def _backward_torch(dcontext: Tensor, call: Call, s: Saved) -> tuple[Tensor, ...]:
    """Return what `_backward_fused` does."""
    q_gain, cos, sin, xsa = call[2:]
    first, own = s.v.shape[1] - s.q.shape[1], _last(s.v, s.q.shape[1])
    dy, dv_own = _exclusive_backward(dcontext, s.y, own) if xsa else (dcontext, None)
    dq, dk, dv = _sdpa_backward(dy, s, q_gain, cos, sin)
    if dv_own is not None:
        dv = dv + (dv_own if first == 0 else F.pad(dv_own, (0, 0, 0, 0, first, 0)))
    dq, dgain = _rope_norm_backward(dq, s.q, s.q_rstd, cos[first:], sin[first:], q_gain)
    dk, _ = _rope_norm_backward(dk, s.k, s.k_rstd, cos, sin, None)
    return _exclusive(s.y, own) if xsa else s.y, dq, dk, dv, dgain


def _own_value(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's value as a unit vector, (B, T, KV, hd, 1), and its norm, in at least float32."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(reference.XSA_EPS)
    return (wide / norm).unsqueeze(-1), norm


def _exclusive(y: Tensor, v: Tensor) -> Tensor:
    """Compute `reference.exclusive` by small matrix products, which are faster on a CPU."""
    unit, _ = _own_value(v)
    groups = y.to(unit.dtype).unflatten(2, (v.shape[2], -1))
    return (groups - (groups @ unit) @ unit.mT).flatten(2, 3).to(y.dtype)


def _exclusive_backward(dcontext: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y - (y.u) u, u = v / |v|.

    dy = g - (g.u) u; du = -((g.u) y + (y.u) g), summed over the group.
    """
    unit, norm = _own_value(v)
    groups, grad = (t.to(unit.dtype).unflatten(2, (v.shape[2], -1)) for t in (y, dcontext))
    g_along = grad @ unit
    dunit = -(g_along.mT @ groups + (groups @ unit).mT @ grad).squeeze(3)
    unit3 = unit.squeeze(-1)
    dv = (dunit - (dunit * unit3).sum(-1, keepdim=True) * unit3) / norm
    return (grad - g_along @ unit.mT).flatten(2, 3).to(y.dtype), dv


def _sdpa_backward(dy: Tensor, s: Saved, q_gain, cos, sin) -> tuple[Tensor, ...]:
    """Return gradients of the rotated q (B, W, H, hd) and of k and v (B, T, KV, hd), summed by group."""
    if dy.numel() == 0:
        return torch.zeros_like(s.q), torch.zeros_like(s.k), torch.zeros_like(s.v)
    q, k = _rotated(s.q, s.k, cos, sin, q_gain)
    return attention_backend.backward(_backend(q, k), dy, q, k, s.v, s.y, s.lse)


def _rope_norm_backward(grad, unit, rstd, cos, sin, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Backpropagate through gain, RoPE and RMS norm; return gradients of the projection and of the gain."""
    wide = rstd.dtype
    grad, unit = reference.rotate(grad.to(wide), cos, -sin), unit.to(wide)
    dgain = grad.new_empty(0)
    if gain is not None:
        dgain = (grad * unit).sum((0, 1, 3))
        grad = grad * gain.to(wide)[:, None]
    return rstd * (grad - unit * (grad * unit).mean(-1, keepdim=True)), dgain


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, ctx.slot, _, ctx.xsa, *rest = inputs
    ctx.grad_qo, ctx.grad_kv, _ = rest
    ctx.has_value_embed = value_embed is not None
    ctx.save_for_backward(x, qo_bank, kv_bank, q_gain, cos, sin, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, qo_bank, kv_bank, q_gain, cos, sin, *saved = ctx.saved_tensors
    options = (ctx.slot, ctx.xsa, ctx.grad_qo, ctx.grad_kv, ctx.has_value_embed)
    dx, dqo, dkv, dgain, dvalue = torch.ops.pgolf.gqa_attention_backward(
        dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, *options
    )
    if ctx.grad_qo is None or ctx.grad_kv is None:
        slots = (ctx.slot, qo_bank.shape[0] // 2 + ctx.slot)
        dqo, dkv = (scatter_slots(b, slots, g.unbind()) for b, g in ((qo_bank, dqo), (kv_bank, dkv)))
    else:
        dqo = dkv = None
    dvalue = dvalue if ctx.has_value_embed else None
    return dx, dqo, dkv, dgain, dvalue, *(None,) * 8


_gqa_attention.register_autograd(_backward, setup_context=_setup_context)
