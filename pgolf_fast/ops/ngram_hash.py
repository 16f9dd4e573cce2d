"""pgolf::ngram_hash_embed: hashed bigram and trigram embedding with a word-start gate (PR 1501)."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pgolf_fast.ops import checks, reference, tiles
from pgolf_fast.ops.checks import as_rows, expect_shape
from pgolf_fast.ops.tiles import Tile

# Not measured; all are bound by memory.
tiles.declare("ngram_hash_embed_fwd", sm90=Tile(32, 128, num_warps=4))
tiles.declare("ngram_hash_embed_bwd_tokens", sm90=Tile(32, 128, num_warps=4))
tiles.declare("ngram_hash_embed_bwd_scalars", sm90=Tile(block_n=1024, num_warps=4))
# block_m is the length of a piece: short, so that many programs share a frequent bigram.
tiles.declare("ngram_hash_embed_bwd_pieces", sm90=Tile(32, 64, num_warps=1))
tiles.declare("ngram_hash_embed_bwd_rows", sm90=Tile(16, 64, num_warps=1))

TableGradient = Literal["sorted", "atomic"]
_table_gradient: TableGradient = "sorted"


def choose_table_gradient(how: TableGradient) -> None:
    """Choose how the kernels sum the table's gradient, in this process.

    "sorted" (the default) sorts the rows in use and sums each in a fixed order: bitwise reproducible.
    "atomic" adds in float32 in the order in which programs finish, which varies between runs; it is ignored
    if torch.are_deterministic_algorithms_enabled(). Raises ValueError for any other name.
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
    """Return `scale * gate * (table[bigram row] [+ table[trigram row]])` for every token.

    tokens (B, T) integers; table (rows, D); has_leading_space (vocab,) bool, or None for no gate and no
    split; scale and boost () floats: the gate is `boost` at word starts and 1 elsewhere. The result is
    (B, T, D) in `out_dtype` (default: the table's). `reference.ngram_rows` defines the rows; a key never
    depends on later tokens.
    Raises ValueError if shapes, dtypes or devices do not match, IndexError for a token outside
    has_leading_space. On a GPU that check would synchronize; kernels return NaN for such a token instead.
    """
    dtype = out_dtype or table.dtype
    return torch.ops.pgolf.ngram_hash_embed(
        tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, dtype
    )


class _Call(NamedTuple):
    tokens: Tensor
    table: Tensor
    has_leading_space: Tensor | None
    scale: Tensor
    boost: Tensor
    pos_conditional: bool
    trigram: bool

    def rows(self) -> tuple[Tensor, Tensor | None]:
        split = self.has_leading_space if self.pos_conditional else None
        return reference.ngram_rows(self.tokens, self.table.shape[0], split, self.trigram)

    def gather(self) -> Tensor:
        """Return the sum of each token's table rows, (B, T, D), in at least float32."""
        bigram, third = self.rows()
        wide = torch.promote_types(self.table.dtype, torch.float32)
        rows = self.table[bigram].to(wide)
        return rows if third is None else rows + self.table[third].to(wide)

    def gate(self) -> Tensor:
        """Return scale * gate, (B, T, 1) or (), in at least float32."""
        wide = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32))
        if self.has_leading_space is None:
            return wide
        return torch.where(self.has_leading_space[self.tokens.long()].unsqueeze(-1), wide * self.boost, wide)

    def kernel_inputs(self) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Return tensors and options of the kernels; bools as bytes, which every Triton loads the same."""
        flags = self.has_leading_space
        flags = None if flags is None else flags.contiguous().view(torch.uint8)
        multipliers = (reference.HASH_CURRENT, reference.HASH_PREVIOUS, reference.HASH_BEFORE)
        options = {"multipliers": multipliers, "split": self.pos_conditional, "trigram": self.trigram}
        return (self.tokens, as_rows(self.table), flags, self.scale, self.boost), options


def _checked(*arguments: Any) -> _Call:
    op, call = "ngram_hash_embed", _Call(*arguments)
    tokens, table, flags, scale, boost = call[:5]
    expect_shape(op, "tokens", tokens, (None, None))
    expect_shape(op, "table", table, (None, None))
    checks.expect_floating(op, "table", table)
    expect_shape(op, "scale", scale, ())
    expect_shape(op, "boost", boost, ())
    checks.same_device(op, tokens=tokens, table=table, scale=scale, boost=boost)
    if flags is not None:
        expect_shape(op, "has_leading_space", flags, (None,))
        checks.expect_dtype(op, "has_leading_space", flags, torch.bool)
        checks.same_device(op, tokens=tokens, has_leading_space=flags)
    checks.expect_integer(op, "tokens", tokens)
    if table.shape[0] < 4:
        raise ValueError(f"pgolf::{op}: table has {table.shape[0]} rows; it needs at least 4")
    if call.pos_conditional and flags is None:
        raise ValueError(f"pgolf::{op}: pos_conditional needs has_leading_space, which is None")
    return call


@torch.library.custom_op(
    "pgolf::ngram_hash_embed",
    mutates_args=(),
    schema="(Tensor tokens, Tensor table, Tensor? has_leading_space, Tensor scale, Tensor boost, "
    "bool pos_conditional, bool trigram, ScalarType out_dtype) -> Tensor",
)
def _ngram_hash_embed(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, out_dtype):
    call = _checked(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram)
    if has_leading_space is not None:
        checks.expect_ids("ngram_hash_embed", "tokens", tokens, "has_leading_space", len(has_leading_space))
    if tiles.uses_kernels("ngram_hash_embed", table):
        return _forward_cuda(call, table.new_empty(*tokens.shape, table.shape[1], dtype=out_dtype))
    return (call.gather() * call.gate()).to(out_dtype).contiguous()


@_ngram_hash_embed.register_fake
def _(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram, out_dtype):
    _checked(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram)
    return table.new_empty(*tokens.shape, table.shape[1], dtype=out_dtype)


def _forward_cuda(call: _Call, out: Tensor) -> Tensor:
    from pgolf_fast.kernels.ngram_hash import launch_ngram_hash_embed_fwd

    if not out.numel():
        return out
    inputs, options = call.kernel_inputs()
    tile = tiles.lookup("ngram_hash_embed_fwd", call.table)
    with tiles.on_device_of(call.table):
        launch_ngram_hash_embed_fwd(*inputs, out, **options, tile=tile)
    return out


@torch.library.custom_op(
    "pgolf::ngram_hash_embed_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor tokens, Tensor table, Tensor? has_leading_space, Tensor scale, "
    "Tensor boost, bool pos_conditional, bool trigram) -> (Tensor, Tensor, Tensor)",
)
def _ngram_hash_embed_backward(
    dout, tokens, table, has_leading_space, scale, boost, pos_conditional, trigram
):
    run = _backward_cuda if tiles.uses_kernels("ngram_hash_embed", table) else _backward_cpu
    return run(dout, _Call(tokens, table, has_leading_space, scale, boost, pos_conditional, trigram))


def _backward_cpu(dout: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    table, flags, scale, boost = call.table, call.has_leading_space, call.scale, call.boost
    wide = torch.promote_types(table.dtype, torch.float32)
    dout = dout.to(wide)
    # d scale and d boost need <dout, rows> per token; gathering again is cheaper than saving the rows
    along = (dout * call.gather()).sum(-1)
    starts = torch.zeros_like(along, dtype=torch.bool) if flags is None else flags[call.tokens.long()]
    at_starts = torch.where(starts, along, 0).sum()
    dscale = at_starts * boost + torch.where(starts, 0, along).sum()
    dboost = at_starts * scale
    drows = (dout * call.gate()).reshape(-1, table.shape[1])
    dtable = torch.zeros_like(table, dtype=wide)
    for index in call.rows():
        if index is not None:
            dtable.index_add_(0, index.flatten(), drows)
    return dtable.to(table.dtype), dscale.to(scale.dtype).clone(), dboost.to(boost.dtype).clone()


@_ngram_hash_embed_backward.register_fake
def _(dout, tokens, table, has_leading_space, scale, boost, pos_conditional, trigram):
    return table.new_empty(table.shape), scale.new_empty(()), boost.new_empty(())


def _backward_cuda(dout: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    from pgolf_fast.kernels import ngram_hash as kernels

    table, scale, boost = call.table, call.scale, call.boost
    if not dout.numel():
        dtable, dscale, dboost = (torch.zeros_like(t) for t in (table, scale, boost))
        return dtable.contiguous(), dscale, dboost
    atomic = _table_gradient == "atomic" and not torch.are_deterministic_algorithms_enabled()
    count, dout = call.tokens.numel(), as_rows(dout)
    tile = tiles.lookup("ngram_hash_embed_bwd_tokens", table)
    partial = table.new_empty(kernels.token_programs(count, tile), 2, dtype=torch.float32)
    rows = gate = total = None
    if atomic:
        total = table.new_zeros(table.shape, dtype=torch.float32)
    else:
        row_dtype = torch.int32 if table.shape[0] < 2**31 else torch.int64
        rows = table.new_empty(count * (2 if call.trigram else 1), dtype=row_dtype)
        gate = table.new_empty(count, dtype=torch.float32)
    dscale, dboost = scale.new_empty(()), boost.new_empty(())
    inputs, options = call.kernel_inputs()
    with tiles.on_device_of(table):
        outputs = (rows, gate, partial, total)
        kernels.launch_ngram_hash_embed_bwd_tokens(dout, *inputs, *outputs, **options, tile=tile)
        tile = tiles.lookup("ngram_hash_embed_bwd_scalars", table)
        kernels.launch_ngram_hash_embed_bwd_scalars(partial, scale, boost, dscale, dboost, tile)
        dtable = _sorted_sums(dout, rows, gate, table) if total is None else total.to(table.dtype)
    return dtable, dscale, dboost


def _sorted_sums(dout: Tensor, rows: Tensor | None, gate: Tensor | None, table: Tensor) -> Tensor:
    """Sum the table's gradient by row; no shape depends on the data, so nothing synchronizes.

    Sorted entries are cut into pieces of equal length, so that many programs share a row with thousands of
    entries; then every row adds up its share of each piece.
    """
    from pgolf_fast.kernels import ngram_hash as kernels

    assert rows is not None
    assert gate is not None
    rows, order = torch.sort(rows, stable=True)
    tile = tiles.lookup("ngram_hash_embed_bwd_pieces", table)
    num_rows, width = table.shape
    sums = gate.new_empty(num_rows + kernels.pieces(len(rows), tile), width)
    dtable = table.new_empty(table.shape)
    kernels.launch_ngram_hash_embed_bwd_pieces(dout, gate, rows, order, sums, num_rows=num_rows, tile=tile)
    per_row = tiles.lookup("ngram_hash_embed_bwd_rows", table)
    kernels.launch_ngram_hash_embed_bwd_rows(rows, sums, dtable, piece=tile.block_m, tile=per_row)
    return dtable


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.pos_conditional, ctx.trigram, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dtable, dscale, dboost = torch.ops.pgolf.ngram_hash_embed_backward(
        dout, *ctx.saved_tensors, ctx.pos_conditional, ctx.trigram
    )
    return None, dtable, None, dscale, dboost, None, None, None


_ngram_hash_embed.register_autograd(_backward, setup_context=_setup_context)
