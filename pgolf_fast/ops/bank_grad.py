"""Gradients of bank slots: the return path shared by the bank-indexed ops.

With a gradient bank, the backward op adds into its slot and returns nothing to autograd. Without one
(gradcheck, one-off gradients), autograd gets a bank-sized tensor that is zero in the other slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf_fast.ops import tiles
from pgolf_fast.ops.tiles import Tile

# Not measured. sm80 also serves GPUs with 99 KiB of shared memory per block, hence half of block_k.
tiles.declare("weight_grad", sm90=Tile(128, 128, 64, 8, 3), sm80=Tile(128, 128, 32, 8, 3), blocks=2)
# Bound by memory: reads the parts once and adds them; nothing to pipeline.
tiles.declare("weight_grad_sum", Tile(16, 128, 32, 4, 1))

# Minimum blocks of rows that one program sums; with fewer, writing a partial sum would dominate.
_MIN_BLOCKS = 8


def add_matmul(grad_bank: Tensor, slot: int, left: Tensor, right: Tensor) -> None:
    """Compute `grad_bank[slot] += left @ right` in the gradient bank's dtype.

    left (rows, n), right (n, columns) of one dtype; grad_bank (slots, rows, columns) of any float dtype. On a
    GPU, 16-bit products are rounded once, after the addition. On a CPU, they are rounded to the dtype of
    `left` first, unless the bank has the same dtype.
    """
    if grad_bank.numel() == 0 or left.shape[1] == 0:
        return
    if tiles.uses_kernels("weight_grad", left):
        _add_matmul_triton(grad_bank[slot], left, right)
    elif left.dtype == grad_bank.dtype:
        grad_bank[slot].addmm_(left, right)
    else:
        grad_bank[slot].add_(product(left, right))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Compute `left @ right` of two matrices; on a GPU, the product of 16-bit ones is float32."""
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _add_matmul_triton(grad: Tensor, left: Tensor, right: Tensor) -> None:
    from pgolf_fast.kernels.weight_grad import launch_weight_grad, launch_weight_grad_sum

    tile = tiles.lookup("weight_grad", left)
    depth_per_split = _depth_per_split(grad, left.shape[1], tile)
    splits = -(-left.shape[1] // depth_per_split)
    with tiles.on_device_of(grad):
        if splits == 1:
            return launch_weight_grad(left, right, grad, None, depth_per_split, tile)
        partial = grad.new_empty((splits, *grad.shape), dtype=torch.float32)
        launch_weight_grad(left, right, grad, partial, depth_per_split, tile)
        launch_weight_grad_sum(partial, grad, tiles.lookup("weight_grad_sum", grad))


def _depth_per_split(grad: Tensor, depth: int, tile: Tile) -> int:
    """Return the rows that one program sums, in whole blocks: few enough to fill every processor.

    Depends on shapes and the GPU alone, and the parts are added in order, so the result is reproducible.
    """
    programs = -(-grad.shape[0] // tile.block_m) * -(-grad.shape[1] // tile.block_n)
    blocks = -(-depth // tile.block_k)
    processors = 132  # an H100's: compiled ahead of time, or interpreted
    if grad.is_cuda:
        processors = torch.cuda.get_device_properties(grad.device).multi_processor_count
    splits = max(1, min(tiles.per_sm["weight_grad"] * processors // programs, blocks // _MIN_BLOCKS))
    return -(-blocks // splits) * tile.block_k


def scatter_slots(bank: Tensor, slots: Sequence[int], grads: Sequence[Tensor] | Tensor) -> Tensor:
    """Return a bank-sized gradient that holds `grads` in `slots` and zeros elsewhere."""
    full = torch.zeros_like(bank)
    for slot, grad in zip(slots, grads, strict=True):
        full[slot] = grad
    return full
