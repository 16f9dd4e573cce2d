"""Fake quantization: round in forward, pass gradients straight through in backward (PR 1501; Bengio 2013)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError
from pgolf_fast.quant.grid import SMALLEST_SCALE


class _Round(torch.autograd.Function):
    """Round to step * (lowest..highest) + offset in at least float32; the gradient passes unchanged."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, step: Tensor, lowest: int, highest: int, offset: Tensor | None
    ) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        codes = torch.round((wide if offset is None else wide - offset) / step).clamp_(lowest, highest)
        return (codes * step if offset is None else codes * step + offset).to(weight.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grads[0], None, None, None, None


def fake_quantize_rows(weight: Tensor, clip_range: int = 31, *, scale_floor: bool = True) -> Tensor:
    """Round `weight` (..., R, C) to its rows' grids, in its dtype; gradients pass straight through.

    A row's step is max |row| / clip_range, with `scale_floor` at least 1 / clip_range. Codes run from
    -clip_range - 1 to clip_range.
    """
    with torch.no_grad():
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        largest = wide.abs().amax(dim=-1, keepdim=True)
        step = (largest / clip_range).clamp_min(1.0 / clip_range if scale_floor else SMALLEST_SCALE)
    return _Round.apply(weight, step, -clip_range - 1, clip_range, None)


@functools.cache
def _fake(clip_range: int, scale_floor: bool) -> Callable[[Tensor], Tensor]:
    return functools.partial(fake_quantize_rows, clip_range=clip_range, scale_floor=scale_floor)


def make_fake(bits: int, scale_floor: bool = True) -> Callable[[Tensor], Tensor]:
    """Return the fake quantization of a width: the same object for the same arguments, for torch.compile.

    Raises PgolfError unless bits is 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise PgolfError(f"fake quantization to {bits} bits is not possible; use 2 to 8")
    return _fake(2 ** (bits - 1) - 1, scale_floor)


class FixedGrid:
    """Fake quantization with fixed steps, such as an artifact's own: weights on the grid do not change.

    step float32: (..., R, 1) for rows, or (..., R, C) for elements. offset: float32 values of code 0, in the
    weights' shape; None for zero. Codes are clamped to -clip_range..clip_range.
    """

    def __init__(self, step: Tensor, clip_range: int, offset: Tensor | None = None):
        self.step, self.clip_range, self.offset = step, clip_range, offset

    def __call__(self, weight: Tensor) -> Tensor:
        offset = None if self.offset is None else self.offset.to(weight.device)
        return _Round.apply(weight, self.step.to(weight.device), -self.clip_range, self.clip_range, offset)


fake_int6 = make_fake(6)
"""PR 1501's grid: 6 bits, steps of at least 1/31."""
