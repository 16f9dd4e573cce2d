"""The hashed n-gram embedding: gather forward; table gradient by sorted sums, or with atomics.

Token n of the flattened (B, T) tokens is position n % T of sequence n // T. An entry is one use of a table
row: entry n is the bigram of token n, entry count + n its trigram.
"""

from typing import Any

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, column_block, launch_options, load_tile, store_tile
from torch import Tensor


@triton.jit
def _token_back(tokens_ptr, strides, batch, time, inside, BACK: tl.constexpr):
    """The token BACK positions earlier, as int64; 0 before the start of the sequence."""
    address = tokens_ptr + batch * strides[0] + (time - BACK) * strides[1]
    return tl.load(address, mask=inside & (time >= BACK), other=0).to(tl.int64)


@triton.jit
def _remainder(key, size):
    """Remainder with the sign of `size`: a negative key must not index outside the table."""
    rest = key % size
    return tl.where(rest < 0, rest + size, rest)


@triton.jit
def _row(key, start, usable, SPLIT: tl.constexpr):
    """Table row of a key; with SPLIT, word starts hash to the lower half of the rows, others to the upper."""
    if SPLIT:
        half = usable // 2
        row = _remainder(key, half) + tl.where(start, 0, half)
    else:
        row = _remainder(key, usable)
    return row


@triton.jit
def _ngrams(
    sources,
    index,
    count,
    length,
    num_rows,
    vocab,
    MULTIPLIERS: tl.constexpr,
    TRIGRAM: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Bigram row, trigram row (the bigram's without TRIGRAM), word-start flag and gate of tokens `index`."""
    tokens_ptr, starts_ptr, scale_ptr, boost_ptr, strides = sources
    inside = index < count
    batch, time = index // length, index % length
    current = _token_back(tokens_ptr, strides, batch, time, inside, 0)
    previous = _token_back(tokens_ptr, strides, batch, time, inside, 1)
    gate = tl.load(scale_ptr).to(tl.float32) + tl.zeros_like(index).to(tl.float32)
    start = index < 0
    if HAS_STARTS:
        known = (current >= 0) & (current < vocab)
        start = tl.load(starts_ptr + current, mask=inside & known, other=0) != 0
        gate = tl.where(start, gate * tl.load(boost_ptr).to(tl.float32), gate)
        gate = tl.where(known, gate, float("nan"))
    usable = num_rows - 1
    key = (MULTIPLIERS[0] * current) ^ (MULTIPLIERS[1] * previous)
    bigram = tl.where(time < 1, usable, _row(key, start, usable, SPLIT))
    trigram = bigram
    if TRIGRAM:
        before = _token_back(tokens_ptr, strides, batch, time, inside, 2)
        trigram = tl.where(time < 2, usable, _row(key ^ (MULTIPLIERS[2] * before), start, usable, SPLIT))
    return bigram, trigram, start, gate


@triton.jit
def _table_rows(table_ptr, table_stride, bigram, trigram, column, mask, TRIGRAM: tl.constexpr):
    """Sum of the table rows of each token, [tokens, columns] in float32."""
    total = load_tile(table_ptr, bigram, table_stride, column, mask)
    if TRIGRAM:
        total += load_tile(table_ptr, trigram, table_stride, column, mask)
    return total


@triton.jit
def ngram_hash_embed_fwd_kernel(
    tokens_ptr,
    table_ptr,
    starts_ptr,
    scale_ptr,
    boost_ptr,
    out_ptr,
    strides,
    table_stride,
    count,
    length,
    num_rows,
    vocab,
    width,
    MULTIPLIERS: tl.constexpr,
    TRIGRAM: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile [BLOCK_M tokens, BLOCK_N columns] of gate * (bigram row + trigram row)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sources = (tokens_ptr, starts_ptr, scale_ptr, boost_ptr, strides)
    bigram, trigram, _, gate = _ngrams(
        sources, index, count, length, num_rows, vocab, MULTIPLIERS, TRIGRAM, HAS_STARTS, SPLIT
    )
    mask = (index < count)[:, None] & (column < width)[None, :]
    out = _table_rows(table_ptr, table_stride, bigram, trigram, column, mask, TRIGRAM) * gate[:, None]
    store_tile(out_ptr, index, width, column, out, mask)


@triton.jit
def ngram_hash_embed_bwd_tokens_kernel(
    dout_ptr,
    tokens_ptr,
    table_ptr,
    starts_ptr,
    scale_ptr,
    boost_ptr,
    rows_ptr,
    gate_ptr,
    partial_ptr,
    dtable_ptr,
    dout_stride,
    strides,
    table_stride,
    count,
    length,
    num_rows,
    vocab,
    width,
    MULTIPLIERS: tl.constexpr,
    TRIGRAM: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row and gate of the entries of BLOCK_M tokens, and sums of dout . rows, at word starts and elsewhere.

    With ATOMIC the gradient is added to dtable (float32, zeroed) directly, and no rows are written.
    """
    program = tl.program_id(0).to(tl.int64)
    index = program * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < count
    sources = (tokens_ptr, starts_ptr, scale_ptr, boost_ptr, strides)
    bigram, trigram, start, gate = _ngrams(
        sources, index, count, length, num_rows, vocab, MULTIPLIERS, TRIGRAM, HAS_STARTS, SPLIT
    )
    along = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (column < width)[None, :]
        dout = load_tile(dout_ptr, index, dout_stride, column, mask)
        rows = _table_rows(table_ptr, table_stride, bigram, trigram, column, mask, TRIGRAM)
        along += tl.sum(dout * rows, 1)
        if ATOMIC:
            change = dout * gate[:, None]
            tl.atomic_add(dtable_ptr + bigram[:, None] * width + column[None, :], change, mask=mask)
            if TRIGRAM:
                tl.atomic_add(dtable_ptr + trigram[:, None] * width + column[None, :], change, mask=mask)
    if not ATOMIC:
        tl.store(gate_ptr + index, gate, mask=inside)
        tl.store(rows_ptr + index, bigram.to(rows_ptr.dtype.element_ty), mask=inside)
        if TRIGRAM:
            tl.store(rows_ptr + count + index, trigram.to(rows_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + 2 * program, tl.sum(tl.where(start, along, 0.0), 0))
    tl.store(partial_ptr + 2 * program + 1, tl.sum(tl.where(start, 0.0, along), 0))


@triton.jit
def ngram_hash_embed_bwd_scalars_kernel(
    partial_ptr, scale_ptr, boost_ptr, dscale_ptr, dboost_ptr, partials, BLOCK: tl.constexpr
):
    """dscale and dboost from the partial sums of all programs, added in float64 in a fixed order."""
    starts, rest = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, partials, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < partials
        starts += tl.load(partial_ptr + 2 * index, mask=mask, other=0.0).to(tl.float64)
        rest += tl.load(partial_ptr + 2 * index + 1, mask=mask, other=0.0).to(tl.float64)
    at_starts, elsewhere = tl.sum(starts, 0), tl.sum(rest, 0)
    dscale = at_starts * tl.load(boost_ptr).to(tl.float64) + elsewhere
    dboost = at_starts * tl.load(scale_ptr).to(tl.float64)
    tl.store(dscale_ptr, dscale.to(tl.float32).to(dscale_ptr.dtype.element_ty))
    tl.store(dboost_ptr, dboost.to(tl.float32).to(dboost_ptr.dtype.element_ty))


@triton.jit
def ngram_hash_embed_bwd_pieces_kernel(
    dout_ptr,
    gate_ptr,
    rows_ptr,
    order_ptr,
    pieces_ptr,
    dout_stride,
    entries,
    count,
    num_rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Per table row, the sum over its entries within one piece of BLOCK_M sorted entries.

    The sum of row r in piece p goes to pieces[r + p]: along the sorted entries neither r nor p decreases, and
    one of them increases from each sum to the next, so no two sums share an index.
    """
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = piece * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = at < entries
    row = tl.load(rows_ptr + at, mask=inside, other=0).to(tl.int64)
    row = tl.where(inside, row, num_rows)
    entry = tl.load(order_ptr + at, mask=inside, other=0)
    token = tl.where(entry < count, entry, entry - count)
    gate = tl.load(gate_ptr + token, mask=inside, other=0.0)
    mask = inside[:, None] & (column < width)[None, :]
    change = load_tile(dout_ptr, token, dout_stride, column, mask) * gate[:, None]
    current = tl.min(row, 0)
    while current < num_rows:
        total = tl.sum(tl.where((row == current)[:, None], change, 0.0), 0)
        tl.store(pieces_ptr + (current + piece) * width + column, total, mask=column < width)
        current = tl.min(tl.where(row > current, row, num_rows), 0)


@triton.jit
def ngram_hash_embed_bwd_rows_kernel(
    rows_ptr,
    pieces_ptr,
    dtable_ptr,
    entries,
    width,
    steps,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of one table row: the sum over the pieces that contain its sorted entries, in order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # binary search for the first entry of this row and of the next
    bound = tl.arange(0, 2)
    low = tl.zeros((2,), tl.int64)
    high = low + entries
    for _ in range(steps):
        middle = (low + high) // 2
        probe = tl.load(rows_ptr + middle, mask=low < high, other=0).to(tl.int64)
        below = (low < high) & (probe < row + bound)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    begin = tl.sum(tl.where(bound == 0, low, 0), 0)
    end = tl.sum(tl.where(bound == 1, low, 0), 0)
    first = begin // PIECE
    touched = tl.where(begin < end, (end - 1) // PIECE - first + 1, 0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, touched, BLOCK_M):
        piece = done + tl.arange(0, BLOCK_M)
        mask = (piece < touched)[:, None] & (column < width)[None, :]
        address = pieces_ptr + (row + first + piece)[:, None] * width + column[None, :]
        total += tl.load(address, mask=mask, other=0.0)
    dtable = tl.sum(total, 0).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + row * width + column, dtable, mask=column < width)


def token_programs(count: int, tile: Tile) -> int:
    """Return the programs of the backward's pass over `count` tokens: the rows of its `partial`."""
    return triton.cdiv(count, tile.block_m)


def pieces(entries: int, tile: Tile) -> int:
    """Return the number of pieces that the sorted entries are cut into."""
    return triton.cdiv(entries, tile.block_m)


def _launch(
    tokens: Tensor,
    table: Tensor,
    starts: Tensor | None,
    multipliers: tuple[int, int, int],
    split: bool,
    trigram: bool,
    tile: Tile,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the sizes and constants shared by the forward and the backward pass over tokens."""
    vocab = 0 if starts is None else starts.shape[0]
    sizes = (tokens.stride(), table.stride(0), tokens.numel(), tokens.shape[1], table.shape[0], vocab)
    constants = {
        "MULTIPLIERS": multipliers,
        "TRIGRAM": trigram,
        "HAS_STARTS": starts is not None,
        "SPLIT": split,
    }
    options = launch_options(tile, "M", BLOCK_N=column_block(table.shape[1], tile), **constants)
    return (*sizes, table.shape[1]), options


def launch_ngram_hash_embed_fwd(
    tokens: Tensor,
    table: Tensor,
    starts: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    out: Tensor,
    *,
    multipliers: tuple[int, int, int],
    split: bool,
    trigram: bool,
    tile: Tile,
) -> None:
    """Write out (B, T, D) from tokens (B, T) of any strides and table (rows, D) with unit inner stride.

    starts (vocab,) uint8; a token outside it gives NaN.
    """
    sizes, options = _launch(tokens, table, starts, multipliers, split, trigram, tile)
    count, width, columns = tokens.numel(), table.shape[1], options["BLOCK_N"]
    ngram_hash_embed_fwd_kernel[(triton.cdiv(count, tile.block_m), triton.cdiv(width, columns))](
        tokens, table, starts, scale, boost, out, *sizes, **options
    )


def launch_ngram_hash_embed_bwd_tokens(
    dout: Tensor,
    tokens: Tensor,
    table: Tensor,
    starts: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    rows: Tensor | None,
    gate: Tensor | None,
    partial: Tensor,
    dtable: Tensor | None,
    *,
    multipliers: tuple[int, int, int],
    split: bool,
    trigram: bool,
    tile: Tile,
) -> None:
    """Write partial (token_programs, 2) from dout (B T, D) with unit inner stride; the rest as forward.

    Also writes rows (entries,) and gate (B T,), or adds to `dtable` (rows, D), float32 and zeroed.
    """
    sizes, options = _launch(tokens, table, starts, multipliers, split, trigram, tile)
    tensors = (dout, tokens, table, starts, scale, boost, rows, gate, partial, dtable)
    ngram_hash_embed_bwd_tokens_kernel[(partial.shape[0],)](
        *tensors, dout.stride(0), *sizes, ATOMIC=dtable is not None, **options
    )


def launch_ngram_hash_embed_bwd_scalars(
    partial: Tensor, scale: Tensor, boost: Tensor, dscale: Tensor, dboost: Tensor, tile: Tile
) -> None:
    """Write dscale and dboost from partial (programs, 2) of the pass over tokens; all others are ()."""
    ngram_hash_embed_bwd_scalars_kernel[(1,)](
        partial, scale, boost, dscale, dboost, partial.shape[0], BLOCK=tile.block_n, num_warps=tile.num_warps
    )


def launch_ngram_hash_embed_bwd_pieces(
    dout: Tensor, gate: Tensor, rows: Tensor, order: Tensor, sums: Tensor, *, num_rows: int, tile: Tile
) -> None:
    """Write sums (num_rows + pieces, D) float32 from sorted rows (entries,) and their order (entries,) int64.

    dout and gate as in the pass over tokens.
    """
    width = sums.shape[1]
    columns = column_block(width, tile)
    ngram_hash_embed_bwd_pieces_kernel[(pieces(rows.shape[0], tile), triton.cdiv(width, columns))](
        *(dout, gate, rows, order, sums),
        *(dout.stride(0), rows.shape[0], gate.shape[0], num_rows, width),
        **launch_options(tile, "M", BLOCK_N=columns),
    )


def launch_ngram_hash_embed_bwd_rows(
    rows: Tensor, sums: Tensor, dtable: Tensor, *, piece: int, tile: Tile
) -> None:
    """Write dtable (num_rows, D) from sorted rows (entries,) and sums of pieces of `piece` entries."""
    (num_rows, width), entries = dtable.shape, rows.shape[0]
    columns = column_block(width, tile)
    options = launch_options(tile, "M", BLOCK_N=columns, PIECE=piece)
    ngram_hash_embed_bwd_rows_kernel[(num_rows, triton.cdiv(width, columns))](
        rows, sums, dtable, entries, width, entries.bit_length(), **options
    )
