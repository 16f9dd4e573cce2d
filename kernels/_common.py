"""Shared by the kernels: the type of a tile, the main loop of a matrix product, and tools for epilogues."""

from typing import Any, Protocol

import triton
import triton.language as tl


class Tile(Protocol):
    """Block sizes and pipeline of a launch; `pgolf_fast.ops` has the table that they come from."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def column_block(width: int, tile: Tile) -> int:
    """Return the columns of a block: the whole width if it fits, else tile.block_n."""
    return min(triton.next_power_of_2(max(width, 1)), tile.block_n)


def tile_count(rows: int, columns: int, tile: Tile) -> int:
    """Return how many tiles cover a matrix."""
    return triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)


def launch_options(tile: Tile, blocks: str = "", **constants: Any) -> dict[str, Any]:
    """Return the block sizes named in `blocks`, other constants and the pipeline as arguments of a launch."""
    sizes = {"M": tile.block_m, "N": tile.block_n, "K": tile.block_k}
    constants |= {f"BLOCK_{block}": sizes[block] for block in blocks}
    return {**constants, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


@triton.jit
def tile_of(number, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of a numbered tile of a matrix, row by row."""
    tiles = tl.cdiv(columns, BLOCK_N)
    return number // tiles * BLOCK_M + tl.arange(0, BLOCK_M), number % tiles * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def load_tile(ptr, row, stride, col, mask):
    """ptr[row, col] of a matrix with unit inner stride in float32, [len(row), len(col)]; 0 outside `mask`."""
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, row, stride, col, value, mask):
    """Store `value` at ptr[row, col] of a matrix with unit inner stride, rounded to its dtype."""
    tl.store(ptr + row[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_tile(a_ptr, b_ptr, row, col, rows, cols, depth, a_strides, b_strides, BLOCK_K: tl.constexpr):
    """Compute sum_k a[row, k] * b[col, k] in float32, [len(row), len(col)]; 0 outside `rows` and `cols`.

    `row` and `col` are int64 vectors. Both operands have any strides, so either may be transposed.
    """
    a_stride_row, a_stride_depth = a_strides
    b_stride_col, b_stride_depth = b_strides
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full([], BLOCK_K, tl.int64)  # a stride times a block may exceed 2^31
    a_ptrs = a_ptr + row[:, None] * a_stride_row + k[None, :] * a_stride_depth  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + k[:, None] * b_stride_depth + col[None, :] * b_stride_col  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < depth - start
        a = tl.load(a_ptrs, mask=(row[:, None] < rows) & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & (col[None, :] < cols), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += step * a_stride_depth
        b_ptrs += step * b_stride_depth
    return acc


@triton.jit
def halves(tile):
    """Left and right half of a tile, for an epilogue that would need too many registers for the whole."""
    parts = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(parts, [0, 2, 1]))
