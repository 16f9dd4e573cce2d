"""grad += A^T B, summed over very many rows: there are few output tiles, so programs split the rows, too."""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, dot_tile, halves, launch_options, tile_count, tile_of
from torch import Tensor


@triton.jit
def _add_to(ptrs, value, mask):
    """*ptrs += value (float32), added in float32, or in float64 where memory is float64."""
    before = tl.load(ptrs, mask=mask, other=0.0)
    if ptrs.dtype.element_ty == tl.float64:
        total = before + value.to(tl.float64)
    else:
        total = before.to(tl.float32) + value
    tl.store(ptrs, total.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    out_rows,
    out_cols,
    depth,
    depth_per_split,
    a_strides,
    b_strides,
    out_strides,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of a b over the depth of one split, stored in out[split].

    With ADD there is one split, which is added to out.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(out_cols, BLOCK_N)
    tiles = tl.cdiv(out_rows, BLOCK_M) * tiles_n
    split = pid // tiles  # neighbors read the same rows of a and b
    tile = pid % tiles
    row, col = tile_of(tile, out_cols, BLOCK_M, BLOCK_N)
    first = split * depth_per_split
    own = tl.minimum(depth - first, depth_per_split).to(tl.int32)
    a_ptr += first * a_strides[1]
    b_ptr += first * b_strides[0]
    transposed = (b_strides[1], b_strides[0])
    acc = dot_tile(a_ptr, b_ptr, row, col, out_rows, out_cols, own, a_strides, transposed, BLOCK_K)
    row_ptrs = out_ptr + split * out_strides[0] + row[:, None] * out_strides[1]
    if ADD:
        left, right = halves(acc)
        half = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        mask = (row[:, None] < out_rows) & (half[None, :] < out_cols)
        _add_to(row_ptrs + half[None, :] * out_strides[2], left, mask)
        half += BLOCK_N // 2
        mask = (row[:, None] < out_rows) & (half[None, :] < out_cols)
        _add_to(row_ptrs + half[None, :] * out_strides[2], right, mask)
    else:
        mask = (row[:, None] < out_rows) & (col[None, :] < out_cols)
        tl.store(row_ptrs + col[None, :] * out_strides[2], acc, mask=mask)


@triton.jit
def weight_grad_sum_kernel(
    partial_ptr,
    grad_ptr,
    splits,
    out_rows,
    out_cols,
    grad_strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of grad += partial[0] + partial[1] + ..., in this order."""
    pid = tl.program_id(0).to(tl.int64)
    row, col = tile_of(pid, out_cols, BLOCK_M, BLOCK_N)
    mask = (row[:, None] < out_rows) & (col[None, :] < out_cols)
    partial_ptrs = partial_ptr + row[:, None] * out_cols + col[None, :]
    matrix = tl.full([], out_rows, tl.int64) * out_cols
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += matrix
    _add_to(grad_ptr + row[:, None] * grad_strides[0] + col[None, :] * grad_strides[1], total, mask)


def launch_weight_grad(
    left: Tensor, right: Tensor, grad: Tensor, partial: Tensor | None, depth_per_split: int, tile: Tile
) -> None:
    """Add left (N, rows) @ right (rows, K) to grad (N, K), all with any strides.

    With `partial`, float32 (splits, N, K) and contiguous, split s writes the product over its
    `depth_per_split` rows there, and `launch_weight_grad_sum` adds them to grad.
    """
    (out_rows, depth), out_cols = left.shape, right.shape[1]
    splits = 1 if partial is None else partial.shape[0]
    out = grad.unsqueeze(0) if partial is None else partial
    sizes = (out_rows, out_cols, depth, depth_per_split, left.stride(), right.stride(), out.stride())
    weight_grad_kernel[(tile_count(out_rows, out_cols, tile) * splits,)](
        left, right, out, *sizes, **launch_options(tile, "MNK", ADD=partial is None)
    )


def launch_weight_grad_sum(partial: Tensor, grad: Tensor, tile: Tile) -> None:
    """Add partial, float32 (splits, N, K), summed over its first dimension, to grad (N, K) of any strides."""
    splits, out_rows, out_cols = partial.shape
    weight_grad_sum_kernel[(tile_count(out_rows, out_cols, tile),)](
        partial, grad, splits, out_rows, out_cols, grad.stride(), **launch_options(tile, "MN")
    )
