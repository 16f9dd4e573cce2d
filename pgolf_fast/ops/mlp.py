"""pgolf::mlp — act(x W_up^T) W_down^T from slots of the two MLP banks (PR 1501; SwiGLU: Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import reference
from pgolf_fast.ops.bank_grad import add_matmul, expect_slot, scatter_slots
from pgolf_fast.ops.checks import expect_shape, same_dtype_device

ACTIVATIONS = ("leaky_relu_squared", "relu_squared", "swiglu")


def mlp(
    x: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    slot: int,
    activation: str,
    *,
    grad_up: Tensor | None = None,
    grad_down: Tensor | None = None,
) -> Tensor:
    """`act(x up_bank[slot]^T) down_bank[slot]^T`.

    x (..., D), up_bank (slots, M, D), or (slots, 2M, D) with gate and up rows alternating for `swiglu`;
    down_bank (slots, D, M); result (..., D). With `grad_up` and `grad_down` (shaped like the banks, any float
    dtype), backward adds the weight gradients into their slot instead of returning bank-sized gradients.
    Raises ValueError for shapes, dtypes or slots that do not fit.
    """
    return torch.ops.pgolf.mlp(x, up_bank, down_bank, slot, activation, grad_up, grad_down)[0]


def _check(x: Tensor, up_bank: Tensor, down_bank: Tensor, slot: int, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"pgolf::mlp: activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    expect_shape("mlp", "up_bank", up_bank, (None, None, x.shape[-1]))
    rows = up_bank.shape[1] // (2 if activation == "swiglu" else 1)
    expect_shape("mlp", "down_bank", down_bank, (up_bank.shape[0], x.shape[-1], rows))
    expect_slot("mlp", slot, up_bank.shape[0])
    same_dtype_device("mlp", x=x, up_bank=up_bank, down_bank=down_bank)


@torch.library.custom_op("pgolf::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    slot: int,
    activation: str,
    grad_up: Tensor | None,
    grad_down: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check(x, up_bank, down_bank, slot, activation)
    pre = F.linear(x, up_bank[slot]).contiguous()
    return F.linear(_activate(pre, activation), down_bank[slot]).contiguous(), pre


@_mlp.register_fake
def _(x, up_bank, down_bank, slot, activation, grad_up, grad_down):
    _check(x, up_bank, down_bank, slot, activation)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], up_bank.shape[1])


def _activate(pre: Tensor, activation: str) -> Tensor:
    """`reference.activation`, without widening where bfloat16 arithmetic rounds only once anyway."""
    if activation == "leaky_relu_squared":
        return F.leaky_relu(pre, 0.5).square_()  # halving is exact
    if activation == "relu_squared":
        return F.relu(pre).square_()
    return reference.activation(pre, activation)


def _activate_backward(dhidden: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "leaky_relu_squared":  # d(leaky(z)^2) = 2 leaky(z) leaky'(z)
        twice = F.leaky_relu(pre, 0.5).mul_(2).mul_(dhidden)
        return torch.ops.aten.leaky_relu_backward(twice, pre, 0.5, False)
    if activation == "relu_squared":
        return F.relu(pre).mul_(2).mul_(dhidden)
    wide = torch.promote_types(pre.dtype, torch.float32)
    gate, up, dhidden = pre[..., 0::2].to(wide), pre[..., 1::2].to(wide), dhidden.to(wide)
    sigmoid = torch.sigmoid(gate)
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))  # silu' = s (1 + g (1 - s))
    return torch.stack((dgate, dhidden * gate * sigmoid), dim=-1).flatten(-2).to(pre.dtype)


@torch.library.custom_op("pgolf::mlp_backward", mutates_args=("grad_up", "grad_down"))
def _mlp_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    slot: int,
    activation: str,
    grad_up: Tensor | None,
    grad_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = dout.reshape(-1, dout.shape[-1])
    dpre = _activate_backward(dout @ down_bank[slot], pre, activation)
    hidden = _activate(pre, activation).flatten(0, -2)
    flat_dpre, flat_x = dpre.reshape(-1, dpre.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (dpre @ up_bank[slot]).contiguous()
    if grad_up is None or grad_down is None:
        return dx, flat_dpre.T @ flat_x, rows.T @ hidden
    add_matmul(grad_up, slot, flat_dpre.T, flat_x)
    add_matmul(grad_down, slot, rows.T, hidden)
    return dx, x.new_empty(0), x.new_empty(0)


@_mlp_backward.register_fake
def _(dout, x, pre, up_bank, down_bank, slot, activation, grad_up, grad_down):
    if grad_up is None or grad_down is None:
        return x.new_empty(x.shape), x.new_empty(up_bank.shape[1:]), x.new_empty(down_bank.shape[1:])
    return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    x, up_bank, down_bank, ctx.slot, ctx.activation, ctx.grad_up, ctx.grad_down = inputs
    ctx.save_for_backward(x, output[1], up_bank, down_bank)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    x, pre, up_bank, down_bank = ctx.saved_tensors
    dx, dup, ddown = torch.ops.pgolf.mlp_backward(
        dout, x, pre, up_bank, down_bank, ctx.slot, ctx.activation, ctx.grad_up, ctx.grad_down
    )
    if ctx.grad_up is None or ctx.grad_down is None:
        dup, ddown = (scatter_slots(b, [ctx.slot], [g]) for b, g in ((up_bank, dup), (down_bank, ddown)))
    else:
        dup = ddown = None
    return dx, dup, ddown, None, None, None, None


_mlp.register_autograd(_backward, setup_context=_setup_context)
