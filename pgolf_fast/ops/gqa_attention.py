"""pgolf::gqa_attention — bank-indexed grouped-query attention with QK norm, partial RoPE, gain and XSA.

Sources: PR 1501 (banks, XSA, value embedding, q gain); Su et al. 2021 (RoPE); Ainslie et al. 2023 (GQA).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import reference
from pgolf_fast.ops.bank_grad import add_matmul, expect_slot, scatter_slots
from pgolf_fast.ops.checks import expect_shape, same_dtype_device


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
) -> Tensor:
    """Causal attention of one block, from normalised input to output projection.

    With n layers: q = x qo[slot]^T, k = x kv[slot]^T, v = x kv[n + slot]^T + value_embed; q and k are
    RMS-normed per head, rotated (RoPE on the first channels), and q is multiplied by its head's gain; then
    causal softmax attention at scale 1/sqrt(hd), query head h reading KV head h // (H / KV); XSA removes
    from the result the component along the token's own value; output = context qo[n + slot]^T.

    x (B, T, D); qo_bank (2n, D, D); kv_bank (2n, KV*hd, D); q_gain (H,); value_embed (B, T, KV*hd) or None;
    cos, sin (T, r/2). With `grad_qo` and `grad_kv`, backward adds weight gradients into their slots.
    Raises ValueError for shapes, dtypes or slots that do not fit.
    """
    return torch.ops.pgolf.gqa_attention(
        x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv
    )[0]


class _Saved(NamedTuple):
    """What backward needs. Head tensors are (B, T, heads, hd); lse is (B, H, T)."""

    q_unit: Tensor  # RMS-normed, before RoPE and gain
    k_unit: Tensor
    v: Tensor
    q_rstd: Tensor
    k_rstd: Tensor
    y: Tensor  # attention output before XSA
    lse: Tensor


def _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads) -> None:
    op, (batch, length, dim) = "gqa_attention", _shape3(x)
    expect_shape(op, "qo_bank", qo_bank, (None, dim, dim))
    expect_shape(op, "q_gain", q_gain, (None,))
    num_heads = q_gain.shape[0]
    if num_heads == 0 or dim % num_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"pgolf::{op}: width {dim}, {num_heads} heads and {num_kv_heads} KV heads do not divide"
        )
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


def _shape3(x: Tensor) -> tuple[int, int, int]:
    expect_shape("gqa_attention", "x", x, (None, None, None))
    return x.shape[0], x.shape[1], x.shape[2]


@torch.library.custom_op("pgolf::gqa_attention", mutates_args=())
def _gqa_attention(
    x: Tensor,
    qo_bank: Tensor,
    kv_bank: Tensor,
    q_gain: Tensor,
    value_embed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slot: int,
    num_kv_heads: int,
    xsa: bool,
    grad_qo: Tensor | None,
    grad_kv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads)
    layers = qo_bank.shape[0] // 2
    q = F.linear(x, qo_bank[slot]).unflatten(-1, (q_gain.shape[0], -1))
    k = F.linear(x, kv_bank[slot]).unflatten(-1, (num_kv_heads, -1))
    v = F.linear(x, kv_bank[layers + slot])
    v = (v if value_embed is None else v.add_(value_embed)).unflatten(-1, (num_kv_heads, -1))
    q_unit, q_rstd = _unit(q)
    k_unit, k_rstd = _unit(k)
    turned_q, turned_k = _heads_first(q_unit, cos, sin, q_gain), _heads_first(k_unit, cos, sin, None)
    y, lse = _sdpa(turned_q, turned_k, v.transpose(1, 2))
    context = _exclusive(y, v) if xsa else y
    out = F.linear(context.flatten(2), qo_bank[layers + slot])
    saved = _Saved(q_unit, k_unit, v, q_rstd, k_rstd, y, lse)
    return (out, *(t.contiguous() for t in saved))  # type: ignore[return-value]  # eight by construction


@_gqa_attention.register_fake
def _(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads, xsa, grad_qo, grad_kv):
    _check(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, num_kv_heads)
    (batch, length, dim), num_heads = x.shape, q_gain.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    q, kv = (batch, length, num_heads, dim // num_heads), (batch, length, num_kv_heads, dim // num_heads)
    return (
        x.new_empty(x.shape),
        x.new_empty(q),
        x.new_empty(kv),
        x.new_empty(kv),
        x.new_empty(*q[:3], 1, dtype=wide),
        x.new_empty(*kv[:3], 1, dtype=wide),
        x.new_empty(q),
        x.new_empty(batch, num_heads, length, dtype=wide),
    )


def _unit(heads: Tensor) -> tuple[Tensor, Tensor]:
    """RMS-normed heads and their 1 / rms."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(heads.shape[-1]).add_(reference.RMS_EPS).rsqrt_()
    return (wide * rstd).to(heads.dtype), rstd


def _heads_first(unit: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None) -> Tensor:
    """RoPE and gain, then (B, heads, T, hd)."""
    turned = reference.rotate(unit.to(torch.promote_types(unit.dtype, torch.float32)), cos, sin)
    if gain is not None:
        turned = turned * gain.to(turned.dtype)[:, None]
    return turned.to(unit.dtype).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention (B, T, H, hd) and its logsumexp (B, H, T), by PyTorch's flash kernels if they fit."""
    if q.numel() == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.empty_like(q.transpose(1, 2)), q.new_empty(q.shape[:3], dtype=wide)
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    if not q.is_cuda:
        wide = torch.promote_types(q.dtype, torch.float32)  # quicker than in bfloat16: 4.5 against 5.5 ms
        q32, k32, v32 = (t.to(wide) for t in (q, k, v))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q32, k32, v32, 0.0, True)
        y = y.to(q.dtype)
    elif _flash_fits(q):
        y, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    else:
        y, lse = _plain_sdpa(q, k, v)
    return y.transpose(1, 2), lse


def _sdpa_grad(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dq, dk, dv of `_sdpa`, all (B, H, T, hd)."""
    if not q.is_cuda:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        wide = torch.promote_types(q.dtype, torch.float32)  # 11 ms against 17 in bfloat16
        return backward(*(t.to(wide) for t in (dy, q, k, v, y, lse)), 0.0, True)
    if not _flash_fits(q):
        return _plain_sdpa_grad(dy, q, k, v, y, lse)
    length, no_dropout = q.shape[2], torch.zeros(2, dtype=torch.uint64, device=q.device)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(dy, q, k, v, y, lse, None, None, length, length, 0.0, True, no_dropout, no_dropout)


def _flash_fits(q: Tensor) -> bool:
    """Whether the GPU's flash kernel takes these heads: 16 bits, channels in eights, Ampere or later."""
    sixteen = q.dtype in (torch.float16, torch.bfloat16)
    return sixteen and q.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _plain_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled causal scores (B, H, T, T) in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT).mul_(q.shape[-1] ** -0.5)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill_(future, -torch.inf)


def _plain_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with all scores in memory: for dtypes, widths and GPUs that have no flash kernel."""
    scores = _plain_scores(q, k)
    return (scores.softmax(-1) @ v.to(scores.dtype)).to(q.dtype), scores.logsumexp(-1)


def _plain_sdpa_grad(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dS = P (dP - <dy, y>) P = exp(S - lse), dP = dy V^T; then dq = dS K, dk = dS^T q, dv = P^T dy."""
    scores = _plain_scores(q, k)
    probabilities = torch.exp(scores - lse.unsqueeze(-1))
    dy, q_wide, k_wide, v_wide, y = (t.to(scores.dtype) for t in (dy, q, k, v, y))
    along = (dy * y).sum(-1, keepdim=True)
    dscores = probabilities * (dy @ v_wide.mT - along) * q.shape[-1] ** -0.5
    grads = (dscores @ k_wide, dscores.mT @ q_wide, probabilities.mT @ dy)
    dq, dk, dv = (grad.to(q.dtype) for grad in grads)
    return dq, dk, dv


@torch.library.custom_op("pgolf::gqa_attention_backward", mutates_args=("grad_qo", "grad_kv"))
def _gqa_attention_backward(
    dout: Tensor,
    x: Tensor,
    qo_bank: Tensor,
    kv_bank: Tensor,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    saved: list[Tensor],
    slot: int,
    xsa: bool,
    grad_qo: Tensor | None,
    grad_kv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s, layers = _Saved(*saved), qo_bank.shape[0] // 2
    context = (_exclusive(s.y, s.v) if xsa else s.y).flatten(0, 1).flatten(1)
    dcontext = (dout @ qo_bank[layers + slot]).view(s.y.shape)
    dy, dv_own = _exclusive_backward(dcontext, s.y, s.v) if xsa else (dcontext, None)
    dq, dk, dv = _sdpa_backward(dy, s, q_gain, cos, sin)
    if dv_own is not None:
        dv = dv + dv_own
    dq, dgain = _turn_back(dq, s.q_unit, s.q_rstd, cos, sin, q_gain)
    dk, _ = _turn_back(dk, s.k_unit, s.k_rstd, cos, sin, None)
    dq, dk, dv = (t.to(x.dtype).reshape(-1, t.shape[2] * t.shape[3]) for t in (dq, dk, dv))
    dx = (dq @ qo_bank[slot]).addmm_(dk, kv_bank[slot]).addmm_(dv, kv_bank[layers + slot]).view(x.shape)
    dvalue, rows, outer = (
        dv.view(*x.shape[:2], dv.shape[1]),
        x.reshape(-1, x.shape[-1]),
        dout.reshape(-1, x.shape[-1]),
    )
    dgain = dgain.to(q_gain.dtype)
    if grad_qo is None or grad_kv is None:
        return (
            dx,
            torch.stack((dq.T @ rows, outer.T @ context)),
            torch.stack((dk.T @ rows, dv.T @ rows)),
            dgain,
            dvalue,
        )
    add_matmul(grad_qo, slot, dq.T, rows)
    add_matmul(grad_qo, layers + slot, outer.T, context)
    add_matmul(grad_kv, slot, dk.T, rows)
    add_matmul(grad_kv, layers + slot, dv.T, rows)
    return dx, x.new_empty(0), x.new_empty(0), dgain, dvalue


@_gqa_attention_backward.register_fake
def _(dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, slot, xsa, grad_qo, grad_kv):
    dense = grad_qo is None or grad_kv is None
    dqo = x.new_empty(2, *qo_bank.shape[1:]) if dense else x.new_empty(0)
    dkv = x.new_empty(2, *kv_bank.shape[1:]) if dense else x.new_empty(0)
    return (
        x.new_empty(x.shape),
        dqo,
        dkv,
        q_gain.new_empty(q_gain.shape),
        x.new_empty(*x.shape[:2], kv_bank.shape[1]),
    )


def _own_value(v: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector of each token's value, (B, T, KV, hd, 1), and its length, in at least float32."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(reference.XSA_EPS)
    return (wide / norm).unsqueeze(-1), norm


def _exclusive(y: Tensor, v: Tensor) -> Tensor:
    """`reference.exclusive` by small matrix products, which is what is quick on a CPU."""
    unit, _ = _own_value(v)
    groups = y.to(unit.dtype).unflatten(2, (v.shape[2], -1))
    return (groups - (groups @ unit) @ unit.mT).flatten(2, 3).to(y.dtype)


def _exclusive_backward(dcontext: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y - (y.u) u, u = v / |v|: dy = g - (g.u) u; du = -((g.u) y + (y.u) g) over the group."""
    unit, norm = _own_value(v)
    groups, grad = (t.to(unit.dtype).unflatten(2, (v.shape[2], -1)) for t in (y, dcontext))
    g_along = grad @ unit
    dunit = -(g_along.mT @ groups + (groups @ unit).mT @ grad).squeeze(3)
    unit3 = unit.squeeze(-1)
    dv = (dunit - (dunit * unit3).sum(-1, keepdim=True) * unit3) / norm
    return (grad - g_along @ unit.mT).flatten(2, 3).to(y.dtype), dv


def _sdpa_backward(
    dy: Tensor, s: _Saved, q_gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rotated q (B, T, H, hd) and of k and v (B, T, KV, hd), summed over each group."""
    if dy.numel() == 0:
        return torch.zeros_like(s.q_unit), torch.zeros_like(s.k_unit), torch.zeros_like(s.v)
    kv_heads, repeat = s.v.shape[2], s.y.shape[2] // s.v.shape[2]
    q, k = _heads_first(s.q_unit, cos, sin, q_gain), _heads_first(s.k_unit, cos, sin, None)
    k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, s.v.transpose(1, 2)))
    grads = _sdpa_grad(dy.transpose(1, 2), q, k, v, s.y.transpose(1, 2), s.lse)
    dq, dk, dv = (t.transpose(1, 2) for t in grads)
    wide = torch.promote_types(dk.dtype, torch.float32)
    dk, dv = (t.to(wide).unflatten(2, (kv_heads, repeat)).sum(3) for t in (dk, dv))
    return dq, dk, dv


def _turn_back(
    grad: Tensor, unit: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Through gain, RoPE and RMS norm; returns the gradient of the projection and of the gain (or empty)."""
    wide = rstd.dtype
    grad, unit = reference.rotate(grad.to(wide), cos, -sin), unit.to(wide)
    dgain = grad.new_empty(0)
    if gain is not None:
        dgain = (grad * unit).sum((0, 1, 3))
        grad = grad * gain.to(wide)[:, None]
    return rstd * (grad - unit * (grad * unit).mean(-1, keepdim=True)), dgain


def _setup_context(ctx, inputs, output) -> None:
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, ctx.slot, _, ctx.xsa, ctx.grad_qo, ctx.grad_kv = (
        inputs
    )
    ctx.has_value_embed = value_embed is not None
    ctx.save_for_backward(x, qo_bank, kv_bank, q_gain, cos, sin, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, *_):
    x, qo_bank, kv_bank, q_gain, cos, sin, *saved = ctx.saved_tensors
    dx, dqo, dkv, dgain, dvalue = torch.ops.pgolf.gqa_attention_backward(
        dout, x, qo_bank, kv_bank, q_gain, cos, sin, saved, ctx.slot, ctx.xsa, ctx.grad_qo, ctx.grad_kv
    )
    if ctx.grad_qo is None or ctx.grad_kv is None:
        slots = (ctx.slot, qo_bank.shape[0] // 2 + ctx.slot)
        dqo, dkv = (scatter_slots(b, slots, g.unbind()) for b, g in ((qo_bank, dqo), (kv_bank, dkv)))
    else:
        dqo = dkv = None
    dvalue = dvalue if ctx.has_value_embed else None
    return dx, dqo, dkv, dgain, dvalue, None, None, None, None, None, None, None


_gqa_attention.register_autograd(_backward, setup_context=_setup_context)
