"""Products with matrices of packed 6-bit codes, in the 4+2 split that ops/int6.py defines.

Four neighboring codes, a quad, are one 16-bit word of the low plane and one byte of the high plane.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, dot_tile, launch_options, store_tile, tile_count, tile_of
from torch import Tensor


@triton.jit
def _load_quads(low_ptr, high_ptr, n, quad, columns, quads):
    """Low word and high byte of some quads of rows `n` (int64): int32 [len(n), len(quad)], 0 outside."""
    mask = (n[:, None] < columns) & (quad[None, :] < quads)
    # a row is `quads` words, then `quads` bytes: 3 * quads bytes, an even number
    low_offsets = n[:, None] * (quads // 2 * 3) + quad[None, :]
    high_offsets = n[:, None] * (quads * 3) + quads * 2 + quad[None, :]
    low = tl.load(low_ptr + low_offsets, mask=mask, other=0).to(tl.int32)
    high = tl.load(high_ptr + high_offsets, mask=mask, other=0).to(tl.int32)
    return low, high


@triton.jit
def _code(low, high, PLACE: tl.constexpr):
    """Code PLACE (0..3) of each quad, as float32; -32..31 is exact in every floating-point type."""
    return (((low >> (4 * PLACE)) & 15) + ((high >> (2 * PLACE)) & 3) * 16 - 32).to(tl.float32)


@triton.jit
def int6_matmul_skinny_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    scale_ptr,
    y_ptr,
    rows,
    columns,
    depth,
    quads,
    x_stride_row,
    x_stride_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
):
    """y = x codes^T * scale for few rows of x, one tile [BLOCK_N, BLOCK_M] of y^T.

    Codes are unpacked in registers and form the long side of the tile.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_N)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, quads, BLOCK_QUADS):
        low, high = _load_quads(low_ptr, high_ptr, n, start + tl.arange(0, BLOCK_QUADS), columns, quads)
        k = (start * 4 + tl.arange(0, 4 * BLOCK_QUADS)).to(tl.int64)
        x_ptrs = x_ptr + m[:, None] * x_stride_row + k[None, :] * x_stride_col
        x = tl.load(x_ptrs, mask=(m[:, None] < rows) & (k[None, :] < depth), other=0.0)
        # k is summed place by place, so the codes never have to be interleaved
        even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_QUADS, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        acc = tl.dot(_code(low, high, 0).to(x.dtype), tl.trans(x0), acc, input_precision="ieee")
        acc = tl.dot(_code(low, high, 1).to(x.dtype), tl.trans(x1), acc, input_precision="ieee")
        acc = tl.dot(_code(low, high, 2).to(x.dtype), tl.trans(x2), acc, input_precision="ieee")
        acc = tl.dot(_code(low, high, 3).to(x.dtype), tl.trans(x3), acc, input_precision="ieee")
    acc *= tl.load(scale_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + m[None, :] * columns + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m[None, :] < rows) & (n[:, None] < columns))


@triton.jit
def int6_unpack_kernel(
    low_ptr, high_ptr, codes_ptr, columns, depth, quads, BLOCK_N: tl.constexpr, BLOCK_QUADS: tl.constexpr
):
    """One tile [BLOCK_N, 4 * BLOCK_QUADS] of the unpacked codes, unscaled, in the dtype of `codes`."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(quads, BLOCK_QUADS)
    n = pid // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    first = pid % tiles * BLOCK_QUADS
    low, high = _load_quads(low_ptr, high_ptr, n, first + tl.arange(0, BLOCK_QUADS), columns, quads)
    even = tl.join(_code(low, high, 0), _code(low, high, 2))
    odd = tl.join(_code(low, high, 1), _code(low, high, 3))
    codes = tl.reshape(tl.join(even, odd), [BLOCK_N, 4 * BLOCK_QUADS])
    k = first * 4 + tl.arange(0, 4 * BLOCK_QUADS)
    store_tile(codes_ptr, n, depth, k, codes, (n[:, None] < columns) & (k[None, :] < depth))


@triton.jit
def int6_matmul_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    y_ptr,
    rows,
    columns,
    depth,
    x_strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y = x codes^T * scale, codes unpacked; scaled, then rounded once."""
    pid = tl.program_id(0).to(tl.int64)
    row, col = tile_of(pid, columns, BLOCK_M, BLOCK_N)
    acc = dot_tile(x_ptr, codes_ptr, row, col, rows, columns, depth, x_strides, (depth, 1), BLOCK_K)
    acc *= tl.load(scale_ptr + col, mask=col < columns, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, row, columns, col, acc, (row[:, None] < rows) & (col[None, :] < columns))


def launch_int6_matmul_skinny(
    x: Tensor, words: Tensor, packed: Tensor, scale: Tensor, y: Tensor, tile: Tile
) -> None:
    """Write y (M, N) = x (M, K) codes (N, K)^T * scale (N,), with codes packed as uint8 (N, 3 * K8 / 4).

    K8 is K rounded up to a multiple of 8. `words` is the same memory as int16; x has any strides, everything
    else is contiguous.
    """
    (rows, depth), (columns, row_bytes) = x.shape, packed.shape
    block_m = min(tile.block_m, max(16, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(columns, tile.block_n) * triton.cdiv(rows, block_m),)
    sizes = (rows, columns, depth, row_bytes // 3, *x.stride())
    options = launch_options(tile, "N", BLOCK_M=block_m, BLOCK_QUADS=tile.block_k // 4)
    int6_matmul_skinny_kernel[grid](x, words, packed, scale, y, *sizes, **options)


def launch_int6_unpack(words: Tensor, packed: Tensor, codes: Tensor, tile: Tile) -> None:
    """Unpack uint8 (N, 3 * K8 / 4) to codes (N, K), contiguous; `words` is the same memory as int16."""
    (columns, depth), quads, block_quads = codes.shape, packed.shape[1] // 3, tile.block_n // 4
    grid = (triton.cdiv(columns, tile.block_m) * triton.cdiv(quads, block_quads),)
    options = launch_options(tile, BLOCK_N=tile.block_m, BLOCK_QUADS=block_quads)
    int6_unpack_kernel[grid](words, packed, codes, columns, depth, quads, **options)


def launch_int6_matmul(x: Tensor, codes: Tensor, scale: Tensor, y: Tensor, tile: Tile) -> None:
    """Write y (M, N) = x (M, K) codes (N, K)^T * scale (N,); x has any strides, the rest is contiguous."""
    (rows, depth), columns = x.shape, codes.shape[0]
    int6_matmul_kernel[(tile_count(rows, columns, tile),)](
        x, codes, scale, y, rows, columns, depth, x.stride(), **launch_options(tile, "MNK")
    )
