"""pgolf::ngram_hash_embed — hashed bigram and trigram embedding with a word-start gate (PR 1501)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pgolf_fast.ops import launch, reference
from pgolf_fast.ops.checks import expect_dtype, expect_floating, expect_shape, same_device
from pgolf_fast.ops.launch import Launch

launch.declare("ngram_hash_embed_fwd", sm90=Launch(32, 128, num_warps=4))
launch.declare("ngram_hash_embed_bwd_tokens", sm90=Launch(32, 128, num_warps=4))
launch.declare("ngram_hash_embed_bwd_scalars", sm90=Launch(block_n=1024, num_warps=4))
# block_m is the length of a piece: short enough for a frequent bigram to be shared by many programs
launch.declare("ngram_hash_embed_bwd_pieces", sm90=Launch(32, 64, num_warps=1))
launch.declare("ngram_hash_embed_bwd_rows", sm90=Launch(16, 64, num_warps=1))

TableGradient = Literal["sorted", "atomic"]
_table_gradient: TableGradient = "sorted"


def choose_table_gradient(how: TableGradient) -> None:
    """How the kernels add up the table's gradient, in this process.

    "sorted" (the default) sorts the rows in use and adds up each in a fixed order: the same bits every time.
    "atomic" adds in float32 in whatever order programs finish, which differs from run to run; it is ignored
    where torch.are_deterministic_algorithms_enabled(). Raises ValueError for another name.
    """
    global _table_gradient
    if how not in ("sorted", "atomic"):
        raise ValueError(f"pgolf::ngram_hash_embed: table gradient is {how!r}; use sorted or atomic")
    _table_gradient = how


def ngram_hash_embed(
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    *,
    pos_conditional: bool,
    trigram: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`scale * gate * (table[bigram row] [+ table[trigram row]])` for every token.

    tokens (B, T) integer; table (rows, D); has_leading_space (vocab,) bool, or None for no gate and no split;
    scale and boost () floats: the gate is `boost` at word starts and 1 elsewhere. Result (B, T, D) in
    `out_dtype` (default: the table's). `reference.ngram_rows` defines the rows; no target enters a key.
    Raises ValueError for shapes, dtypes or devices that do not fit, and IndexError for a token outside
    has_leading_space. On a GPU that check would stop the host, so kernels give NaN for such a token instead.
    """
    dtype = out_dtype or table.dtype
    return torch.ops.pgolf.ngram_hash_embed(
        tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, dtype
    )


def _check(
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    pos_conditional: bool,
) -> None:
    expect_shape("ngram_hash_embed", "tokens", tokens, (None, None))
    expect_shape("ngram_hash_embed", "table", table, (None, None))
    expect_floating("ngram_hash_embed", "table", table)
    expect_shape("ngram_hash_embed", "scale", scale, ())
    expect_shape("ngram_hash_embed", "boost", boost, ())
    same_device("ngram_hash_embed", tokens=tokens, table=table, scale=scale, boost=boost)
    if has_leading_space is not None:
        expect_shape("ngram_hash_embed", "has_leading_space", has_leading_space, (None,))
        expect_dtype("ngram_hash_embed", "has_leading_space", has_leading_space, torch.bool)
        same_device("ngram_hash_embed", tokens=tokens, has_leading_space=has_leading_space)
    if tokens.is_floating_point():
        raise ValueError(
            f"pgolf::ngram_hash_embed: tokens.dtype is {tokens.dtype}; it must be an integer type"
        )
    if table.shape[0] < 4:
        raise ValueError(f"pgolf::ngram_hash_embed: table has {table.shape[0]} rows; it needs at least 4")
    if pos_conditional and has_leading_space is None:
        raise ValueError("pgolf::ngram_hash_embed: pos_conditional needs has_leading_space, which is None")


def _check_ids(tokens: Tensor, has_leading_space: Tensor | None) -> None:
    """Raise IndexError for a token outside has_leading_space; on the CPU only, where reading it is free."""
    if has_leading_space is None or tokens.is_cuda or not tokens.numel():
        return
    low, high = (int(value) for value in tokens.long().aminmax())
    if low < 0 or high >= len(has_leading_space):
        raise IndexError(
            f"pgolf::ngram_hash_embed: tokens hold {low if low < 0 else high}, "
            f"but has_leading_space has ids 0 to {len(has_leading_space) - 1}"
        )


@torch.library.custom_op("pgolf::ngram_hash_embed", mutates_args=())
def _ngram_hash_embed(
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    pos_conditional: bool,
    trigram: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(tokens, table, has_leading_space, scale, boost, pos_conditional)
    _check_ids(tokens, has_leading_space)
    if launch.uses_kernels("ngram_hash_embed", table):
        out = table.new_empty(*tokens.shape, table.shape[1], dtype=out_dtype)
        return _kernels_forward(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, out)
    rows = _gather(tokens, table, has_leading_space if pos_conditional else None, trigram)
    return (rows * _gate(tokens, has_leading_space, scale, boost)).to(out_dtype).contiguous()


@_ngram_hash_embed.register_fake
def _(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, out_dtype):
    _check(tokens, table, has_leading_space, scale, boost, pos_conditional)
    return table.new_empty(*tokens.shape, table.shape[1], dtype=out_dtype)


def _gather(tokens: Tensor, table: Tensor, split: Tensor | None, trigram: bool) -> Tensor:
    """Sum of the table rows of each token, (B, T, D), in at least float32."""
    bigram, third = reference.ngram_rows(tokens, table.shape[0], split, trigram)
    wide = torch.promote_types(table.dtype, torch.float32)
    rows = table[bigram].to(wide)
    return rows if third is None else rows + table[third].to(wide)


def _gate(tokens: Tensor, has_leading_space: Tensor | None, scale: Tensor, boost: Tensor) -> Tensor:
    """scale * gate, (B, T, 1) or (), in at least float32."""
    wide = scale.to(torch.promote_types(scale.dtype, torch.float32))
    if has_leading_space is None:
        return wide
    return torch.where(has_leading_space[tokens.long()].unsqueeze(-1), wide * boost, wide)


def _rows(t: Tensor) -> Tensor:
    """(..., D) as (rows, D) with unit inner stride, copied only where it cannot be viewed so."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _kernels_forward(
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    pos_conditional: bool,
    trigram: bool,
    out: Tensor,
) -> Tensor:
    from pgolf_fast.kernels.ngram_hash import launch_ngram_hash_embed_fwd

    if not out.numel():
        return out
    with launch.on_device_of(table):
        launch_ngram_hash_embed_fwd(
            tokens,
            _rows(table),
            _bytes(has_leading_space),
            scale,
            boost,
            out,
            multipliers=_MULTIPLIERS,
            split=pos_conditional,
            trigram=trigram,
            tile=launch.launch("ngram_hash_embed_fwd", table),
        )
    return out


_MULTIPLIERS = (reference.HASH_CURRENT, reference.HASH_PREVIOUS, reference.HASH_BEFORE)


def _bytes(flags: Tensor | None) -> Tensor | None:
    """Bools as bytes, which every Triton version loads alike."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


@torch.library.custom_op("pgolf::ngram_hash_embed_backward", mutates_args=())
def _ngram_hash_embed_backward(
    dout: Tensor,
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    pos_conditional: bool,
    trigram: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if launch.uses_kernels("ngram_hash_embed", table):
        return _kernels_backward(
            dout, tokens, table, has_leading_space, scale, boost, pos_conditional, trigram
        )
    split = has_leading_space if pos_conditional else None
    wide = torch.promote_types(table.dtype, torch.float32)
    dout = dout.to(wide)
    # d scale and d boost need <dout, rows> per token; the gather is repeated rather than saved
    along = (dout * _gather(tokens, table, split, trigram)).sum(-1)
    starts = (
        torch.zeros_like(along, dtype=torch.bool)
        if has_leading_space is None
        else has_leading_space[tokens.long()]
    )
    at_starts = torch.where(starts, along, 0).sum()
    dscale = at_starts * boost + torch.where(starts, 0, along).sum()
    dboost = at_starts * scale
    drows = (dout * _gate(tokens, has_leading_space, scale, boost)).reshape(-1, table.shape[1])
    dtable = torch.zeros_like(table, dtype=wide)
    for index in reference.ngram_rows(tokens, table.shape[0], split, trigram):
        if index is not None:
            dtable.index_add_(0, index.flatten(), drows)
    return dtable.to(table.dtype), dscale.to(scale.dtype).clone(), dboost.to(boost.dtype).clone()


@_ngram_hash_embed_backward.register_fake
def _(dout, tokens, table, has_leading_space, scale, boost, pos_conditional, trigram):
    return table.new_empty(table.shape), scale.new_empty(()), boost.new_empty(())


def _kernels_backward(
    dout: Tensor,
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    pos_conditional: bool,
    trigram: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from pgolf_fast.kernels import ngram_hash as kernels

    if not dout.numel():
        dtable, dscale, dboost = (torch.zeros_like(t) for t in (table, scale, boost))
        return dtable.contiguous(), dscale, dboost
    atomic = _table_gradient == "atomic" and not torch.are_deterministic_algorithms_enabled()
    count, dout = tokens.numel(), _rows(dout)
    config = launch.launch("ngram_hash_embed_bwd_tokens", table)
    partial = table.new_empty(kernels.token_programs(count, config), 2, dtype=torch.float32)
    rows: Tensor | None = None
    gate: Tensor | None = None
    total: Tensor | None = None
    if atomic:
        total = table.new_zeros(table.shape, dtype=torch.float32)
    else:
        row_dtype = torch.int32 if table.shape[0] < 2**31 else torch.int64
        rows = table.new_empty(count * (2 if trigram else 1), dtype=row_dtype)
        gate = table.new_empty(count, dtype=torch.float32)
    dscale, dboost = scale.new_empty(()), boost.new_empty(())
    with launch.on_device_of(table):
        kernels.launch_ngram_hash_embed_bwd_tokens(
            dout,
            tokens,
            _rows(table),
            _bytes(has_leading_space),
            scale,
            boost,
            rows,
            gate,
            partial,
            total,
            multipliers=_MULTIPLIERS,
            split=pos_conditional,
            trigram=trigram,
            tile=config,
        )
        config = launch.launch("ngram_hash_embed_bwd_scalars", table)
        kernels.launch_ngram_hash_embed_bwd_scalars(partial, scale, boost, dscale, dboost, config)
        dtable = _sorted_sums(dout, rows, gate, table) if total is None else total.to(table.dtype)
    return dtable, dscale, dboost


def _sorted_sums(dout: Tensor, rows: Tensor | None, gate: Tensor | None, table: Tensor) -> Tensor:
    """Gradient of the table from the row of every entry: no shape depends on the data, nothing is read back.

    Sorted entries are cut into pieces of one length, so that a row in thousands of them is the work of many
    programs; then every row adds up what it has in each piece.
    """
    from pgolf_fast.kernels import ngram_hash as kernels

    assert rows is not None
    assert gate is not None
    rows, order = torch.sort(rows, stable=True)
    config = launch.launch("ngram_hash_embed_bwd_pieces", table)
    num_rows, width = table.shape
    sums = gate.new_empty(num_rows + kernels.pieces(len(rows), config), width)
    dtable = table.new_empty(table.shape)
    kernels.launch_ngram_hash_embed_bwd_pieces(dout, gate, rows, order, sums, num_rows=num_rows, tile=config)
    kernels.launch_ngram_hash_embed_bwd_rows(
        rows,
        sums,
        dtable,
        piece=config.block_m,
        tile=launch.launch("ngram_hash_embed_bwd_rows", table),
    )
    return dtable


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.pos_conditional, ctx.trigram, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    dtable, dscale, dboost = torch.ops.pgolf.ngram_hash_embed_backward(
        dout, *ctx.saved_tensors, ctx.pos_conditional, ctx.trigram
    )
    return None, dtable, None, dscale, dboost, None, None, None


_ngram_hash_embed.register_autograd(_backward, setup_context=_setup_context)
