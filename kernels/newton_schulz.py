"""Newton-Schulz over a stack of matrices: Frobenius norm, then X X^T, b A + c A A and a X + P X per step.

The first two products are symmetric: only tiles on and above the diagonal are computed, and those above it
are stored a second time, transposed. Matrices are given by pointer and strides, so a tall matrix is processed
as its wide transpose. Every result is rounded once, at its store.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, dot_tile, launch_options, store_tile, tile_count, tile_of
from torch import Tensor


@triton.jit
def newton_schulz_sum_squares_kernel(
    g_ptr, partial_ptr, rows, cols, g_strides, parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sum of squares of BLOCK_M whole rows of one matrix, as one partial sum of its Frobenius norm."""
    program = tl.program_id(0).to(tl.int64)
    slot, part = program // parts, program % parts
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptr = g_ptr + slot * g_strides[0] + row[:, None] * g_strides[1]  # [BLOCK_M, 1]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        value = tl.load(row_ptr + col[None, :] * g_strides[2], mask=mask, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial_ptr + program, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def newton_schulz_scale_kernel(
    g_ptr,
    partial_ptr,
    x_ptr,
    rows,
    cols,
    g_strides,
    parts,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of x = g / (|g| + 1e-7). PARTS is the next power of two of `parts`."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(cols, BLOCK_N)
    slot, tile = program // tiles, program % tiles
    part = tl.arange(0, PARTS)
    squares = tl.load(partial_ptr + slot * parts + part, mask=part < parts, other=0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0)) + 1e-7
    row, col = tile_of(tile, cols, BLOCK_M, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    source = g_ptr + slot * g_strides[0] + row[:, None] * g_strides[1] + col[None, :] * g_strides[2]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32) / norm
    store_tile(x_ptr + slot * rows * cols, row, cols, col, value, mask)


@triton.jit
def _store_symmetric(ptr, value, row, col, size, above_diagonal):
    """Store `value` (rows `row`, columns `col` of a contiguous size x size matrix) and its mirror image."""
    low = value.to(ptr.dtype.element_ty)
    inside = (row < size)[:, None] & (col < size)[None, :]
    tl.store(ptr + row[:, None] * size + col[None, :], low, mask=inside)
    if above_diagonal:
        mirrored = (col < size)[:, None] & (row < size)[None, :]
        tl.store(ptr + col[:, None] * size + row[None, :], tl.trans(low), mask=mirrored)


@triton.jit
def newton_schulz_gram_kernel(
    x_ptr, gram_ptr, rows, cols, x_strides, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile [BLOCK, BLOCK] of X X^T and its mirror image; programs below the diagonal return at once."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK)
    slot, tile = program // (tiles * tiles), program % (tiles * tiles)
    tile_m, tile_n = tile // tiles, tile % tiles
    if tile_n < tile_m:
        return
    row = tile_m * BLOCK + tl.arange(0, BLOCK)
    col = tile_n * BLOCK + tl.arange(0, BLOCK)
    x_ptr += slot * x_strides[0]
    strides = (x_strides[1], x_strides[2])
    acc = dot_tile(x_ptr, x_ptr, row, col, rows, rows, cols, strides, strides, BLOCK_K)
    _store_symmetric(gram_ptr + slot * rows * rows, acc, row, col, rows, tile_m < tile_n)


@triton.jit
def newton_schulz_poly_kernel(gram_ptr, poly_ptr, size, b, c, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile [BLOCK, BLOCK] of b A + c A A for contiguous symmetric A, and its mirror image."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(size, BLOCK)
    slot, tile = program // (tiles * tiles), program % (tiles * tiles)
    tile_m, tile_n = tile // tiles, tile % tiles
    if tile_n < tile_m:
        return
    row = tile_m * BLOCK + tl.arange(0, BLOCK)
    col = tile_n * BLOCK + tl.arange(0, BLOCK)
    # not by dot_tile: its pointers cost 26 registers more, and 128 let two blocks share an SM (sm_90)
    gram = gram_ptr + slot * size * size
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        left = tl.load(
            gram + row[:, None] * size + k[None, :],
            mask=(row < size)[:, None] & (k < size)[None, :],
            other=0.0,
        )
        right = tl.load(
            gram + k[:, None] * size + col[None, :],
            mask=(k < size)[:, None] & (col < size)[None, :],
            other=0.0,
        )
        acc = tl.dot(left, right, acc, input_precision="ieee")
    inside = (row < size)[:, None] & (col < size)[None, :]
    once = tl.load(gram + row[:, None] * size + col[None, :], mask=inside, other=0.0).to(tl.float32)
    _store_symmetric(poly_ptr + slot * size * size, b * once + c * acc, row, col, size, tile_m < tile_n)


@triton.jit
def newton_schulz_apply_kernel(
    poly_ptr,
    x_ptr,
    out_ptr,
    rows,
    cols,
    x_strides,
    a,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of a X + P X; P is contiguous, out has the strides of X."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(cols, BLOCK_N)
    slot, tile = program // tiles, program % tiles
    row, col = tile_of(tile, cols, BLOCK_M, BLOCK_N)
    poly_ptr += slot * rows * rows
    transposed = (x_strides[2], x_strides[1])
    x_slot = x_ptr + slot * x_strides[0]
    acc = dot_tile(poly_ptr, x_slot, row, col, rows, cols, rows, (rows, 1), transposed, BLOCK_K)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    offset = slot * x_strides[0] + row[:, None] * x_strides[1] + col[None, :] * x_strides[2]
    once = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, (a * once + acc).to(out_ptr.dtype.element_ty), mask=inside)


def norm_parts(rows: int, tile: Tile) -> int:
    """Return the partial sums per matrix of `launch_newton_schulz_normalize`."""
    return triton.cdiv(rows, tile.block_m)


def launch_newton_schulz_normalize(g: Tensor, partial: Tensor, x: Tensor, tile: Tile) -> None:
    """Write x = g / (|g| + 1e-7) for every matrix of g (slots, rows, cols), of any strides.

    x is contiguous; partial is float32 (slots, norm_parts(rows, tile)).
    """
    (slots, rows, cols), parts = g.shape, partial.shape[1]
    sizes, options = (rows, cols, g.stride(), parts), launch_options(tile, "MN")
    newton_schulz_sum_squares_kernel[(slots * parts,)](g, partial, *sizes, **options)
    newton_schulz_scale_kernel[(slots * tile_count(rows, cols, tile),)](
        g, partial, x, *sizes, PARTS=triton.next_power_of_2(parts), **options
    )


def launch_newton_schulz_gram(x: Tensor, gram: Tensor, tile: Tile) -> None:
    """Write gram (slots, rows, rows), contiguous, = x x^T for x (slots, rows, cols) of any strides.

    Tiles are tile.block_m square.
    """
    slots, rows, cols = x.shape
    newton_schulz_gram_kernel[(slots * triton.cdiv(rows, tile.block_m) ** 2,)](
        x, gram, rows, cols, x.stride(), **launch_options(tile, "K", BLOCK=tile.block_m)
    )


def launch_newton_schulz_poly(gram: Tensor, poly: Tensor, b: float, c: float, tile: Tile) -> None:
    """Write poly = b gram + c gram gram for symmetric gram; both (slots, size, size) and contiguous.

    Tiles are tile.block_m square.
    """
    slots, size, _ = gram.shape
    newton_schulz_poly_kernel[(slots * triton.cdiv(size, tile.block_m) ** 2,)](
        gram, poly, size, b, c, **launch_options(tile, "K", BLOCK=tile.block_m)
    )


def launch_newton_schulz_apply(poly: Tensor, x: Tensor, out: Tensor, a: float, tile: Tile) -> None:
    """Write out = a x + poly x: poly (slots, rows, rows) contiguous; x, out (slots, rows, cols) alike."""
    slots, rows, cols = x.shape
    newton_schulz_apply_kernel[(slots * tile_count(rows, cols, tile),)](
        poly, x, out, rows, cols, x.stride(), a, **launch_options(tile, "MNK")
    )
