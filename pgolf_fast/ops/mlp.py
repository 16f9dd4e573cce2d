"""pgolf::mlp: act(x W_up^T) W_down^T from slots of the two MLP banks (PR 1501; SwiGLU: Shazeer 2020)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import native, reference, tiles
from pgolf_fast.ops.bank_grad import add_matmul, scatter_slots
from pgolf_fast.ops.checks import as_rows, expect_shape, expect_slot, same_dtype_device
from pgolf_fast.ops.tiles import Tile

ACTIVATIONS = ("leaky_relu_squared", "relu_squared", "swiglu")

# Not measured. sm80 also serves GPUs with 99 KiB of shared memory per block, hence the smaller tiles. float32
# products do not run on tensor cores and get fewer columns. mlp_up waits for L2: three blocks of 64 x 128
# would fit, but read twice as much as one of 128 x 256, which costs more than its epilogue.
tiles.declare("mlp_up", sm90=Tile(128, 256, 64, 8, 3), sm80=Tile(128, 128, 32, 8, 3))
tiles.declare("mlp_up_float32", Tile(128, 128, 64, 8, 3))
_DPRE = Tile(128, 128, 32, 8, 3)
tiles.declare("mlp_dpre", sm90=Tile(128, 128, 64, 8, 3), sm80=_DPRE, blocks=2)
# swiglu reads and writes two more tiles: 80 registers; in tiles of 128 x 128, 180, so only one block fits
tiles.declare("mlp_dpre_swiglu", sm90=Tile(128, 64, 64, 8, 3), sm80=_DPRE, blocks=3)


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
    """Compute `act(x up_bank[slot]^T) down_bank[slot]^T`.

    x (..., D); up_bank (slots, M, D), or (slots, 2M, D) with gate and up rows alternating for `swiglu`;
    down_bank (slots, D, M); result (..., D). With `grad_up` and `grad_down` (shaped like the banks, any float
    dtype), backward adds the weight gradients into their slot instead of returning bank-sized gradients.
    Raises ValueError if shapes, dtypes or the slot do not match.
    """
    return torch.ops.pgolf.mlp(x, up_bank, down_bank, slot, activation, grad_up, grad_down)[0]


def _check(x: Tensor, up_bank: Tensor, down_bank: Tensor, slot: int, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"pgolf::mlp: activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    expect_shape("mlp", "up_bank", up_bank, (None, None, x.shape[-1]))
    rows = up_bank.shape[1] // (2 if activation == "swiglu" else 1)
    expect_shape("mlp", "down_bank", down_bank, (up_bank.shape[0], x.shape[-1], rows))
    if activation == "swiglu" and up_bank.shape[1] % 2:
        raise ValueError(f"pgolf::mlp: up_bank has {up_bank.shape[1]} rows; swiglu needs an even number")
    expect_slot("mlp", slot, up_bank.shape[0])
    same_dtype_device("mlp", x=x, up_bank=up_bank, down_bank=down_bank)


@torch.library.custom_op(
    "pgolf::mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor up_bank, Tensor down_bank, SymInt slot, str activation, Tensor? grad_up, "
    "Tensor? grad_down) -> (Tensor, Tensor, Tensor)",
)
def _mlp(x, up_bank, down_bank, slot, activation, grad_up, grad_down) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result and what backward needs: `saved` and `signs`.

    PyTorch saves the pre-activation. The kernels save it only for `swiglu`; otherwise they save the hidden
    layer, whose square root is |leaky(pre)|, and for `leaky_relu_squared` the signs of pre, 32 per word.
    Where that square underflows (float16: |pre| < 2e-4, others: 1e-19), so does the gradient.
    """
    _check(x, up_bank, down_bank, slot, activation)
    run = _forward_cuda if tiles.uses_kernels("mlp", x) else _forward_cpu
    return run(x, up_bank[slot], down_bank[slot], activation)


def _forward_cpu(x: Tensor, up: Tensor, down: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    pre = F.linear(x, up).contiguous()
    out = F.linear(_activate(pre, activation), down).contiguous()
    return out, pre, x.new_empty(0, dtype=torch.int32)


def _empty_saved(x: Tensor, up_rows: int, activation: str) -> tuple[Tensor, Tensor]:
    signed = tiles.uses_kernels("mlp", x) and activation == "leaky_relu_squared"
    signs = x.new_empty((*x.shape[:-1], (up_rows + 31) // 32) if signed else (0,), dtype=torch.int32)
    return x.new_empty(*x.shape[:-1], up_rows), signs


@_mlp.register_fake
def _(x, up_bank, down_bank, slot, activation, grad_up, grad_down):
    _check(x, up_bank, down_bank, slot, activation)
    return x.new_empty(x.shape), *_empty_saved(x, up_bank.shape[1], activation)


def _forward_cuda(x: Tensor, up: Tensor, down: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    from pgolf_fast.kernels.mlp import launch_mlp_up

    saved, signs = _empty_saved(x, up.shape[0], activation)
    gated = activation == "swiglu"
    hidden = x.new_empty(*x.shape[:-1], down.shape[1]) if gated else saved
    if x.numel() and hidden.numel():
        written = saved if gated else signs
        tile = tiles.lookup("mlp_up_float32" if x.dtype == torch.float32 else "mlp_up", x)
        with tiles.on_device_of(x):
            launch_mlp_up(as_rows(x), up, hidden, written, activation, tile)
    return F.linear(hidden, down).contiguous(), saved, signs  # nothing to fuse: cuBLAS


def _activate(pre: Tensor, activation: str) -> Tensor:
    """Compute `reference.activation` without widening where low-precision arithmetic rounds only once."""
    if fused := native.passes("mlp", pre):
        hidden = pre.new_empty(*pre.shape[:-1], pre.shape[-1] // (2 if activation == "swiglu" else 1))
        native.call(fused.activate, pre, hidden, activation)
        return hidden
    if activation == "leaky_relu_squared":
        return F.leaky_relu(pre, 0.5).square_()  # halving is exact
    if activation == "relu_squared":
        return F.relu(pre).square_()
    return reference.activation(pre, activation)


def _activate_backward(dhidden: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of the pre-activation, and the hidden layer."""
    if fused := native.passes("mlp", pre):
        dpre, hidden = pre.new_empty(pre.shape), pre.new_empty(dhidden.shape)
        native.call(fused.activate_backward, dhidden, pre, dpre, hidden, activation)
        return dpre, hidden
    return _dpre_torch(dhidden, pre, activation), _activate(pre, activation)


def _dpre_torch(dhidden: Tensor, pre: Tensor, activation: str) -> Tensor:
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


@torch.library.custom_op(
    "pgolf::mlp_backward",
    mutates_args=("grad_up", "grad_down"),
    schema="(Tensor dout, Tensor x, Tensor saved, Tensor signs, Tensor up_bank, Tensor down_bank, "
    "SymInt slot, str activation, Tensor(a8!)? grad_up, Tensor(a9!)? grad_down) -> (Tensor, Tensor, Tensor)",
)
def _mlp_backward(dout, x, saved, signs, up_bank, down_bank, slot, activation, grad_up, grad_down):
    if tiles.uses_kernels("mlp", x):
        dout = dout.contiguous()  # that of `sum()` has stride 0: its kernel loads 16 bits at a time
        dpre, hidden = _dpre_cuda(dout, saved, signs, down_bank[slot], activation)
    else:
        dpre, hidden = _activate_backward(dout @ down_bank[slot], saved, activation)
    dx = (dpre @ up_bank[slot]).contiguous()
    rows, flat_dpre, flat_x, hidden = (as_rows(t) for t in (dout, dpre, x, hidden))
    if grad_up is None or grad_down is None:
        return dx, flat_dpre.T @ flat_x, rows.T @ hidden
    add_matmul(grad_up, slot, flat_dpre.T, flat_x)
    add_matmul(grad_down, slot, rows.T, hidden)
    return dx, x.new_empty(0), x.new_empty(0)


@_mlp_backward.register_fake
def _(dout, x, saved, signs, up_bank, down_bank, slot, activation, grad_up, grad_down):
    if grad_up is None or grad_down is None:
        return x.new_empty(x.shape), x.new_empty(up_bank.shape[1:]), x.new_empty(down_bank.shape[1:])
    return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)


def _dpre_cuda(dout: Tensor, saved: Tensor, signs, down, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of the pre-activation, and the hidden layer, whose own gradient is never stored."""
    from pgolf_fast.kernels.mlp import launch_mlp_dpre

    gated = activation == "swiglu"
    saved, dpre = saved.contiguous(), saved.new_empty(saved.shape)
    hidden = saved.new_empty(*saved.shape[:-1], down.shape[1]) if gated else saved
    if dout.numel() and hidden.numel():
        tile = tiles.lookup("mlp_dpre_swiglu" if gated else "mlp_dpre", dout)
        with tiles.on_device_of(dout):
            launch_mlp_dpre(as_rows(dout), down, saved, signs.contiguous(), dpre, hidden, activation, tile)
    return dpre, hidden


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up_bank, down_bank, ctx.slot, ctx.activation, ctx.grad_up, ctx.grad_down = inputs
    ctx.save_for_backward(x, *output[1:], up_bank, down_bank)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, saved, signs, up_bank, down_bank = ctx.saved_tensors
    dx, dup, ddown = torch.ops.pgolf.mlp_backward(
        dout, x, saved, signs, up_bank, down_bank, ctx.slot, ctx.activation, ctx.grad_up, ctx.grad_down
    )
    if ctx.grad_up is None or ctx.grad_down is None:
        dup, ddown = (scatter_slots(b, [ctx.slot], [g]) for b, g in ((up_bank, dup), (down_bank, ddown)))
    else:
        dup = ddown = None
    return dx, dup, ddown, None, None, None, None


_mlp.register_autograd(_backward, setup_context=_setup_context)
