"""The two MLP products that include the activation: up-projection forward, dhidden backward.

The plain products around them (down-projection, dx) are left to cuBLAS.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, dot_tile, halves, launch_options, store_tile, tile_count
from torch import Tensor


@triton.jit
def _swiglu(pre, pre_ptr, hidden_ptr, row, first_col, rows, columns):
    """Epilogue of mlp_up for the tile `pre` at column `first_col`, in which gate and up alternate."""
    BLOCK_M: tl.constexpr = pre.shape[0]
    BLOCK_N: tl.constexpr = pre.shape[1]
    row_mask = row[:, None] < rows
    col = first_col + tl.arange(0, BLOCK_N)
    store_tile(pre_ptr, row, columns, col, pre, row_mask & (col[None, :] < columns))
    gate, up = tl.split(tl.reshape(pre, [BLOCK_M, BLOCK_N // 2, 2]))
    hidden = gate * tl.sigmoid(gate) * up
    half = first_col // 2 + tl.arange(0, BLOCK_N // 2)
    store_tile(hidden_ptr, row, columns // 2, half, hidden, row_mask & (half[None, :] < columns // 2))


@triton.jit
def mlp_up_kernel(
    x_ptr,
    w_ptr,
    hidden_ptr,
    saved_ptr,
    rows,
    columns,
    depth,
    x_strides,
    w_strides,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of pre = x W^T, and act(pre) as hidden.

    For the backward it saves the signs of pre (leaky_relu_squared) or pre itself (swiglu).
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_N)  # neighbors share rows of x; W stays in L2
    first_col = pid % tiles * BLOCK_N
    row = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    pre = dot_tile(x_ptr, w_ptr, row, col, rows, columns, depth, x_strides, w_strides, BLOCK_K)
    row_mask = row[:, None] < rows
    mask = row_mask & (col[None, :] < columns)
    if ACTIVATION == "swiglu":
        left, right = halves(pre)
        _swiglu(left, saved_ptr, hidden_ptr, row, first_col, rows, columns)
        _swiglu(right, saved_ptr, hidden_ptr, row, first_col + BLOCK_N // 2, rows, columns)
    elif ACTIVATION == "leaky_relu_squared":
        positive = pre >= 0
        leaky = tl.where(positive, pre, 0.5 * pre)
        store_tile(hidden_ptr, row, columns, col, leaky * leaky, mask)
        # bit c % 32 of word c // 32; whole words, so that a warp packs them in registers with two shuffles
        bits = tl.reshape(positive.to(tl.int32), [BLOCK_M, BLOCK_N // 32, 32])
        words = tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)  # [BLOCK_M, BLOCK_N // 32]
        words_per_row = (columns + 31) // 32
        word = first_col // 32 + tl.arange(0, BLOCK_N // 32)
        word_ptrs = saved_ptr + row[:, None] * words_per_row + word[None, :]
        tl.store(word_ptrs, words, mask=row_mask & (word[None, :] < words_per_row))
    else:
        relu = tl.where(pre <= 0, 0.0, pre)  # NaN stays
        store_tile(hidden_ptr, row, columns, col, relu * relu, mask)


@triton.jit
def _swiglu_dpre(dhidden, pre_ptr, dpre_ptr, hidden_ptr, row, first_col, rows, columns):
    """Epilogue of mlp_dpre for the tile `dhidden` at column `first_col`: gradients of gate and up."""
    BLOCK_M: tl.constexpr = dhidden.shape[0]
    BLOCK_N: tl.constexpr = dhidden.shape[1]
    pair = first_col * 2 + tl.arange(0, 2 * BLOCK_N)
    pair_offsets = row[:, None] * (2 * columns) + pair[None, :]
    pair_mask = (row[:, None] < rows) & (pair[None, :] < 2 * columns)
    pre = tl.load(pre_ptr + pair_offsets, mask=pair_mask, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(pre, [BLOCK_M, BLOCK_N, 2]))
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    col = first_col + tl.arange(0, BLOCK_N)
    hidden_ptrs = hidden_ptr + row[:, None] * columns + col[None, :]
    mask = (row[:, None] < rows) & (col[None, :] < columns)
    tl.store(hidden_ptrs, (silu * up).to(hidden_ptr.dtype.element_ty), mask=mask)
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))  # silu' = s (1 + g (1 - s))
    dpre = tl.reshape(tl.join(dgate, dhidden * silu), [BLOCK_M, 2 * BLOCK_N])
    tl.store(dpre_ptr + pair_offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=pair_mask)


@triton.jit
def _swiglu_dpre_halves(dhidden, pre_ptr, dpre_ptr, hidden_ptr, row, first_col, rows, columns):
    """`_swiglu_dpre` for one half of the tile after the other, which needs fewer registers."""
    left, right = halves(dhidden)
    _swiglu_dpre(left, pre_ptr, dpre_ptr, hidden_ptr, row, first_col, rows, columns)
    middle = first_col + left.shape[1]
    _swiglu_dpre(right, pre_ptr, dpre_ptr, hidden_ptr, row, middle, rows, columns)


@triton.jit
def _squared_dpre(
    dhidden, hidden_ptr, signs_ptr, dpre_ptr, row, first_col, rows, columns, ACTIVATION: tl.constexpr
):
    """Epilogue of mlp_dpre for the squared activations and the tile `dhidden` at column `first_col`."""
    BLOCK_M: tl.constexpr = dhidden.shape[0]
    BLOCK_N: tl.constexpr = dhidden.shape[1]
    col = first_col + tl.arange(0, BLOCK_N)
    offsets = row[:, None] * columns + col[None, :]
    mask = (row[:, None] < rows) & (col[None, :] < columns)
    # hidden = leaky(pre)^2, so act'(pre) = 2 leaky(pre) leaky'(pre) is 2 sqrt(hidden), or -sqrt(hidden)
    root = tl.sqrt(tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32))
    slope = 2.0 * root
    if ACTIVATION == "leaky_relu_squared":
        words_per_row = (columns + 31) // 32
        word = first_col // 32 + tl.arange(0, BLOCK_N // 32)
        word_ptrs = signs_ptr + row[:, None] * words_per_row + word[None, :]
        word_mask = (row[:, None] < rows) & (word[None, :] < words_per_row)
        words = tl.load(word_ptrs, mask=word_mask, other=0)
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        slope = tl.where(tl.reshape(bits, [BLOCK_M, BLOCK_N]) != 0, slope, -root)
    tl.store(dpre_ptr + offsets, (dhidden * slope).to(dpre_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mlp_dpre_kernel(
    dout_ptr,
    w_ptr,
    saved_ptr,
    signs_ptr,
    dpre_ptr,
    hidden_ptr,
    rows,
    columns,
    depth,
    dout_strides,
    w_strides,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of dhidden = dout W, W (depth, columns), as dpre = dhidden * act'(pre).

    For swiglu also hidden, from the saved pre.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_N)
    first_col = pid % tiles * BLOCK_N
    row = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    transposed = (w_strides[1], w_strides[0])
    dhidden = dot_tile(dout_ptr, w_ptr, row, col, rows, columns, depth, dout_strides, transposed, BLOCK_K)
    middle = first_col + BLOCK_N // 2
    if ACTIVATION == "swiglu":
        left, right = halves(dhidden)
        _swiglu_dpre_halves(left, saved_ptr, dpre_ptr, hidden_ptr, row, first_col, rows, columns)
        _swiglu_dpre_halves(right, saved_ptr, dpre_ptr, hidden_ptr, row, middle, rows, columns)
    elif BLOCK_N >= 64:  # a half has whole words of signs
        left, right = halves(dhidden)
        _squared_dpre(left, saved_ptr, signs_ptr, dpre_ptr, row, first_col, rows, columns, ACTIVATION)
        _squared_dpre(right, saved_ptr, signs_ptr, dpre_ptr, row, middle, rows, columns, ACTIVATION)
    else:
        _squared_dpre(dhidden, saved_ptr, signs_ptr, dpre_ptr, row, first_col, rows, columns, ACTIVATION)


def launch_mlp_up(
    x: Tensor, weight: Tensor, hidden: Tensor, saved: Tensor, activation: str, tile: Tile
) -> None:
    """Write hidden (rows, M) from x (rows, D) and weight (M, D), or (2M, D) for swiglu; both of any strides.

    `saved`, contiguous like `hidden`: int32 (rows, ceil(M / 32)), bit c % 32 of word c // 32 set where
    pre[c] >= 0 (leaky_relu_squared), or the pre-activation (rows, 2M) (swiglu); not touched for relu_squared.
    """
    (rows, depth), columns = x.shape, weight.shape[0]
    sizes = (rows, columns, depth, x.stride(), weight.stride())
    mlp_up_kernel[(tile_count(rows, columns, tile),)](
        x, weight, hidden, saved, *sizes, **launch_options(tile, "MNK", ACTIVATION=activation)
    )


def launch_mlp_dpre(
    dout: Tensor,
    weight: Tensor,
    saved: Tensor,
    signs: Tensor,
    dpre: Tensor,
    hidden: Tensor,
    activation: str,
    tile: Tile,
) -> None:
    """Write dpre (rows, M), or (rows, 2M) for swiglu, from dout (rows, D) and weight (D, M) of any strides.

    `saved`: hidden (rows, M), but for swiglu the pre-activation (rows, 2M), and then `hidden` (rows, M) is
    written; `signs` as `launch_mlp_up` left them. All but dout and weight are contiguous.
    """
    (rows, depth), columns = dout.shape, weight.shape[1]
    sizes = (rows, columns, depth, dout.stride(), weight.stride())
    mlp_dpre_kernel[(tile_count(rows, columns, tile),)](
        dout, weight, saved, signs, dpre, hidden, *sizes, **launch_options(tile, "MNK", ACTIVATION=activation)
    )
