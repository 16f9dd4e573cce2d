"""How a bank-indexed op hands back the gradient of one slot.

With a gradient bank, the backward op adds into its slot and autograd is told there is nothing left to do.
Without one (gradcheck, one-off gradients), autograd gets a bank-sized tensor that is zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf_fast.ops import launch
from pgolf_fast.ops.launch import Launch

launch.declare(
    "weight_grad",
    sm90=Launch(128, 128, 64, num_warps=8, num_stages=3),
    sm80=Launch(128, 128, 32, num_warps=8, num_stages=3),
)
launch.declare("weight_grad_sum", sm90=Launch(16, 128, 32, num_warps=4, num_stages=1))

# A program sums at least this many blocks of rows; for fewer it would not be worth writing a part.
_LEAST_BLOCKS = 8


def add_matmul(grad_bank: Tensor, slot: int, left: Tensor, right: Tensor) -> None:
    """grad_bank[slot] += left @ right, in the gradient bank's dtype.

    The Triton kernels round the product only when it has been added; PyTorch rounds it to the dtype of `left`
    first, where that is not the bank's.
    """
    if launch.uses_kernels("weight_grad", left):
        return _add_matmul_kernels(grad_bank[slot], left, right)
    if left.dtype == grad_bank.dtype:
        grad_bank[slot].addmm_(left, right)
    else:
        grad_bank[slot].add_(left @ right)


def _add_matmul_kernels(grad: Tensor, left: Tensor, right: Tensor) -> None:
    from pgolf_fast.kernels.weight_grad import launch_weight_grad, launch_weight_grad_sum

    if grad.numel() == 0 or left.shape[1] == 0:
        return
    tiles = launch.launch("weight_grad", left)
    depth_a_split = _depth_a_split(grad, left.shape[1], tiles)
    splits = -(-left.shape[1] // depth_a_split)
    with launch.on_device_of(grad):
        if splits == 1:
            return launch_weight_grad(left, right, grad, None, depth_a_split, tiles)
        partial = grad.new_empty((splits, *grad.shape), dtype=torch.float32)
        launch_weight_grad(left, right, grad, partial, depth_a_split, tiles)
        launch_weight_grad_sum(partial, grad, launch.launch("weight_grad_sum", grad))


def _depth_a_split(grad: Tensor, depth: int, tiles: Launch) -> int:
    """Rows each program sums, in whole blocks: as few as it takes for every multiprocessor to have a program.

    It depends on shapes and the GPU alone, and the parts are added in order, so the result is reproducible.
    """
    programs = -(-grad.shape[0] // tiles.block_m) * -(-grad.shape[1] // tiles.block_n)
    blocks = -(-depth // tiles.block_k)
    splits = max(1, min(_multiprocessors(grad.device) // programs, blocks // _LEAST_BLOCKS))
    return -(-blocks // splits) * tiles.block_k


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # compiled for an H100 without one, or interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


def scatter_slots(bank: Tensor, slots: Sequence[int], grads: Sequence[Tensor] | Tensor) -> Tensor:
    """A gradient for the whole bank from the gradients of some of its slots."""
    full = torch.zeros_like(bank)
    for slot, grad in zip(slots, grads, strict=True):
        full[slot] = grad
    return full


def expect_slot(op: str, slot: int, slots: int) -> None:
    """Raise ValueError unless `slot` names one of the bank's layers."""
    if not 0 <= slot < slots:
        raise ValueError(f"pgolf::{op}: slot is {slot}, but the bank has layers 0 to {slots - 1}")
