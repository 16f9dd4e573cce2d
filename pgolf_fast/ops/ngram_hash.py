"""pgolf::ngram_hash_embed — hashed bigram and trigram embedding with a word-start gate (PR 1501)."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.ops import reference
from pgolf_fast.ops.checks import expect_shape


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
    Raises ValueError for shapes that do not fit.
    """
    dtype = out_dtype or table.dtype
    return torch.ops.pgolf.ngram_hash_embed(
        tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, dtype
    )


def _check(tokens: Tensor, table: Tensor, has_leading_space: Tensor | None, pos_conditional: bool) -> None:
    expect_shape("ngram_hash_embed", "tokens", tokens, (None, None))
    expect_shape("ngram_hash_embed", "table", table, (None, None))
    if tokens.is_floating_point():
        raise ValueError(
            f"pgolf::ngram_hash_embed: tokens.dtype is {tokens.dtype}; it must be an integer type"
        )
    if table.shape[0] < 4:
        raise ValueError(f"pgolf::ngram_hash_embed: table has {table.shape[0]} rows; it needs at least 4")
    if pos_conditional and has_leading_space is None:
        raise ValueError("pgolf::ngram_hash_embed: pos_conditional needs has_leading_space, which is None")


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
    _check(tokens, table, has_leading_space, pos_conditional)
    rows = _gather(tokens, table, has_leading_space if pos_conditional else None, trigram)
    return (rows * _gate(tokens, has_leading_space, scale, boost)).to(out_dtype).contiguous()


@_ngram_hash_embed.register_fake
def _(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, out_dtype):
    _check(tokens, table, has_leading_space, pos_conditional)
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
    return torch.where(has_leading_space[tokens].unsqueeze(-1), wide * boost, wide)


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
    split = has_leading_space if pos_conditional else None
    wide = torch.promote_types(table.dtype, torch.float32)
    dout = dout.to(wide)
    # d scale and d boost need <dout, rows> per token; the gather is repeated rather than saved
    along = (dout * _gather(tokens, table, split, trigram)).sum(-1)
    starts = (
        torch.zeros_like(along, dtype=torch.bool) if has_leading_space is None else has_leading_space[tokens]
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


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.pos_conditional, ctx.trigram, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    dtable, dscale, dboost = torch.ops.pgolf.ngram_hash_embed_backward(
        dout, *ctx.saved_tensors, ctx.pos_conditional, ctx.trigram
    )
    return None, dtable, None, dscale, dboost, None, None, None


_ngram_hash_embed.register_autograd(_backward, setup_context=_setup_context)
