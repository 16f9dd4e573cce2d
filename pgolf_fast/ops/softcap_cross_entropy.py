"""pgolf::softcap_cross_entropy — tied head, softcap and cross-entropy without the logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.ops.checks import expect_shape, same_dtype_device

_ROWS = 4096  # rows of logits alive at once: 16 MB at vocabulary 1024


def softcap_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Per-token `-log softmax(softcap * tanh(x W^T / softcap))[target]`, float32 (float64 for float64 input).

    x (..., D), weight (V, D) of x's dtype, targets (...) integer in 0..V-1; result has targets' shape.
    Raises ValueError for shapes or dtypes that do not fit; IndexError for a target outside the vocabulary.
    """
    expect_shape("softcap_cross_entropy", "targets", targets, tuple(x.shape[:-1]))
    flat = torch.ops.pgolf.softcap_cross_entropy(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), softcap
    )
    return flat[0].view(targets.shape)


def _check(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> None:
    expect_shape("softcap_cross_entropy", "weight", weight, (None, x.shape[-1]))
    expect_shape("softcap_cross_entropy", "targets", targets, (x.shape[0],))
    same_dtype_device("softcap_cross_entropy", x=x, weight=weight)
    if not softcap > 0:
        raise ValueError(f"pgolf::softcap_cross_entropy: softcap is {softcap}; it must be positive")


def _capped(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """tanh(x W^T / softcap) in at least float32, for some rows."""
    raw = x @ weight.T
    return raw.to(torch.promote_types(raw.dtype, torch.float32)).div_(softcap).tanh_()


@torch.library.custom_op("pgolf::softcap_cross_entropy", mutates_args=())
def _softcap_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    _check(x, weight, targets, softcap)
    outside = targets[(targets < 0) | (targets >= weight.shape[0])]
    if len(outside):
        raise IndexError(
            f"pgolf::softcap_cross_entropy: targets hold {outside[0].item()}, "
            f"but the vocabulary has ids 0 to {weight.shape[0] - 1}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    loss, logsumexp = x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=wide)
    for start in range(0, x.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        logits = _capped(x[rows], weight, softcap).mul_(softcap)
        chosen = logits.gather(1, targets[rows].long().unsqueeze(1)).squeeze(1)
        # |logit| <= softcap, so the exponentials cannot overflow below softcap 88
        logsumexp[rows] = logits.exp_().sum(1).log_() if softcap < 80 else logits.logsumexp(1)
        loss[rows] = logsumexp[rows] - chosen
    return loss, logsumexp


@_softcap_cross_entropy.register_fake
def _(x, weight, targets, softcap):
    _check(x, weight, targets, softcap)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=wide)


@torch.library.custom_op("pgolf::softcap_cross_entropy_backward", mutates_args=())
def _softcap_cross_entropy_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, logsumexp: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    accumulator = weight.new_zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for start in range(0, x.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        tanh = _capped(x[rows], weight, softcap)
        # d loss / d raw = (softmax - onehot) (1 - tanh^2)
        grad = torch.exp(tanh * softcap - logsumexp[rows].unsqueeze(1))
        ones = grad.new_full((grad.shape[0], 1), -1.0)
        grad.scatter_add_(1, targets[rows].long().unsqueeze(1), ones)
        grad.mul_(tanh.square_().neg_().add_(1.0)).mul_(dloss[rows].unsqueeze(1))
        low = grad.to(x.dtype)
        dx[rows] = low @ weight
        accumulator += low.T @ x[rows]
    return dx, accumulator.to(weight.dtype)


@_softcap_cross_entropy_backward.register_fake
def _(dloss, x, weight, targets, logsumexp, softcap):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, ctx.softcap = inputs
    ctx.save_for_backward(x, weight, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dloss, _):
    x, weight, targets, logsumexp = ctx.saved_tensors
    dx, dweight = torch.ops.pgolf.softcap_cross_entropy_backward(
        dloss, x, weight, targets, logsumexp, ctx.softcap
    )
    return dx, dweight, None, None


_softcap_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
