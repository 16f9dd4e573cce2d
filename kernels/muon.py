"""Muon's momentum before Newton-Schulz and weight update after it, each in one pass over memory."""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile
from torch import Tensor


@triton.jit
def muon_momentum_kernel(grad_ptr, buffer_ptr, update_ptr, momentum_ptr, n, BLOCK: tl.constexpr):
    """buffer = momentum * buffer + grad; update = grad + momentum * buffer. Rounds where eager does.

    Momentum is read from memory, so that a replayed CUDA graph uses its current value.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    kind = buffer_ptr.dtype.element_ty
    momentum = tl.load(momentum_ptr).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32).to(kind).to(tl.float32)
    buffer = tl.load(buffer_ptr + index, mask=inside, other=0.0).to(tl.float32)
    decayed = (buffer * momentum).to(kind).to(tl.float32)
    rounded = (decayed + grad).to(kind)
    tl.store(buffer_ptr + index, rounded, mask=inside)
    update = grad + rounded.to(tl.float32) * momentum
    tl.store(update_ptr + index, update.to(kind), mask=inside)


@triton.jit
def muon_apply_kernel(
    master_ptr,
    update_ptr,
    shadow_ptr,
    lr_ptr,
    n,
    weight_decay,
    scale,
    HAS_SHADOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """master = (1 - lr * weight_decay) * master - lr * scale * update, and shadow = master, rounded.

    The learning rate is read from memory, so that a replayed CUDA graph uses its current value.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    lr = tl.load(lr_ptr).to(tl.float32)
    master = tl.load(master_ptr + index, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + index, mask=inside, other=0.0).to(tl.float32)
    new = (master * (1.0 - lr * weight_decay) - lr * scale * update).to(master_ptr.dtype.element_ty)
    tl.store(master_ptr + index, new, mask=inside)
    if HAS_SHADOW:
        tl.store(shadow_ptr + index, new.to(tl.float32).to(shadow_ptr.dtype.element_ty), mask=inside)


def launch_muon_momentum(grad: Tensor, buffer: Tensor, update: Tensor, momentum: Tensor, tile: Tile) -> None:
    """Update `buffer` and write `update`: contiguous tensors of one shape; momentum is one float32."""
    block = tile.block_m * tile.block_n
    muon_momentum_kernel[(triton.cdiv(buffer.numel(), block),)](
        grad, buffer, update, momentum, buffer.numel(), BLOCK=block, num_warps=tile.num_warps
    )


def launch_muon_apply(
    master: Tensor,
    update: Tensor,
    shadow: Tensor | None,
    lr: Tensor,
    weight_decay: float,
    scale: float,
    tile: Tile,
) -> None:
    """Update `master` and write `shadow` if given: contiguous tensors of one shape; lr is one float32."""
    block, n = tile.block_m * tile.block_n, master.numel()
    constants = {"HAS_SHADOW": shadow is not None, "BLOCK": block, "num_warps": tile.num_warps}
    muon_apply_kernel[(triton.cdiv(n, block),)](
        master, update, shadow, lr, n, weight_decay, scale, **constants
    )
