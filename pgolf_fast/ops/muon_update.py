"""pgolf::muon_momentum, pgolf::muon_apply: Muon's steps before and after Newton-Schulz, in place (PR 1501).

Momentum and learning rate are numbers or one-element tensors. A tensor on the GPU is read by the kernel, so
nothing synchronizes and a captured CUDA graph replays with the current value.
Both ops are for the optimizer: no autograd is registered.
"""

import torch
from torch import Tensor

from pgolf_fast.ops import tiles
from pgolf_fast.ops.checks import expect_floating, expect_shape, same_device
from pgolf_fast.ops.tiles import Tile

# Not measured; bound by memory.
tiles.declare("muon_momentum", Tile(16, 128, num_warps=8))
tiles.declare("muon_apply", Tile(16, 128, num_warps=8))


def muon_momentum(grad: Tensor, buffer: Tensor, momentum: float | Tensor) -> Tensor:
    """Update `buffer = momentum * buffer + grad` in place and return `grad + momentum * buffer` (Nesterov).

    grad (any float dtype) is first rounded to the buffer's dtype, in which every product and sum is rounded
    too (bfloat16 in training), as in PR 1501. The result is like buffer, contiguous.
    Raises ValueError if shapes or devices do not match.
    """
    return torch.ops.pgolf.muon_momentum(grad, buffer, _as_tensor(momentum))


def muon_apply(
    master: Tensor,
    update: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float,
    scale: float,
    shadow: Tensor | None = None,
) -> None:
    """Update `master = (1 - lr * weight_decay) * master - lr * scale * update` in place.

    With `shadow` (master's shape, any float dtype), the new weights are also written there, rounded.
    Raises ValueError if shapes or devices do not match.
    """
    torch.ops.pgolf.muon_apply(master, update, shadow, _as_tensor(lr), weight_decay, scale)


def _as_tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _check(op: str, name: str, value: Tensor, **given: Tensor | None) -> None:
    tensors = {key: tensor for key, tensor in given.items() if tensor is not None}
    (first, like), *others = tensors.items()
    expect_floating(op, first, like)
    for other, tensor in others:
        expect_shape(op, other, tensor, tuple(like.shape))
        expect_floating(op, other, tensor)
    same_device(op, **tensors)
    expect_floating(op, name, value)
    if value.numel() != 1:
        raise ValueError(f"pgolf::{op}: {name} has {value.numel()} elements, but one is needed")
    if value.device not in (torch.device("cpu"), like.device):
        raise ValueError(f"pgolf::{op}: {name}.device is {value.device}, but {first}.device is {like.device}")


@torch.library.custom_op("pgolf::muon_momentum", mutates_args=("buffer",))
def _muon_momentum(grad: Tensor, buffer: Tensor, momentum: Tensor) -> Tensor:
    _check("muon_momentum", "momentum", momentum, buffer=buffer, grad=grad)
    run = _momentum_cuda if tiles.uses_kernels("muon", buffer) else _momentum_cpu
    return run(grad, buffer, momentum)


def _momentum_cpu(grad: Tensor, buffer: Tensor, momentum: Tensor) -> Tensor:
    low = grad.to(buffer.dtype, copy=True, memory_format=torch.contiguous_format)
    if momentum.device.type != "cpu":
        return _momentum_unread(low, buffer, momentum.reshape(()))
    share = momentum.item()
    buffer.mul_(share).add_(low)
    return low.add_(buffer, alpha=share)


def _momentum_unread(low: Tensor, buffer: Tensor, momentum: Tensor) -> Tensor:
    """Compute momentum without reading the number on the host, which would synchronize with the GPU."""
    wide = torch.promote_types(buffer.dtype, torch.float32)
    buffer.copy_(buffer.to(wide) * momentum.to(wide)).add_(low)
    return (low.to(wide) + buffer.to(wide) * momentum.to(wide)).to(buffer.dtype)


@_muon_momentum.register_fake
def _(grad, buffer, momentum):
    _check("muon_momentum", "momentum", momentum, buffer=buffer, grad=grad)
    return torch.empty_like(buffer, memory_format=torch.contiguous_format)


@torch.library.custom_op("pgolf::muon_apply", mutates_args=("master", "shadow"))
def _muon_apply(
    master: Tensor, update: Tensor, shadow: Tensor | None, lr: Tensor, weight_decay: float, scale: float
) -> None:
    _check("muon_apply", "lr", lr, master=master, update=update, shadow=shadow)
    kernels = tiles.uses_kernels("muon", master) and tiles.uses_kernels("muon", update)
    (_apply_cuda if kernels else _apply_cpu)(master, update, shadow, lr, weight_decay, scale)


def _apply_cpu(master, update, shadow, lr, weight_decay: float, scale: float) -> None:
    if lr.device.type == "cpu":
        rate = lr.item()
        master.mul_(1 - rate * weight_decay)
        master.add_(update.to(master.dtype), alpha=-rate * scale)
    else:
        _apply_unread(master, update, lr.reshape(()), weight_decay, scale)
    if shadow is not None:
        shadow.copy_(master)


@_muon_apply.register_fake
def _(master, update, shadow, lr, weight_decay, scale):
    _check("muon_apply", "lr", lr, master=master, update=update, shadow=shadow)


def _apply_unread(master: Tensor, update: Tensor, lr: Tensor, weight_decay: float, scale: float) -> None:
    wide = torch.promote_types(master.dtype, torch.float32)
    lr = lr.to(wide)
    master.copy_(master.to(wide) * (1 - lr * weight_decay) - update.to(wide) * (lr * scale))


def _momentum_cuda(grad: Tensor, buffer: Tensor, momentum: Tensor) -> Tensor:
    from pgolf_fast.kernels.muon import launch_muon_momentum

    update = torch.empty_like(buffer, memory_format=torch.contiguous_format)
    if buffer.numel() == 0:
        return update
    dense, share = buffer.contiguous(), _on_device(momentum, buffer)
    with tiles.on_device_of(buffer):
        launch_muon_momentum(grad.contiguous(), dense, update, share, tiles.lookup("muon_momentum", buffer))
    _write_back(buffer, dense)
    return update


def _apply_cuda(master, update, shadow, lr, weight_decay: float, scale: float) -> None:
    from pgolf_fast.kernels.muon import launch_muon_apply

    if master.numel() == 0:
        return
    dense, rate = master.contiguous(), _on_device(lr, master)
    dense_shadow = None if shadow is None else shadow.contiguous()
    with tiles.on_device_of(master):
        tile = tiles.lookup("muon_apply", master)
        launch_muon_apply(dense, update.contiguous(), dense_shadow, rate, weight_decay, scale, tile)
    _write_back(master, dense)
    if shadow is not None and dense_shadow is not None:
        _write_back(shadow, dense_shadow)


def _on_device(value: Tensor, like: Tensor) -> Tensor:
    """Return one float32 on the device of `like`; a fill from the CPU does not synchronize."""
    if value.device == like.device:
        return value.float()
    return torch.full((), value.item(), dtype=torch.float32, device=like.device)


def _write_back(tensor: Tensor, dense: Tensor) -> None:
    """Copy the contiguous memory that kernels wrote into a strided original."""
    if dense.data_ptr() != tensor.data_ptr():
        tensor.copy_(dense)
