"""Weight banks: four stacks of matrices that hold almost every parameter of the network.

With n layers, `qo` is (2n, D, D), queries then output projections; `kv` is (2n, KV*hd, D), keys then values;
`up` is (n, M, D) and `down` (n, D, M). Every slot belongs to one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.ops import reference

BANK_NAMES = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


@dataclass(frozen=True)
class Banks:
    """The four banks as forward reads them (compute dtype), and where backward adds gradients.

    Gradient banks are all given or all None; None leaves gradients to autograd. The projections of the hash
    n-gram and value embeddings are read from the model unless they are given here.
    """

    qo: Tensor
    kv: Tensor
    up: Tensor
    down: Tensor
    grad_qo: Tensor | None = None
    grad_kv: Tensor | None = None
    grad_up: Tensor | None = None
    grad_down: Tensor | None = None
    ngram_projection: Tensor | None = None
    value_projection: Tensor | None = None

    def weights(self) -> Iterator[Tensor]:
        yield from (self.qo, self.kv, self.up, self.down)

    def attention_of(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Return the banks of queries and outputs, of keys and values, and the layer's slot in them."""
        return self.qo, self.kv, layer

    def mlp_of(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Return the two MLP banks and the layer's slot in them."""
        return self.up, self.down, layer

    def project_in(self, layer: int, x: Tensor) -> Sequence[Tensor]:
        """Return q, k and v of a layer's normalized input (..., D), before value embedding and norm."""
        n = len(self.qo) // 2
        return [F.linear(x, w) for w in (self.qo[layer], self.kv[layer], self.kv[n + layer])]

    def project_out(self, layer: int, context: Tensor) -> Tensor:
        """Return the layer's output projection of `context` (..., D)."""
        return F.linear(context, self.qo[len(self.qo) // 2 + layer])


@dataclass(frozen=True, eq=False)
class PackedMatrices:
    """Matrices (n, R, C) as 6-bit codes in -32..31 times a step per row.

    codes: uint8 (n, R, bytes of a row), as `ops.int6_pack` makes them; scale: float32 (n, R).
    """

    codes: Tensor
    scale: Tensor
    columns: int

    def rows(self, layer: int, first: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Return codes and steps of some rows of one matrix, as `ops.int6_matmul` takes them."""
        return self.codes[layer, first:end], self.scale[layer, first:end]

    def dense(self, layer: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix (R, C) of a layer: codes * scale, rounded once to `dtype`."""
        return ops.dequantize_bits(*self.rows(layer), self.columns, 6, dtype)


class PackedBanks:
    """The four banks as packed 6-bit codes, for inference: 0.38 times the bytes of bfloat16 banks.

    `attention` stacks each layer's q, k, v and output matrices by rows. A few rows of x, as in decoding, are
    multiplied by the codes themselves; for more, `attention_of` and `mlp_of` make one layer's dense banks in
    `dtype`, which are those of the dequantized model.
    """

    grad_qo = grad_kv = grad_up = grad_down = ngram_projection = value_projection = None

    def __init__(self, attention: PackedMatrices, up: PackedMatrices, down: PackedMatrices):
        self.attention, self.up, self.down = attention, up, down
        self.dtype = torch.float32
        layers, dim = range(len(up.codes)), attention.columns
        kv = attention.codes.shape[1] // 2 - dim
        self._sizes = dim, kv, kv
        # views made once: slicing for each product would cost up to a tenth of its time
        self._inward = [attention.rows(layer, 0, dim + 2 * kv) for layer in layers]
        self._outward = [attention.rows(layer, dim + 2 * kv) for layer in layers]
        self._up, self._down = ([m.rows(layer) for layer in layers] for m in (up, down))

    def attention_of(self, layer: int) -> tuple[Tensor, Tensor, int]:
        dense, (dim, kv, _) = self.attention.dense(layer, self.dtype), self._sizes
        # slot 0 is the rows of q, slot 1 the rows of the output projection, which follow those of k and v
        qo = dense.as_strided((2, dim, dim), ((dim + 2 * kv) * dim, dim, 1))
        return qo, dense[dim : dim + 2 * kv].view(2, kv, dim), 0

    def mlp_of(self, layer: int) -> tuple[Tensor, Tensor, int]:
        up, down = (part.dense(layer, self.dtype)[None] for part in (self.up, self.down))
        return up, down, 0

    def project_in(self, layer: int, x: Tensor) -> Sequence[Tensor]:
        return ops.int6_matmul(x, *self._inward[layer]).split(self._sizes, dim=-1)

    def project_out(self, layer: int, context: Tensor) -> Tensor:
        return ops.int6_matmul(context, *self._outward[layer])

    def mlp(self, layer: int, x: Tensor, activation: str) -> Tensor:
        """Return the layer's MLP of its normalized input (..., D)."""
        hidden = reference.activation(ops.int6_matmul(x, *self._up[layer]), activation)
        return ops.int6_matmul(hidden, *self._down[layer])

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the four banks, in the order of BANK_NAMES."""
        n, (dim, kv, _), hidden = len(self._up), self._sizes, self.down.columns
        return [(2 * n, dim, dim), (2 * n, kv, dim), (n, self.up.codes.shape[1], dim), (n, dim, hidden)]

    def unpacked(self) -> list[Tensor]:
        """Return the four float32 banks, in the order of BANK_NAMES."""
        layers, (dim, kv, _) = range(len(self._up)), self._sizes
        parts = [self.attention.dense(layer, torch.float32).split((dim, kv, kv, dim)) for layer in layers]
        q, k, v, out = (torch.stack(part) for part in zip(*parts, strict=True))
        mlp = (torch.stack([m.dense(i, torch.float32) for i in layers]) for m in (self.up, self.down))
        return [torch.cat((q, out)), torch.cat((k, v)), *mlp]


def make_banks(weights: list[Tensor], grads: list[Tensor] | None = None) -> Banks:
    """Return `Banks` from lists in the order of BANK_NAMES.

    With gradient banks the weights become leaves that require grad: backward must always reach the ops.
    """
    if grads is None:
        return Banks(*weights)
    return Banks(*(w.detach().requires_grad_() for w in weights), *grads)


class _SlotRows(torch.autograd.Function):
    """Rows of a slot, whose gradient is added to a gradient bank as the bank-indexed ops do."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, grad_bank: Tensor, slot: int, count: int) -> Tensor:
        ctx.grad_bank, ctx.slot = grad_bank, slot
        return bank[slot, :count].clone()

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[None, ...]:
        ctx.grad_bank[ctx.slot, : len(douts[0])].add_(douts[0])
        return (None,) * 4


def slot_rows(bank: Tensor, slot: int, count: int, grad_bank: Tensor | None) -> Tensor:
    """Return the first rows of a bank's slot, (count, C); backward adds to `grad_bank` if there is one."""
    if grad_bank is None or not torch.is_grad_enabled():
        return bank[slot, :count]
    return _SlotRows.apply(bank, grad_bank, slot, count)


# Maps master banks to what forward reads: one function for all, one for each, or None for the masters
Transform = Callable[[Tensor], Tensor] | tuple[Callable[[Tensor], Tensor], ...] | None


def transformed(masters: Sequence[Tensor], transform: Transform) -> list[Tensor]:
    """Return the four banks after `transform`."""
    if transform is None:
        return list(masters)
    functions = transform if isinstance(transform, tuple) else (transform,) * len(masters)
    return [function(master) for function, master in zip(functions, masters, strict=True)]


class Shadow:
    """Compute-dtype copies of the master banks, refreshed only when a master has changed."""

    def __init__(self) -> None:
        self._key: object = None
        self._weights: list[Tensor] = []

    def get(self, masters: list[Tensor], dtype: torch.dtype, transform: Transform) -> list[Tensor]:
        """Return `masters` after `transform` in `dtype`; the masters themselves if nothing changes them."""
        if transform is None and all(m.dtype == dtype for m in masters):
            return [m.detach() for m in masters]
        key = self._key_of(masters, dtype, transform)
        if key != self._key:
            with torch.no_grad(), torch.inference_mode(False):
                new = [w.to(dtype) for w in transformed(masters, transform)]
            kept = [(w.shape, w.dtype, w.device) for w in self._weights]
            if kept == [(w.shape, w.dtype, w.device) for w in new]:
                for old, fresh in zip(self._weights, new, strict=True):
                    old.copy_(fresh)  # compiled and captured graphs need stable addresses
            else:
                self._weights = new
            self._key = key
        return self._weights

    def current(self, masters: list[Tensor], dtype: torch.dtype) -> list[Tensor] | None:
        """Return the copies if they are up to date; an optimizer may then write them with the masters."""
        held = self._weights and self._key == self._key_of(masters, dtype, None)
        return self._weights if held else None

    def written(self, masters: list[Tensor], dtype: torch.dtype) -> None:
        """Record that the copies were written together with the masters."""
        self._key = self._key_of(masters, dtype, None)

    @staticmethod
    def _key_of(masters: list[Tensor], dtype: torch.dtype, transform: Transform) -> object:
        return (dtype, transform, *((id(m), m.data_ptr(), m._version) for m in masters))
