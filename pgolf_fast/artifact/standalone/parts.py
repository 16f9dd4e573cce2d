"""Layers with the backward passes of the package's ops, so that gradients are rounded identically."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
ROWS = 4096  # rows of logits alive at once


def rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def inverse_rms(x: Tensor) -> Tensor:
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + EPS).rsqrt()


def rounded(weight: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Round to multiples of `step`; gradients pass straight through."""
    codes = torch.round(weight.detach() / step).clamp(low, high)
    return codes * step + (weight - weight.detach())


def int6(weight: Tensor) -> Tensor:
    return rounded(weight, (weight.detach().abs().amax(-1, keepdim=True) / 31).clamp_min(1 / 31), -32, 31)


class Ngrams(torch.autograd.Function):
    """scale * gate * (sum of table rows), where gate is `boost` at word starts and 1 elsewhere."""

    @staticmethod
    def forward(ctx, table, scale, boost, starts, indices, dtype):
        rows = sum(table[index] for index in indices)
        ctx.save_for_backward(table, scale, boost, starts, rows, *indices)
        return (rows * torch.where(starts[..., None], scale * boost, scale)).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        table, scale, boost, starts, rows, *indices = ctx.saved_tensors
        grad = grad.float()
        along = (grad * rows).sum(-1)
        at_starts = torch.where(starts, along, 0).sum()
        of_scale = at_starts * boost + torch.where(starts, 0, along).sum()
        grad = (grad * torch.where(starts[..., None], scale * boost, scale)).flatten(0, 1)
        of_table = torch.zeros_like(table)
        for index in indices:
            of_table.index_add_(0, index.flatten(), grad)
        return of_table, of_scale, at_starts * scale, None, None, None


class Smear(torch.autograd.Function):
    """(1 - s) x_t + s x_{t-1} with s = sigmoid(gate)."""

    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        s, wide = gate.sigmoid(), x.float()
        return ((1 - s) * wide + s * F.pad(wide[:, :-1], (0, 0, 1, 0))).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        s, wide, dtype, grad = gate.sigmoid(), x.float(), x.dtype, grad.float()
        change = F.pad(wide[:, :-1], (0, 0, 1, 0)) - wide
        of_x = (1 - s) * grad + s * F.pad(grad[:, 1:], (0, 0, 0, 1))
        return of_x.to(dtype), (grad * change).sum((0, 1)) * s * (1 - s)


class Residual(torch.autograd.Function):
    """mixed = a x + b branch, and its scaled RMS norm. None for a means 1."""

    @staticmethod
    def forward(ctx, x, branch, a, b, scale):
        mixed = branch * b
        mixed = (mixed + x if a is None else torch.addcmul(mixed, x.float(), a)).to(x.dtype)
        wide = mixed.float()
        rstd = inverse_rms(wide)
        ctx.scale = scale
        ctx.save_for_backward(x, branch, a, b, mixed, rstd)
        return mixed, (wide * (rstd * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx, of_mixed, of_normed):
        x, branch, a, b, mixed, rstd = ctx.saved_tensors
        unit, grad = mixed.float() * rstd, of_normed.float() * ctx.scale
        total = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * rstd + of_mixed
        rows = total.flatten(0, 1)
        of_b, of_branch = (rows * branch.flatten(0, 1)).sum(0), (total * b).to(x.dtype)
        if a is None:
            return total.to(x.dtype), of_branch, None, of_b, None
        return (total * a).to(x.dtype), of_branch, (rows * x.flatten(0, 1)).sum(0), of_b, None


class Mlp(torch.autograd.Function):
    """act(x up^T) down^T."""

    @staticmethod
    def forward(ctx, x, up, down, kind):
        ctx.kind, pre = kind, F.linear(x, up)
        ctx.save_for_backward(x, up, down, pre)
        return F.linear(activated(pre, kind), down)

    @staticmethod
    def backward(ctx, grad):
        x, up, down, pre = ctx.saved_tensors
        of_hidden, kind = grad @ down, ctx.kind
        if kind == "swiglu":
            gate, value, of_hidden = pre[..., 0::2].float(), pre[..., 1::2].float(), of_hidden.float()
            s = gate.sigmoid()
            of_gate = of_hidden * value * s * (1 + gate * (1 - s))
            of_pre = torch.stack((of_gate, of_hidden * gate * s), -1).flatten(-2).to(pre.dtype)
        else:
            slope = 0.5 if kind[0] == "l" else 0.0
            of_pre = F.leaky_relu(pre, slope) * 2 * of_hidden
            of_pre = torch.where(pre > 0, of_pre, of_pre * slope)
        rows = of_pre.flatten(0, 1)
        of_down = grad.flatten(0, 1).T @ activated(pre, kind).flatten(0, 1)
        return of_pre @ up, rows.T @ x.flatten(0, 1), of_down, None


def activated(pre: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        return (F.silu(pre[..., 0::2].float()) * pre[..., 1::2].float()).to(pre.dtype)
    return F.leaky_relu(pre, 0.5 if kind[0] == "l" else 0.0).square_()


class Attention(torch.autograd.Function):
    """Causal grouped-query attention with QK norm, RoPE, gain and XSA, from input to projection."""

    @staticmethod
    def forward(ctx, x, wq, wk, wv, wo, gain, extra, cos, sin, kv_heads, xsa):
        q = F.linear(x, wq).unflatten(-1, (len(gain), -1))
        k = F.linear(x, wk).unflatten(-1, (kv_heads, -1))
        v = F.linear(x, wv)
        v = (v if extra is None else v + extra).unflatten(-1, (kv_heads, -1))
        (q, q_rstd), (k, k_rstd) = unit_heads(q), unit_heads(k)
        turned_q = (rotate(q.float(), cos, sin) * gain[:, None]).to(x.dtype)
        y, ctx.inner = causal(turned_q, rotate(k.float(), cos, sin).to(x.dtype), v)
        context = exclusive(y, v) if xsa else y
        ctx.xsa, ctx.has_extra = xsa, extra is not None
        ctx.save_for_backward(x, wq, wk, wv, wo, gain, cos, sin, q, k, v, q_rstd, k_rstd, y.contiguous())
        return F.linear(context.flatten(2), wo)

    @staticmethod
    def backward(ctx, grad):
        x, wq, wk, wv, wo, gain, cos, sin, q, k, v, q_rstd, k_rstd, y = ctx.saved_tensors
        context = (exclusive(y, v) if ctx.xsa else y).flatten(0, 1).flatten(1)
        of_y, of_own = (grad @ wo).view(y.shape), 0.0
        if ctx.xsa:  # y - (y.u) u with u = v / |v|
            unit, norm = own_value(v)
            groups, g = (t.float().unflatten(2, (v.shape[2], -1)) for t in (y, of_y))
            along = g @ unit
            of_unit = -(along.mT @ groups + (groups @ unit).mT @ g).squeeze(3)
            u = unit.squeeze(-1)
            of_own = (of_unit - (of_unit * u).sum(-1, keepdim=True) * u) / norm
            of_y = (g - along @ unit.mT).flatten(2, 3).to(y.dtype)
        of_q, of_k, of_v = ctx.inner(of_y, y)
        of_v = of_v + of_own
        of_q, q = rotate(of_q.float(), cos, -sin), q.float()
        of_gain = (of_q * q).sum((0, 1, 3))
        of_q = of_q * gain[:, None]
        of_k, k = rotate(of_k, cos, -sin), k.float()
        of_q = q_rstd * (of_q - q * (of_q * q).mean(-1, keepdim=True))
        of_k = k_rstd * (of_k - k * (of_k * k).mean(-1, keepdim=True))
        of_q, of_k, of_v = (t.to(x.dtype).flatten(0, 1).flatten(1) for t in (of_q, of_k, of_v))
        of_x = (of_q @ wq).addmm_(of_k, wk).addmm_(of_v, wv).view(x.shape)
        rows = x.flatten(0, 1)
        weights = (of_q.T @ rows, of_k.T @ rows, of_v.T @ rows, grad.flatten(0, 1).T @ context)
        of_extra = of_v.view(*x.shape[:2], -1) if ctx.has_extra else None
        return of_x, *weights, of_gain, of_extra, None, None, None, None


def unit_heads(heads: Tensor) -> tuple[Tensor, Tensor]:
    wide = heads.float()
    rstd = inverse_rms(wide)
    return (wide * rstd).to(heads.dtype), rstd


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Callable]:
    """Return causal attention (B, T, H, hd), and a function that maps its gradient to those of q, k and v."""
    kv_heads, groups = k.shape[2], q.shape[2] // k.shape[2]
    heads = [t.repeat_interleave(n, 2).transpose(1, 2) for t, n in ((q, 1), (k, groups), (v, groups))]
    y, inner = (by_autograd if q.is_cuda else by_flash)(heads)

    def backward(*grad_and_y: Tensor) -> list[Tensor]:
        of_q, of_k, of_v = (t.transpose(1, 2) for t in inner(*(t.transpose(1, 2) for t in grad_and_y)))
        return [of_q, *(t.float().unflatten(2, (kv_heads, -1)).sum(3) for t in (of_k, of_v))]

    return y.transpose(1, 2).to(q.dtype), backward


def by_autograd(heads: list[Tensor]) -> tuple[Tensor, Callable]:
    with torch.enable_grad():
        heads = [t.detach().requires_grad_() for t in heads]
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
    return y.detach(), lambda grad, _: torch.autograd.grad(y, heads, grad)


def by_flash(heads: list[Tensor]) -> tuple[Tensor, Callable]:
    """Run in float32 on a CPU, with the gradient computed from the rounded result."""
    ops, heads = torch.ops.aten, [t.float() for t in heads]
    y, lse = ops._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True)
    inner = ops._scaled_dot_product_flash_attention_for_cpu_backward
    return y, lambda grad, y: inner(grad.float(), *heads, y.float(), lse, 0.0, True)


def own_value(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vector of each token's value as a column, and its norm."""
    wide = v.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    return (wide / norm).unsqueeze(-1), norm


def exclusive(y: Tensor, v: Tensor) -> Tensor:
    """Remove from `y` its component along the token's own value."""
    unit, _ = own_value(v)
    groups = y.float().unflatten(2, (v.shape[2], -1))
    return (groups - (groups @ unit) @ unit.mT).flatten(2, 3).to(y.dtype)


class CrossEntropy(torch.autograd.Function):
    """-log softmax(cap tanh(x head^T / cap))[target] for rows x (N, D)."""

    @staticmethod
    def forward(ctx, x, head, targets, cap):
        losses, lses = [], []
        for rows, target in zip(x.split(ROWS), targets.split(ROWS), strict=True):
            logits = (rows @ head.T).float().div_(cap).tanh_().mul_(cap)
            chosen = logits.gather(1, target[:, None]).squeeze(1)
            lses.append(logits.exp_().sum(1).log_() if cap < 80 else logits.logsumexp(1))
            losses.append(lses[-1] - chosen)
        ctx.cap = cap
        ctx.save_for_backward(x, head, targets, torch.cat(lses))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad):
        x, head, *others = ctx.saved_tensors
        of_x, of_head = [], torch.zeros_like(head, dtype=torch.float32)
        for rows, target, lse, g in zip(*(t.split(ROWS) for t in (x, *others, grad)), strict=True):
            tanh = (rows @ head.T).float().div_(ctx.cap).tanh_()
            d = torch.exp(tanh * ctx.cap - lse[:, None])
            d.scatter_add_(1, target[:, None], d.new_full((len(d), 1), -1.0))
            d = d.mul_(tanh.square_().neg_().add_(1.0)).mul_(g[:, None]).to(x.dtype)
            of_x.append(d @ head)
            of_head += d.T @ rows
        return torch.cat(of_x), of_head.to(head.dtype), None, None
