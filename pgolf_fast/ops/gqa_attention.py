"""pgolf::gqa_attention and pgolf::projected_attention: GQA with QK norm, partial RoPE, gain and XSA.

Sources: PR 1501 (banks, XSA, value embedding, q gain); Su et al. 2021 (RoPE); Ainslie et al. 2023 (GQA).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import attention_backend, native, reference
from pgolf_fast.ops import gqa_attention_kernels as kernels
from pgolf_fast.ops.bank_grad import scatter_slots
from pgolf_fast.ops.checks import expect_dtype, expect_shape, expect_slot, same_device, same_dtype_device
from pgolf_fast.ops.gqa_attention_kernels import Call, Gradients, Saved, weights_of
from pgolf_fast.ops.segments import Segments, check_boundaries, check_segments, segments_of


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
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
    `gate` (B, T, H), or (B, window, H), in x's dtype or float32, multiplies heads of the context, after XSA.
    `cu_seqlens` (n,) int32 divides the B * T positions into segments to which attention is confined, as in
    FlashAttention: it rises from 0 to B * T, holds each row's start, and may end with repeats of B * T.
    `max_seqlen` bounds the length of a segment (None: T). RoPE positions stay those of the row.
    Raises ValueError if shapes, dtypes, devices, the slot, the window or, on a CPU, boundaries do not match.
    """
    options = (slot, num_kv_heads, xsa, grad_qo, grad_kv, window, gate, cu_seqlens, max_seqlen)
    return torch.ops.pgolf.gqa_attention(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, *options)[0]


def _check(
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, window, gate, *bounds
) -> None:
    op = "gqa_attention"
    expect_shape(op, "x", x, (None, None, None))
    batch, length, dim = x.shape
    expect_shape(op, "qo_bank", qo_bank, (None, dim, dim))
    kv_dim = _check_heads(op, dim, length, q_gain, cos, sin, num_kv_heads)
    expect_shape(op, "kv_bank", kv_bank, (qo_bank.shape[0], kv_dim, dim))
    if value_embed is not None:
        expect_shape(op, "value_embed", value_embed, (batch, length, kv_dim))
        same_dtype_device(op, x=x, value_embed=value_embed)
    expect_slot(op, slot, qo_bank.shape[0] // 2)
    same_dtype_device(op, x=x, qo_bank=qo_bank, kv_bank=kv_bank)
    same_device(op, x=x, q_gain=q_gain, cos=cos, sin=sin)
    if window is not None and not 1 <= window <= length:
        raise ValueError(f"pgolf::{op}: window is {window}, but x has {length} positions: give 1 to {length}")
    _check_gate(op, x, gate, (batch, window or length, q_gain.shape[0]))
    check_segments(op, x, *bounds)


def _check_gate(op: str, x: Tensor, gate: Tensor | None, heads: tuple[int, ...]) -> None:
    if gate is not None:
        expect_shape(op, "gate", gate, heads)
        expect_dtype(op, "gate", gate, *dict.fromkeys((x.dtype, torch.float32)))
        same_device(op, x=x, gate=gate)


def _check_heads(op: str, dim: int, length: int, q_gain, cos, sin, num_kv_heads: int) -> int:
    """Check what both ops take, for D channels and T positions; return KV * hd."""
    expect_shape(op, "q_gain", q_gain, (None,))
    num_heads = q_gain.shape[0]
    if min(num_heads, num_kv_heads) < 1 or dim % num_heads or num_heads % num_kv_heads:
        why = f"pgolf::{op}: width {dim}, {num_heads} heads and {num_kv_heads} KV heads do not divide"
        raise ValueError(why)
    expect_shape(op, "cos", cos, (length, None))
    expect_shape(op, "sin", sin, tuple(cos.shape))
    if 2 * cos.shape[1] > dim // num_heads:
        raise ValueError(f"pgolf::{op}: cos turns {2 * cos.shape[1]} channels of {dim // num_heads} per head")
    return dim // num_heads * num_kv_heads


@torch.library.custom_op(
    "pgolf::gqa_attention",
    mutates_args=(),
    schema="(Tensor x, Tensor qo_bank, Tensor kv_bank, Tensor q_gain, Tensor? value_embed, Tensor cos, "
    "Tensor sin, SymInt slot, SymInt num_kv_heads, bool xsa, Tensor? grad_qo, Tensor? grad_kv, "
    "SymInt? window=None, Tensor? gate=None, Tensor? cu_seqlens=None, SymInt? max_seqlen=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gqa_attention(
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv, *rest
) -> tuple[Tensor, ...]:
    window, gate, *bounds = _filled(rest, None, None, None, None)
    _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, window, gate, *bounds)
    check_boundaries("gqa_attention", *bounds, *x.shape[:2])
    queries, segments = window or x.shape[1], segments_of(*bounds, *x.shape[:2])
    call = Call(x, weights_of(qo_bank, kv_bank, slot), q_gain, cos, sin, xsa, gate, segments)
    run = kernels.forward if kernels.supports(x, x.shape[2] // q_gain.shape[0]) else _forward_cpu
    out, saved = run(call, value_embed, num_kv_heads, queries)
    return (out, *saved)


@_gqa_attention.register_fake
def _(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv, *rest):
    window, *forms = _filled(rest, None, None, None, None)
    _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, window, *forms)
    q = x if window is None else _last(x, window)
    return _empty(q, x.new_empty(*x.shape[:2], kv_bank.shape[1]), q_gain.shape[0], xsa)


def _filled(given: Sequence[Any], *defaults: Any) -> tuple[Any, ...]:
    """Return the last arguments of an op; the dispatcher leaves out those at the end that are defaults."""
    return (*given, *defaults[len(given) :])


def _empty(q: Tensor, k: Tensor, num_heads: int, xsa: bool) -> tuple[Tensor, ...]:
    """Return uninitialized results of either op for q (B, W, D) and k (B, T, KV*hd)."""
    wide, rows = torch.promote_types(q.dtype, torch.float32), (q.shape[0], num_heads, q.shape[1])
    head_dim, out = q.shape[2] // num_heads, q.new_empty(q.shape)
    heads = [t.new_empty(t.shape).unflatten(-1, (-1, head_dim)) for t in (q, k, k, q)]
    rstds = (t.new_empty(*t.shape[:3], 1, dtype=wide) for t in heads[:2])
    sums = (out.new_empty(shape, dtype=wide) for shape in (rows, rows if xsa else (0,)))
    return out, *heads[:3], *rstds, heads[3], *sums


def _forward_cpu(call: Call, value_embed: Tensor | None, num_kv_heads, queries) -> tuple[Tensor, Saved]:
    """Compute `kernels.forward` without kernels."""
    x, weights = call.x, call.weights
    q, k, v = F.linear(_last(x, queries), weights.q), F.linear(x, weights.k), F.linear(x, weights.v)
    context, saved = _attend(q, k, v if value_embed is None else v.add_(value_embed), *call[2:])
    return F.linear(context.flatten(2), weights.out), saved


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_gain, cos, sin, xsa: bool, gate=None, segments=None
) -> tuple[Tensor, Saved]:
    """Return the context (B, W, H, hd) from the fused pass, which overwrites q and k, or from PyTorch."""
    q = q.unflatten(-1, (len(q_gain), -1)).contiguous()
    k, v = (t.unflatten(-1, (-1, q.shape[-1])).contiguous() for t in (k, v))
    # 13.5 ms against PyTorch's 33.9 (backward 29 against 86) on AVX2, one thread, float32, 16 x 256 tokens,
    # 4 heads of 64; with the portable pass 30 against 33 (64 against 79)
    if fused := native.passes("gqa_attention", q):
        y, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        context = torch.empty_like(q) if xsa or gate is not None else y
        tables = (t.float() for t in (q_gain, cos, sin))
        q_rstd, k_rstd = (t.new_empty(*t.shape[:3], 1, dtype=torch.float32) for t in (q, k))
        forms = _forms(gate, segments)
        native.call(fused.attention, q, k, v, *tables, y, context, q_rstd, k_rstd, lse, xsa, *forms)
    else:
        (q, q_rstd), (k, k_rstd) = _unit(q), _unit(k)
        turned = _rotated(q, k, cos, sin, q_gain)
        y, lse = attention_backend.forward(_backend(*turned), *turned, v, segments)
        context = _gated(_exclusive(y, _last(v, q.shape[1])) if xsa else y, gate)
    along = lse.new_zeros(lse.shape if xsa else (0,))
    return context, Saved(*(t.contiguous() for t in (q, k, v, q_rstd, k_rstd, y, lse, along)))


def _forms(gate: Tensor | None, segments: Segments | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the gate and the starts of segments as the fused pass takes them."""
    return None if gate is None else gate.float(), None if segments is None else segments.starts


def _gated(context: Tensor, gate: Tensor | None) -> Tensor:
    return context if gate is None else torch.mul(context, gate.unsqueeze(-1)).to(context.dtype)


def _last(t: Tensor, queries: int) -> Tensor:
    return t[:, t.shape[1] - queries :]


def _unit(heads: Tensor) -> tuple[Tensor, Tensor]:
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(heads.shape[-1]).add_(reference.RMS_EPS).rsqrt_()
    return (wide * rstd).to(heads.dtype), rstd


def _rotated(q_unit: Tensor, k_unit: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Apply RoPE, and to q the gain; q holds the last positions."""
    first, wide = k_unit.shape[1] - q_unit.shape[1], torch.promote_types(q_unit.dtype, torch.float32)
    q = reference.rotate(q_unit.to(wide), cos[first:], sin[first:]) * gain.to(wide)[:, None]
    k = reference.rotate(k_unit.to(wide), cos, sin)
    return q.to(q_unit.dtype), k.to(k_unit.dtype)


def _backend(q: Tensor, k: Tensor) -> str:
    return attention_backend.without_kernels(attention_backend.shape_of(q, k)) if q.numel() else "plain"


@torch.library.custom_op(
    "pgolf::gqa_attention_backward",
    mutates_args=("grad_qo", "grad_kv"),
    schema="(Tensor dout, Tensor x, Tensor qo_bank, Tensor kv_bank, Tensor q_gain, Tensor cos, Tensor sin, "
    "Tensor[] saved, SymInt slot, bool xsa, Tensor(a10!)? grad_qo, Tensor(a11!)? grad_kv, "
    "bool has_value_embed=True, Tensor? gate=None, Tensor? cu_seqlens=None, SymInt? max_seqlen=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gqa_attention_backward(
    dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, slot, xsa, grad_qo, grad_kv, *rest
) -> tuple[Tensor, ...]:
    has_value_embed, gate, *bounds = _filled(rest, True, None, None, None)
    segments = segments_of(*bounds, *x.shape[:2])
    call = Call(x, weights_of(qo_bank, kv_bank, slot), q_gain, cos, sin, xsa, gate, segments)
    run = kernels.backward if kernels.supports(x, x.shape[2] // q_gain.shape[0]) else _backward_cpu
    dx, factors, dgain, dvalue, dgate = run(dout, call, Saved(*saved), has_value_embed)
    dgain, dgate = dgain.to(q_gain.dtype), dgate if gate is None else dgate.to(gate.dtype)
    if grad_qo is None or grad_kv is None:
        dq, dk, dv, dout_weight = (left @ right for left, right in kernels.apart(factors))
        return dx, torch.stack((dq, dout_weight)), torch.stack((dk, dv)), dgain, dvalue, dgate
    kernels.add_factors(factors, grad_qo, grad_kv, slot)
    return dx, x.new_empty(0), x.new_empty(0), dgain, dvalue, dgate


@_gqa_attention_backward.register_fake
def _(dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, slot, xsa, grad_qo, grad_kv, *rest):
    has_value_embed, gate, *_ = _filled(rest, True, None, None, None)
    dense = grad_qo is None or grad_kv is None
    dqo, dkv = (x.new_empty((2, *b.shape[1:]) if dense else (0,)) for b in (qo_bank, kv_bank))
    dvalue = x.new_empty((*x.shape[:2], kv_bank.shape[1]) if has_value_embed else (0,))
    return x.new_empty(x.shape), dqo, dkv, q_gain.new_empty(q_gain.shape), dvalue, _empty_gate(gate, x)


def _empty_gate(gate: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if gate is None else gate.new_empty(gate.shape)


def _backward_cpu(dout: Tensor, call: Call, s: Saved, has_value_embed: bool) -> Gradients:
    """Compute `kernels.backward` without kernels."""
    x, weights = call.x, call.weights
    dim, queries = x.shape[2], s.q.shape[1]
    *heads, dgain, dgate = _attend_backward((dout @ weights.out).view(s.y.shape), s, *call[2:])
    context, dq, dk, dv = (t.to(x.dtype).reshape(-1, t.shape[2] * t.shape[3]) for t in heads)
    if queries == x.shape[1]:
        dx = (dq @ weights.q).addmm_(dk, weights.k).addmm_(dv, weights.v).view(x.shape)
    else:
        dx = (dk @ weights.k).addmm_(dv, weights.v).view(x.shape)
        _last(dx, queries).add_((dq @ weights.q).view(x.shape[0], queries, dim))
    rows, tail, outer = x.reshape(-1, dim), _last(x, queries).reshape(-1, dim), dout.reshape(-1, dim)
    factors = [(dq.T, tail), (dk.T, rows), (dv.T, rows), (outer.T, context)]
    dvalue = dv.view(*x.shape[:2], dv.shape[1]) if has_value_embed else x.new_empty(0)
    return dx, factors, dgain, dvalue, dgate


def _attend_backward(
    dcontext: Tensor, s: Saved, q_gain, cos, sin, xsa: bool, gate=None, segments=None
) -> tuple[Tensor, ...]:
    """Return the context, the gradients of the three projections, and those of gain and gate (or empty)."""
    dgate = _empty_gate(gate, q_gain)
    if fused := native.passes("gqa_attention", s.q):
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in s[:3])
        context = torch.empty_like(dq) if xsa or gate is not None else s.y
        tables = (t.float() for t in (q_gain, cos, sin))
        dgate = dgate.to(torch.float32, memory_format=torch.contiguous_format)  # the pass writes it
        dgain = q_gain.new_empty(q_gain.shape, dtype=torch.float32)
        given = (dcontext, s.q, s.k, s.v, s.y, s.q_rstd, s.k_rstd, s.lse, *tables)
        forms = (*_forms(gate, segments), None if gate is None else dgate)
        native.call(fused.attention_backward, *given, context, dq, dk, dv, dgain, xsa, *forms)
        return context, dq, dk, dv, dgain, dgate
    first, own = s.v.shape[1] - s.q.shape[1], _last(s.v, s.q.shape[1])
    context = _exclusive(s.y, own) if xsa else s.y
    if gate is not None:
        wide = torch.promote_types(gate.dtype, s.q_rstd.dtype)
        dgate = (dcontext.to(wide) * context.to(wide)).sum(-1)
        dcontext, context = _gated(dcontext, gate), _gated(context, gate)
    dy, dv_own = _exclusive_backward(dcontext, s.y, own) if xsa else (dcontext, None)
    q, k = _rotated(s.q, s.k, cos, sin, q_gain)
    dq, dk, dv = attention_backend.backward(_backend(q, k), dy, q, k, s.v, s.y, s.lse, segments)
    if dv_own is not None:
        dv = dv + (dv_own if first == 0 else F.pad(dv_own, (0, 0, 0, 0, first, 0)))
    wide, rotated = s.q_rstd.dtype, ((dq, first), (dk, 0))
    dq, dk = (reference.rotate(t.to(wide), cos[start:], -sin[start:]) for t, start in rotated)
    dgain, dq = (dq * s.q.to(wide)).sum((0, 1, 3)), dq * q_gain.to(wide)[:, None]
    dq, dk = _norm_backward(dq, s.q, s.q_rstd), _norm_backward(dk, s.k, s.k_rstd)
    return context, dq, dk, dv, dgain, dgate


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


def _norm_backward(grad: Tensor, unit: Tensor, rstd: Tensor) -> Tensor:
    unit = unit.to(grad.dtype)
    return rstd * (grad - unit * (grad * unit).mean(-1, keepdim=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, ctx.slot, _, ctx.xsa, *rest = inputs
    ctx.grad_qo, ctx.grad_kv, _, gate, cu_seqlens, ctx.max_seqlen = rest
    ctx.has_value_embed = value_embed is not None
    ctx.save_for_backward(x, qo_bank, kv_bank, q_gain, cos, sin, gate, cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward makes zeros for them


def _backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 16
    x, qo_bank, kv_bank, q_gain, cos, sin, gate, cu_seqlens, *saved = ctx.saved_tensors
    forms = (gate, cu_seqlens, ctx.max_seqlen)
    options = (ctx.slot, ctx.xsa, ctx.grad_qo, ctx.grad_kv, ctx.has_value_embed, *forms)
    dx, dqo, dkv, dgain, dvalue, dgate = torch.ops.pgolf.gqa_attention_backward(
        dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, *options
    )
    if ctx.grad_qo is None or ctx.grad_kv is None:
        slots = (ctx.slot, qo_bank.shape[0] // 2 + ctx.slot)
        dqo, dkv = (scatter_slots(b, slots, g.unbind()) for b, g in ((qo_bank, dqo), (kv_bank, dkv)))
    else:
        dqo = dkv = None
    dvalue = dvalue if ctx.has_value_embed else None
    return dx, dqo, dkv, dgain, dvalue, *(None,) * 8, None if gate is None else dgate, None, None


_gqa_attention.register_autograd(_backward, setup_context=_setup_context)


def projected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    xsa: bool,
    gate: Tensor | None = None,
) -> Tensor:
    """Compute the context (B, W, D) that `gqa_attention` projects to its output, from q, k and v.

    q (B, W, D) holds the last W of T positions; k and v are (B, T, KV*hd), v with its embedding added; the
    rest is as in `gqa_attention`. Where no fused pass runs, as on a GPU, PyTorch's own ops compute it.
    Raises ValueError if shapes, dtypes or devices do not match.
    """
    call = (q, k, v, q_gain, cos, sin, num_kv_heads, xsa, gate)
    if native.passes("gqa_attention", q):
        return torch.ops.pgolf.projected_attention(*call)[0]
    _check_projected(*call)
    return reference.projected_attention(*call, inner=_causal)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `reference.causal` by PyTorch, on a CPU in at least float32, where bfloat16 is slower."""
    dtype = torch.promote_types(v.dtype, torch.float32) if v.is_cpu else v.dtype
    groups, first = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    # v is widened before it is repeated: backward sums its gradient over the group in that dtype
    heads = (q, k.repeat_interleave(groups, 2), v.to(dtype).repeat_interleave(groups, 2))
    q, k, v = (t.to(dtype).transpose(1, 2) for t in heads)
    seen = None  # is_causal would align the first query with the first key; ours end together
    if first:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(first)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=not first).transpose(1, 2)


def _check_projected(q, k, v, q_gain, cos, sin, num_kv_heads, xsa, gate=None) -> None:
    op = "projected_attention"
    expect_shape(op, "q", q, (None, None, None))
    expect_shape(op, "k", k, (None, None, None))
    (batch, queries, dim), length = q.shape, k.shape[1]
    kv_dim = _check_heads(op, dim, length, q_gain, cos, sin, num_kv_heads)
    expect_shape(op, "k", k, (batch, length, kv_dim))
    expect_shape(op, "v", v, (batch, length, kv_dim))
    if queries > length:
        raise ValueError(f"pgolf::{op}: q has {queries} positions, but k has {length}: give at most those")
    same_dtype_device(op, q=q, k=k, v=v)
    same_device(op, q=q, q_gain=q_gain, cos=cos, sin=sin)
    _check_gate(op, q, gate, (batch, queries, q_gain.shape[0]))


@torch.library.custom_op(
    "pgolf::projected_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor q_gain, Tensor cos, Tensor sin, SymInt num_kv_heads, "
    "bool xsa, Tensor? gate=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _projected_attention(q, k, v, q_gain, cos, sin, num_kv_heads, xsa, gate=None) -> tuple[Tensor, ...]:
    _check_projected(q, k, v, q_gain, cos, sin, num_kv_heads, xsa, gate)
    # an op must return neither its inputs nor one tensor twice; without XSA and gate, y is the context
    context, saved = _attend(q.clone(), k.clone(), v.clone(), q_gain, cos, sin, xsa, gate)
    return (context if xsa or gate is not None else context.clone()).flatten(2), *saved


@_projected_attention.register_fake
def _(q, k, v, q_gain, cos, sin, num_kv_heads, xsa, gate=None):
    _check_projected(q, k, v, q_gain, cos, sin, num_kv_heads, xsa, gate)
    return _empty(q, k, q_gain.shape[0], xsa)


@torch.library.custom_op(
    "pgolf::projected_attention_backward",
    mutates_args=(),
    schema="(Tensor dcontext, Tensor[] saved, Tensor q_gain, Tensor cos, Tensor sin, bool xsa, "
    "Tensor? gate=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _projected_attention_backward(dcontext, saved, q_gain, cos, sin, xsa, gate=None) -> tuple[Tensor, ...]:
    s = Saved(*saved)
    _, *grads, dgain, dgate = _attend_backward(dcontext.reshape(s.q.shape), s, q_gain, cos, sin, xsa, gate)
    dgain, dgate = dgain.to(q_gain.dtype), dgate if gate is None else dgate.to(gate.dtype)
    return *(grad.to(s.q.dtype).contiguous().flatten(2) for grad in grads), dgain, dgate


@_projected_attention_backward.register_fake
def _(dcontext, saved, q_gain, cos, sin, xsa, gate=None):
    heads = (t.new_empty(t.shape).flatten(2) for t in saved[:3])
    return *heads, q_gain.new_empty(q_gain.shape), _empty_gate(gate, q_gain)


def _setup_projected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, q_gain, cos, sin, _, ctx.xsa, gate = inputs
    ctx.save_for_backward(q_gain, cos, sin, gate, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward makes zeros for them


def _projected_backward(ctx: Any, dcontext: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dcontext is None:
        return (None,) * 9
    q_gain, cos, sin, gate, *saved = ctx.saved_tensors
    options = (saved, q_gain, cos, sin, ctx.xsa, gate)
    *grads, dgate = torch.ops.pgolf.projected_attention_backward(dcontext, *options)
    return *grads, *(None,) * 4, None if gate is None else dgate


_projected_attention.register_autograd(_projected_backward, setup_context=_setup_projected)
