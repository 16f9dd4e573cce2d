"""pgolf::residual_norm: scaled residual sum and its scaled RMS norm; pgolf::rms_norm; pgolf::smear_gate.

Sources: PR 1501 (residual mix with x0, layer scale, SmearGate), Zhang & Sennrich 2019 (RMS norm).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import checks, native, reference, tiles
from pgolf_fast.ops.checks import as_rows, dense, expect_shape, same_device, unit_inner_stride
from pgolf_fast.ops.tiles import Tile

# Not measured; bound by memory. block_n of residual_norm is the widest row kept in registers.
for _kernel in ("fwd", "bwd"):
    tiles.declare(f"residual_norm_{_kernel}", Tile(4, 4096, num_warps=4))
    tiles.declare(f"smear_gate_{_kernel}", Tile(16, 128, num_warps=4))

# Programs that share the rows of a backward, each with its own partial sums of the per-channel gradients:
# eight per multiprocessor of an H100 or H200.
_PROGRAMS = 1056
_MIN_ROWS = 8  # per program; with fewer, partial sums would dominate


def residual_norm(
    x: Tensor, branch: Tensor, x_scale: Tensor | None, branch_scale: Tensor, layer_scale: float
) -> tuple[Tensor, Tensor]:
    """Return `mixed = x_scale * x + branch_scale * branch` and `layer_scale * rms_norm(mixed)`.

    x and branch (..., D) of one dtype; scales (D,) of any float dtype, x_scale None meaning 1. Both results
    are (..., D) in x's dtype; the norm is taken of `mixed` as rounded. Raises ValueError if shapes, dtypes
    or devices do not match.
    """
    mixed, normed, _ = torch.ops.pgolf.residual_norm(x, branch, x_scale, branch_scale, layer_scale)
    return mixed, normed


def _check(x: Tensor, branch: Tensor, x_scale: Tensor | None, branch_scale: Tensor) -> None:
    expect_shape("residual_norm", "branch", branch, tuple(x.shape))
    checks.same_dtype_device("residual_norm", x=x, branch=branch)
    for name, scale in (("x_scale", x_scale), ("branch_scale", branch_scale)):
        if scale is not None:
            expect_shape("residual_norm", name, scale, (x.shape[-1],))
            same_device("residual_norm", x=x, **{name: scale})


@torch.library.custom_op("pgolf::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, branch: Tensor, x_scale: Tensor | None, branch_scale: Tensor, layer_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, branch, x_scale, branch_scale)
    run = _forward_cuda if tiles.uses_kernels("residual_norm", x) else _forward_cpu
    return run(x, branch, x_scale, branch_scale, layer_scale)


def _float32(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float()


def _forward_cpu(x, branch, x_scale, branch_scale, layer_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if fused := native.passes("residual_norm", x):
        mixed, normed = x.new_empty(x.shape), x.new_empty(x.shape)
        rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        operands = (x, branch, _float32(x_scale), branch_scale.float(), mixed, normed, rstd)
        native.call(fused.residual_norm, *operands, layer_scale)
        return mixed, normed, rstd
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed = torch.mul(branch, branch_scale.to(wide))
    mixed = mixed.add_(x) if x_scale is None else mixed.addcmul_(x.to(wide), x_scale.to(wide))
    mixed = mixed.to(x.dtype)
    values = mixed.to(wide)
    rstd = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(max(x.shape[-1], 1)).add_(reference.RMS_EPS).rsqrt_()
    return mixed.contiguous(), (values * (rstd * layer_scale)).to(x.dtype).contiguous(), rstd.contiguous()


@_residual_norm.register_fake
def _(x, branch, x_scale, branch_scale, layer_scale):
    _check(x, branch, x_scale, branch_scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=wide)


def _partials(rows: int) -> int:
    """Return how many programs, each with a partial sum, share a backward over `rows` rows."""
    return max(1, min(_PROGRAMS, rows // _MIN_ROWS))


def _forward_cuda(x, branch, x_scale, branch_scale, layer_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    from pgolf_fast.kernels.residual_norm import launch_residual_norm_fwd

    mixed, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    if not x.numel():
        return mixed, normed, rstd.fill_(reference.RMS_EPS**-0.5)
    inputs = (as_rows(x), as_rows(branch), dense(x_scale), dense(branch_scale))
    options = {"layer_scale": layer_scale, "eps": reference.RMS_EPS}
    with tiles.on_device_of(x):
        tile = tiles.lookup("residual_norm_fwd", x)
        launch_residual_norm_fwd(*inputs, mixed, normed, rstd, **options, tile=tile)
    return mixed, normed, rstd


@torch.library.custom_op(
    "pgolf::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor dmixed, Tensor dnormed, Tensor x, Tensor branch, Tensor? x_scale, Tensor branch_scale, "
    "Tensor mixed, Tensor rstd, float layer_scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _residual_norm_backward(dmixed, dnormed, x, branch, x_scale, branch_scale, mixed, rstd, layer_scale):
    run = _backward_cuda if tiles.uses_kernels("residual_norm", x) else _backward_cpu
    return run(dmixed, dnormed, (x, branch, x_scale, branch_scale, mixed, rstd), layer_scale)


# x, branch, x_scale, branch_scale, mixed, rstd
_Saved = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, branch, x_scale (empty without one), branch_scale


def _backward_pass(fused, dmixed: Tensor, dnormed: Tensor, saved: _Saved, layer_scale: float) -> _Gradients:
    x, branch, x_scale, branch_scale, mixed, rstd = saved
    dx, dbranch = x.new_empty(x.shape), x.new_empty(x.shape)
    sums = rstd.new_empty(1 if x_scale is None else 2, x.shape[-1])
    inputs = (dmixed, dnormed, x, branch, _float32(x_scale), branch_scale.float(), mixed, rstd)
    native.call(fused.residual_norm_backward, *inputs, dx, dbranch, sums, layer_scale)
    return dx, dbranch, sums.new_empty(0) if x_scale is None else sums[1].clone(), sums[0].clone()


def _backward_cpu(dmixed: Tensor, dnormed: Tensor, saved: _Saved, layer_scale: float) -> _Gradients:
    if fused := native.passes("residual_norm", mixed := saved[4]):
        return _backward_pass(fused, dmixed, dnormed, saved, layer_scale)
    x, branch, x_scale, branch_scale, _, rstd = saved
    wide = rstd.dtype
    unit = mixed.to(wide) * rstd
    # d rms_norm = rstd (g - unit mean(g unit)), where g is the gradient of the normalized value
    grad = dnormed.to(wide) * layer_scale
    along = (grad * unit).mean(-1, keepdim=True)
    total = grad.sub_(unit.mul_(along)).mul_(rstd).add_(dmixed)
    rows = total.reshape(-1, total.shape[-1])
    dbranch_scale = (rows * branch.reshape(rows.shape)).sum(0)
    dbranch = (total * branch_scale.to(wide)).to(x.dtype).contiguous()
    if x_scale is None:
        return total.to(x.dtype, copy=True).contiguous(), dbranch, total.new_empty(0), dbranch_scale
    dx_scale = (rows * x.reshape(rows.shape)).sum(0)
    return (total * x_scale.to(wide)).to(x.dtype).contiguous(), dbranch, dx_scale, dbranch_scale


@_residual_norm_backward.register_fake
def _(dmixed, dnormed, x, branch, x_scale, branch_scale, mixed, rstd, layer_scale):
    dx_scale = rstd.new_empty(0 if x_scale is None else x.shape[-1])
    return x.new_empty(x.shape), x.new_empty(x.shape), dx_scale, rstd.new_empty(x.shape[-1])


def _backward_cuda(dmixed: Tensor, dnormed: Tensor, saved: _Saved, layer_scale: float) -> _Gradients:
    x, branch, x_scale, branch_scale, mixed, rstd = saved
    from pgolf_fast.kernels import residual_norm as kernels

    width, vectors = x.shape[-1], 1 if x_scale is None else 2
    dx, dbranch = x.new_empty(x.shape), x.new_empty(x.shape)
    if not x.numel():
        sums = rstd.new_zeros(vectors, width)
    else:
        tile = tiles.lookup("residual_norm_bwd", x)
        options: dict[str, Any] = {"layer_scale": layer_scale, "tile": tile}
        dmixed, dnormed, mixed = as_rows(dmixed), as_rows(dnormed), mixed.contiguous().view(-1, width)
        rstd, along = rstd.contiguous(), None
        partial = rstd.new_empty(vectors, _partials(len(mixed)), width)
        with tiles.on_device_of(x):
            if not kernels.fits_tile(width, tile):
                along = torch.empty_like(rstd)
                kernels.launch_residual_norm_bwd_mean(dnormed, mixed, rstd, along, **options)
            inputs = (dmixed, dnormed, as_rows(x), as_rows(branch), dense(x_scale), dense(branch_scale))
            kernels.launch_residual_norm_bwd(*inputs, mixed, rstd, along, dx, dbranch, partial, **options)
        sums = partial.sum(1)
    return dx, dbranch, sums[1].clone() if vectors == 2 else sums.new_empty(0), sums[0].clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, x_scale, branch_scale, ctx.layer_scale = inputs
    mixed, _, rstd = output
    ctx.save_for_backward(x, branch, x_scale, branch_scale, mixed, rstd)
    ctx.mark_non_differentiable(rstd)


def _backward(ctx: Any, dmixed: Tensor, dnormed: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, branch, x_scale, branch_scale, mixed, rstd = ctx.saved_tensors
    dx, dbranch, dx_scale, dbranch_scale = torch.ops.pgolf.residual_norm_backward(
        dmixed, dnormed, x, branch, x_scale, branch_scale, mixed, rstd, ctx.layer_scale
    )
    dx_scale = None if x_scale is None else dx_scale.to(x_scale.dtype)
    return dx, dbranch, dx_scale, dbranch_scale.to(branch_scale.dtype), None


_residual_norm.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(x: Tensor) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps)` over the last dimension, (..., D), without a gain.

    Where no pass runs, on a GPU for one, these are PyTorch's own ops, which torch.compile fuses with others.
    """
    checks.expect_floating("rms_norm", "x", x)
    if native.passes("residual_norm", x):
        return torch.ops.pgolf.rms_norm(x)[0]
    return reference.rms_norm(x).contiguous()


@torch.library.custom_op("pgolf::rms_norm", mutates_args=())
def _rms_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result and 1 / sqrt(...), (..., 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if fused := native.passes("residual_norm", x):
        normed, rstd = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=wide)
        native.call(fused.residual_norm, x, None, None, None, None, normed, rstd, 1.0)
        return normed, rstd
    rstd = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + reference.RMS_EPS)
    return (x * rstd).to(x.dtype).contiguous(), rstd.contiguous()


@_rms_norm.register_fake
def _(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=wide)


@torch.library.custom_op("pgolf::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dout: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    if fused := native.passes("residual_norm", x):
        dx = x.new_empty(x.shape)
        nothing = (None, None, None, None)
        native.call(fused.residual_norm_backward, None, dout, *nothing, x, rstd, dx, None, None, 1.0)
        return dx
    unit = x * rstd
    along = (dout * unit).mean(-1, keepdim=True)
    return ((dout - unit * along) * rstd).to(x.dtype).contiguous()


@_rms_norm_backward.register_fake
def _(dout, x, rstd):
    return x.new_empty(x.shape)


def _setup_rms_norm(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


_rms_norm.register_autograd(
    lambda ctx, dout, _: torch.ops.pgolf.rms_norm_backward(dout, *ctx.saved_tensors),
    setup_context=_setup_rms_norm,
)


def _check_smear(x: Tensor, gate: Tensor) -> None:
    expect_shape("smear_gate", "x", x, (None, None, None))
    expect_shape("smear_gate", "gate", gate, (x.shape[-1],))
    checks.expect_floating("smear_gate", "x", x)
    same_device("smear_gate", x=x, gate=gate)


@torch.library.custom_op("pgolf::smear_gate", mutates_args=())
def smear_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Return `(1 - s) x_t + s x_{t-1}` with `s = sigmoid(gate)` per channel and `x_{-1} = 0`.

    x (B, T, D), gate (D,); the result is like x. Raises ValueError if shapes or devices do not match.
    """
    _check_smear(x, gate)
    if tiles.uses_kernels("smear_gate", x):
        return _smear_forward_cuda(x, gate)
    if fused := native.passes("smear_gate", x):
        out = x.new_empty(x.shape)
        native.call(fused.smear_gate, x, torch.sigmoid(gate.float()), out)
        return out
    return reference.smear_gate(x, gate).contiguous()


@smear_gate.register_fake
def _(x, gate):
    _check_smear(x, gate)
    return x.new_empty(x.shape)


def _smear_forward_cuda(x: Tensor, gate: Tensor) -> Tensor:
    from pgolf_fast.kernels.smear_gate import launch_smear_gate_fwd

    out = x.new_empty(x.shape)
    if x.numel():
        with tiles.on_device_of(x):
            tile = tiles.lookup("smear_gate_fwd", x)
            launch_smear_gate_fwd(unit_inner_stride(x), gate.contiguous(), out, tile)
    return out


def _smear_backward_cuda(dout: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from pgolf_fast.kernels.smear_gate import launch_smear_gate_bwd

    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros(gate.shape, dtype=gate.dtype, device=gate.device)
    partial = x.new_empty(_partials(x.shape[0] * x.shape[1]), x.shape[2], dtype=torch.float32)
    dout, x = unit_inner_stride(dout), unit_inner_stride(x)
    with tiles.on_device_of(x):
        launch_smear_gate_bwd(dout, x, gate.contiguous(), dx, partial, tiles.lookup("smear_gate_bwd", x))
    return dx, partial.sum(0).to(gate.dtype)


@torch.library.custom_op("pgolf::smear_gate_backward", mutates_args=())
def _smear_gate_backward(dout: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    run = _smear_backward_cuda if tiles.uses_kernels("smear_gate", x) else _smear_backward_cpu
    return run(dout, x, gate)


def _smear_backward_cpu(dout: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    s = torch.sigmoid(gate.to(wide))
    if fused := native.passes("smear_gate", x):
        dx, change = x.new_empty(x.shape), s.new_empty(s.shape)
        native.call(fused.smear_gate_backward, dout, x, s, dx, change)
        return dx, change.mul_(s * (1 - s)).to(gate.dtype)
    dout, values = dout.to(wide), x.to(wide)
    dx = (1 - s) * dout + s * F.pad(dout[:, 1:], (0, 0, 0, 1))
    change = F.pad(values[:, :-1], (0, 0, 1, 0)) - values
    dgate = (dout * change).sum((0, 1)) * s * (1 - s)
    return dx.to(x.dtype).contiguous(), dgate.to(gate.dtype)


@_smear_gate_backward.register_fake
def _(dout, x, gate):
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _smear_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.pgolf.smear_gate_backward(dout, *ctx.saved_tensors)


smear_gate.register_autograd(
    _smear_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
