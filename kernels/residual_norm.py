"""The scaled residual sum and its RMS norm, on rows of `width` elements."""

from typing import Any

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, column_block, launch_options, load_tile, store_tile
from torch import Tensor

_TILE = 4096  # most elements of a tile: 32 per thread with four warps


@triton.jit
def _mixed(sources, row, column, mask, width, HAS_X_SCALE: tl.constexpr):
    """A tile of x_scale * x + branch_scale * branch, rounded to the dtype of `mixed`, as float32."""
    x_ptr, branch_ptr, x_scale_ptr, branch_scale_ptr, mixed_ptr, x_stride, branch_stride = sources
    x = load_tile(x_ptr, row, x_stride, column, mask)
    branch = load_tile(branch_ptr, row, branch_stride, column, mask)
    branch_scale = tl.load(branch_scale_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if HAS_X_SCALE:
        x *= tl.load(x_scale_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    mixed = x + branch * branch_scale[None, :]
    return mixed.to(mixed_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def residual_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    x_scale_ptr,
    branch_scale_ptr,
    mixed_ptr,
    normed_ptr,
    rstd_ptr,
    x_stride,
    branch_stride,
    rows,
    width,
    layer_scale,
    eps,
    HAS_X_SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of mixed and normed. With WHOLE a row fits the tile; else columns are visited twice."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    sources = (x_ptr, branch_ptr, x_scale_ptr, branch_scale_ptr, mixed_ptr, x_stride, branch_stride)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    for first in range(0, BLOCK_N if WHOLE else width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        mixed = _mixed(sources, row, column, mask, width, HAS_X_SCALE)
        squares += tl.sum(mixed * mixed, 1)
        store_tile(mixed_ptr, row, width, column, mixed, mask)
    rstd = tl.rsqrt(squares / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    factor = (rstd * layer_scale)[:, None]
    if WHOLE:
        store_tile(normed_ptr, row, width, column, mixed * factor, mask)
    else:
        # mixed is recomputed: reading back what other threads stored would need a barrier
        for first in range(0, width, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            mask = (row < rows)[:, None] & (column < width)[None, :]
            mixed = _mixed(sources, row, column, mask, width, HAS_X_SCALE)
            store_tile(normed_ptr, row, width, column, mixed * factor, mask)


@triton.jit
def residual_norm_bwd_mean_kernel(
    dnormed_ptr,
    mixed_ptr,
    rstd_ptr,
    along_ptr,
    dnormed_stride,
    rows,
    width,
    layer_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """mean(g * unit) of BLOCK_M rows wider than a tile; g is the gradient of unit = rstd * mixed."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    along = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        g = load_tile(dnormed_ptr, row, dnormed_stride, column, mask) * layer_scale
        unit = load_tile(mixed_ptr, row, width, column, mask) * rstd[:, None]
        along += tl.sum(g * unit, 1)
    tl.store(along_ptr + row, along / width, mask=row < rows)


@triton.jit
def residual_norm_bwd_kernel(
    dmixed_ptr,
    dnormed_ptr,
    x_ptr,
    branch_ptr,
    x_scale_ptr,
    branch_scale_ptr,
    mixed_ptr,
    rstd_ptr,
    along_ptr,
    dx_ptr,
    dbranch_ptr,
    partial_ptr,
    dmixed_stride,
    dnormed_stride,
    x_stride,
    branch_stride,
    rows,
    width,
    layer_scale,
    tiles,
    HAS_X_SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`tiles` tiles of rows in sequence, with the per-channel gradients summed in registers."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    branch_scale = tl.load(branch_scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dbranch_scale = tl.zeros((BLOCK_N,), tl.float32)
    dx_scale = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_X_SCALE:
        x_scale = tl.load(x_scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & inside[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        unit = load_tile(mixed_ptr, row, width, column, mask) * rstd
        g = load_tile(dnormed_ptr, row, dnormed_stride, column, mask) * layer_scale
        if WHOLE:  # noqa: SIM108 — Triton needs the branch
            along = tl.sum(g * unit, 1) / width
        else:
            along = tl.load(along_ptr + row, mask=row < rows, other=0.0)
        # d rms_norm: rstd (g - unit mean(g unit))
        dmixed = load_tile(dmixed_ptr, row, dmixed_stride, column, mask)
        total = rstd * (g - unit * along[:, None]) + dmixed
        dbranch_scale += tl.sum(total * load_tile(branch_ptr, row, branch_stride, column, mask), 0)
        store_tile(dbranch_ptr, row, width, column, total * branch_scale[None, :], mask)
        if HAS_X_SCALE:
            dx_scale += tl.sum(total * load_tile(x_ptr, row, x_stride, column, mask), 0)
            total *= x_scale[None, :]
        store_tile(dx_ptr, row, width, column, total, mask)
    tl.store(partial_ptr + program * width + column, dbranch_scale, mask=inside)
    if HAS_X_SCALE:
        after = tl.num_programs(0).to(tl.int64) * width
        tl.store(partial_ptr + after + program * width + column, dx_scale, mask=inside)


def _options(width: int, tile: Tile) -> dict[str, Any]:
    columns = column_block(width, tile)
    return launch_options(tile, BLOCK_M=max(1, min(tile.block_m, _TILE // columns)), BLOCK_N=columns)


def fits_tile(width: int, tile: Tile) -> bool:
    """Return whether a row fits a tile, so that the backward needs no `along`."""
    return width <= tile.block_n


def launch_residual_norm_fwd(
    x: Tensor,
    branch: Tensor,
    x_scale: Tensor | None,
    branch_scale: Tensor,
    mixed: Tensor,
    normed: Tensor,
    rstd: Tensor,
    *,
    layer_scale: float,
    eps: float,
    tile: Tile,
) -> None:
    """Write mixed, normed (rows, D) and rstd (rows,); x, branch (rows, D) have unit inner stride."""
    rows, width = x.shape
    options = _options(width, tile)
    sizes = (x.stride(0), branch.stride(0), rows, width, layer_scale, eps)
    constants = {"HAS_X_SCALE": x_scale is not None, "WHOLE": fits_tile(width, tile)}
    residual_norm_fwd_kernel[(triton.cdiv(rows, options["BLOCK_M"]),)](
        x, branch, x_scale, branch_scale, mixed, normed, rstd, *sizes, **constants, **options
    )


def launch_residual_norm_bwd_mean(
    dnormed: Tensor, mixed: Tensor, rstd: Tensor, along: Tensor, *, layer_scale: float, tile: Tile
) -> None:
    """Write along (rows,) from dnormed (rows, D) with unit inner stride, mixed (rows, D) and rstd (rows,)."""
    rows, width = mixed.shape
    options = _options(width, tile)
    residual_norm_bwd_mean_kernel[(triton.cdiv(rows, options["BLOCK_M"]),)](
        dnormed, mixed, rstd, along, dnormed.stride(0), rows, width, layer_scale, **options
    )


def launch_residual_norm_bwd(
    dmixed: Tensor,
    dnormed: Tensor,
    x: Tensor,
    branch: Tensor,
    x_scale: Tensor | None,
    branch_scale: Tensor,
    mixed: Tensor,
    rstd: Tensor,
    along: Tensor | None,
    dx: Tensor,
    dbranch: Tensor,
    partial: Tensor,
    *,
    layer_scale: float,
    tile: Tile,
) -> None:
    """Write dx, dbranch (rows, D) from dmixed, dnormed, x, branch (rows, D) with unit inner stride.

    mixed (rows, D) and rstd (rows,) as saved; along (rows,) is read unless a row fits a tile. partial
    (1 or 2, programs, D) receives each program's sum for dbranch_scale and, with x_scale, dx_scale.
    """
    rows, width = mixed.shape
    options, programs = _options(width, tile), partial.shape[1]
    tiles = triton.cdiv(triton.cdiv(rows, options["BLOCK_M"]), programs)
    tensors = (dmixed, dnormed, x, branch, x_scale, branch_scale, mixed, rstd, along, dx, dbranch, partial)
    sizes = (*(t.stride(0) for t in tensors[:4]), rows, width, layer_scale, tiles)
    constants = {"HAS_X_SCALE": x_scale is not None, "WHOLE": fits_tile(width, tile)}
    residual_norm_bwd_kernel[(programs, triton.cdiv(width, options["BLOCK_N"]))](
        *tensors, *sizes, **constants, **options
    )
