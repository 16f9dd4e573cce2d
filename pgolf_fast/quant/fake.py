"""Fake quantisation: weights on the grid in forward, the identity in backward (PR 1501; Bengio 2013)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError


class _RoundRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, clip_range: int) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        step = (wide.abs().amax(dim=-1, keepdim=True) / clip_range).clamp_min(1.0 / clip_range)
        codes = torch.round(wide / step).clamp_(-clip_range - 1, clip_range)
        return (codes * step).to(weight.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantize_rows(weight: Tensor, clip_range: int = 31) -> Tensor:
    """`weight` (..., R, C) rounded to its rows' grids, in its dtype; gradients pass straight through.

    A row's step is max(|row|max, 1) / clip_range; codes run from -clip_range - 1 to clip_range.
    """
    return _RoundRows.apply(weight, clip_range)


def fake_int6(weight: Tensor) -> Tensor:
    """`fake_quantize_rows` at 6 bits: one object, for `model.banks(transform=fake_int6)`."""
    return fake_quantize_rows(weight, 31)


@functools.cache
def make_fake(bits: int) -> Callable[[Tensor], Tensor]:
    """Fake quantisation to that many bits; the same function object for the same bits.

    Raises PgolfError unless bits is 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise PgolfError(f"fake quantisation to {bits} bits is not possible; use 2 to 8")
    if bits == 6:
        return fake_int6
    return functools.partial(fake_quantize_rows, clip_range=2 ** (bits - 1) - 1)
