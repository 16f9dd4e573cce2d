"""The softcapped head loss: logits are computed tile by tile and never written.

The forward takes a block of rows through the vocabulary with an online logsumexp. The backward recomputes
each tile and writes d loss / d raw logits for some rows; the op feeds these to two matrix products.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, halves, launch_options, store_tile, tile_count
from torch import Tensor


@triton.jit
def _tanh(z):
    """tanh(z) and its derivative, each within a few float32 ulps.

    From e = exp(-2|z|): (1 - e) / (1 + e) and 4 e / (1 + e)^2. Where 1 - e would cancel, the odd series is
    used; at 0.3 its first omitted term is 2e-9 of the value.
    """
    square = z * z
    series = -1382.0 / 155925.0
    series = series * square + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    series = z + z * square * series
    e = tl.exp(-2.0 * tl.abs(z))
    ratio = (1.0 - e) / (1.0 + e)
    tanh = tl.where(tl.abs(z) < 0.3, series, tl.where(z < 0, -ratio, ratio))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _quarters(tile):
    """Four strips of a tile's columns: one at a time, they need a quarter of the registers."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def _raw_logits(
    x_ptr,
    weight_ptr,
    x_stride,
    weight_stride,
    row,
    column,
    rows,
    vocab,
    width,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of x W^T in float32, [len(row), len(column)]; 0 outside."""
    raw = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x_mask = (row < rows)[:, None] & (k < width)[None, :]
        weight_mask = (column < vocab)[None, :] & (k < width)[:, None]
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
        address = weight_ptr + column.to(tl.int64)[None, :] * weight_stride + k[:, None]
        weight = tl.load(address, mask=weight_mask, other=0.0)
        raw = tl.dot(x, weight, raw, input_precision=PRECISION)
    return raw


@triton.jit
def _target(targets_ptr, targets_stride, row, rows, vocab):
    """Targets of rows, int32 like the columns they are compared with; -1 outside the vocabulary."""
    target = tl.load(targets_ptr + row * targets_stride, mask=row < rows, other=0).to(tl.int64)
    return tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)


@triton.jit
def _add_columns(raw, column, target, largest, total, chosen, vocab, softcap, inverse):
    """Update the largest logit, the sum of exp(logit - largest) and the target logit with more columns."""
    tanh, _ = _tanh(raw * inverse)
    logit = tl.where((column < vocab)[None, :], softcap * tanh, float("-inf"))
    chosen += tl.sum(tl.where(column[None, :] == target[:, None], logit, 0.0), 1)
    now = tl.maximum(largest, tl.max(logit, 1))
    total = total * tl.exp(largest - now) + tl.sum(tl.exp(logit - now[:, None]), 1)
    return now, total, chosen


@triton.jit
def softcap_cross_entropy_fwd_kernel(
    x_ptr,
    weight_ptr,
    targets_ptr,
    loss_ptr,
    logsumexp_ptr,
    x_stride,
    weight_stride,
    targets_stride,
    rows,
    vocab,
    width,
    softcap,
    inverse,
    z_loss,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss and logsumexp of BLOCK_M rows, looping over the vocabulary in blocks of BLOCK_N columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = _target(targets_ptr, targets_stride, row, rows, vocab)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, vocab, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        raw = _raw_logits(
            x_ptr, weight_ptr, x_stride, weight_stride, row, column, rows, vocab, width, PRECISION, BLOCK_K
        )
        strips = halves(raw)
        for i in tl.static_range(2):
            strip = first + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            largest, total, chosen = _add_columns(
                strips[i], strip, target, largest, total, chosen, vocab, softcap, inverse
            )
    logsumexp = largest + tl.log(total)
    tl.store(logsumexp_ptr + row, logsumexp, mask=row < rows)
    loss = logsumexp - chosen + z_loss * logsumexp * logsumexp
    tl.store(loss_ptr + row, tl.where(target < 0, float("nan"), loss), mask=row < rows)


@triton.jit
def _dlogits(raw, column, target, logsumexp, dloss, softcap, inverse, z_loss, HAS_Z_LOSS: tl.constexpr):
    """d loss / d raw of one strip of a tile."""
    tanh, slope = _tanh(raw * inverse)
    # d loss / d raw = ((1 + 2 z_loss log Z) softmax - onehot) (1 - tanh^2)
    grad = tl.exp(softcap * tanh - logsumexp[:, None])
    if HAS_Z_LOSS:
        grad *= (1.0 + 2.0 * z_loss * logsumexp)[:, None]
    return tl.where(column[None, :] == target[:, None], grad - 1.0, grad) * slope * dloss[:, None]


@triton.jit
def softcap_cross_entropy_dlogits_kernel(
    x_ptr,
    weight_ptr,
    targets_ptr,
    logsumexp_ptr,
    dloss_ptr,
    dlogits_ptr,
    x_stride,
    weight_stride,
    targets_stride,
    dloss_stride,
    rows,
    vocab,
    width,
    softcap,
    inverse,
    z_loss,
    HAS_Z_LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of d loss / d (x W^T); neighboring programs share rows of x in L2.

    z-loss is a compile-time switch: it takes 161 registers per thread on sm_90; 128 allow two blocks per SM.
    """
    tile = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(vocab, BLOCK_N)
    row = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = ((tile % across) * BLOCK_N).to(tl.int32)
    column = first + tl.arange(0, BLOCK_N)
    raw = _raw_logits(
        x_ptr, weight_ptr, x_stride, weight_stride, row, column, rows, vocab, width, PRECISION, BLOCK_K
    )
    target = _target(targets_ptr, targets_stride, row, rows, vocab)
    logsumexp = tl.load(logsumexp_ptr + row, mask=row < rows, other=0.0)
    dloss = tl.load(dloss_ptr + row * dloss_stride, mask=row < rows, other=0.0).to(tl.float32)
    dloss = tl.where(target < 0, float("nan"), dloss)
    strips = _quarters(raw)
    for i in tl.static_range(4):
        strip = first + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        grad = _dlogits(strips[i], strip, target, logsumexp, dloss, softcap, inverse, z_loss, HAS_Z_LOSS)
        store_tile(dlogits_ptr, row, vocab, strip, grad, (row < rows)[:, None] & (strip < vocab)[None, :])


def _precision(x: Tensor) -> str:
    return "ieee" if x.element_size() > 2 else "tf32"  # no effect on 16-bit data


def launch_softcap_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Tensor,
    logsumexp: Tensor,
    *,
    softcap: float,
    z_loss: float,
    tile: Tile,
) -> None:
    """Write loss and logsumexp (N,) float32; x (N, D) and weight (V, D) have unit inner stride, targets (N,).

    A target outside the vocabulary gives a loss of NaN.
    """
    rows, width = x.shape
    strides = (x.stride(0), weight.stride(0), targets.stride(0))
    sizes = (*strides, rows, weight.shape[0], width, softcap, 1 / softcap, z_loss)
    softcap_cross_entropy_fwd_kernel[(triton.cdiv(rows, tile.block_m),)](
        x, weight, targets, loss, logsumexp, *sizes, **launch_options(tile, "MNK", PRECISION=_precision(x))
    )


def launch_softcap_cross_entropy_dlogits(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    dloss: Tensor,
    dlogits: Tensor,
    *,
    softcap: float,
    z_loss: float,
    tile: Tile,
) -> None:
    """Write dlogits (N, V), contiguous, with dloss (N,) of any stride; the rest as forward."""
    rows, vocab = dlogits.shape
    strides = (x.stride(0), weight.stride(0), targets.stride(0), dloss.stride(0))
    sizes = (*strides, rows, vocab, x.shape[1], softcap, 1 / softcap, z_loss)
    options = launch_options(tile, "MNK", HAS_Z_LOSS=z_loss > 0, PRECISION=_precision(x))
    softcap_cross_entropy_dlogits_kernel[(tile_count(rows, vocab, tile),)](
        x, weight, targets, logsumexp, dloss, dlogits, *sizes, **options
    )
