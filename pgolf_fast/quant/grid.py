"""Uniform grids with one step per row: percentile search for bank matrices, int8 for tables (PR 1501).

Also fake quantization: round in forward, pass gradients straight through in backward (Bengio 2013).
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgolf_fast.config.checks import need
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.weights import not_finite

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT8_PERCENTILE = 0.9999984
Coded = tuple[Tensor, Tensor]  # codes int8 (R, C), scale float16 (R,)
SMALLEST_SCALE = 2.0**-24  # the smallest float16, so that a row of zeros has a step to divide by


def row_scale(row_clip: Tensor, clip_range: int, *, floor: bool = True) -> Tensor:
    """Return each row's step, float16 (R,): row_clip / clip_range, with `floor` at least 1 / clip_range."""
    smallest = 1.0 / clip_range if floor else SMALLEST_SCALE
    return (row_clip.float() / clip_range).clamp_min(smallest).half()


def row_clips(weight: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Return quantiles of |row|, float32 (percentiles, R): bit-identical to `torch.quantile`.

    Sorts only the largest values of each row, as many as the lowest percentile needs.
    """
    size = weight.float().abs()
    last = size.shape[1] - 1
    ranks = torch.tensor(percentiles, dtype=torch.float32) * last
    below, above = ranks.floor().long(), ranks.ceil().long()
    largest = size.topk(last - int(below.min()) + 1, dim=1).values.T
    share = (ranks - below).to(size.device)[:, None]
    return torch.lerp(largest[(last - below).to(size.device)], largest[(last - above).to(size.device)], share)


def scale_candidates(
    weight: Tensor, clip_range: int, shares: Sequence[float], floor: bool, sigmas: float | None = None
) -> list[Tensor]:
    """Return the distinct row scales, float16 (R,), of the percentiles `shares`, in their order.

    With `sigmas`, there is only that of `sdclip_scale`.

    With the floor, all rows below 1.0 get the same step, so there is often only one candidate.
    """
    if sigmas is not None:
        return [sdclip_scale(weight, clip_range, sigmas)]
    candidates: list[Tensor] = []
    for clip in row_clips(weight, shares):
        scale = row_scale(clip, clip_range, floor=floor)
        if not any(torch.equal(scale, other) for other in candidates):
            candidates.append(scale)
    return candidates


def sdclip_scale(weight: Tensor, clip_range: int, sigmas: float) -> Tensor:
    """Return row scales, float16 (R,), that clip a row at `sigmas` of its standard deviations (PR 1394)."""
    return row_scale(sigmas * weight.float().std(dim=1), clip_range, floor=False)


def round_to_grid(weight: Tensor, scale: Tensor, clip_range: int) -> Tensor:
    """Round to the nearest codes in -clip_range..clip_range, int8 (R, C)."""
    steps = torch.round(weight.float() / scale.float()[:, None])
    return steps.clamp_(-clip_range, clip_range).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return codes * scale, float32 (R, C)."""
    return codes.float() * scale.float()[:, None]


def best_candidate(weight: Tensor, candidates: Sequence[Coded]) -> Coded:
    """Return the (codes, scale) with the least squared error over the matrix; the first on a tie."""
    if len(candidates) == 1:
        return candidates[0]
    errors = [(weight.float() - dequantize(*c)).square().mean().item() for c in candidates]
    return candidates[errors.index(min(errors))]


def quantize_rows(
    weight: Tensor,
    *,
    clip_range: int = 31,
    percentiles: Sequence[float] = PERCENTILES,
    scale_floor: bool = True,
    name: str = "weight",
) -> Coded:
    """Round to nearest: codes int8 (R, C) in -clip_range..clip_range and scale float16 (R,).

    One percentile serves the whole matrix: the one with the least squared error (PR 1501).
    Raises PgolfError unless weight is a finite matrix.
    """
    check_matrix(weight, name)
    scales = scale_candidates(weight, clip_range, percentiles, scale_floor)
    return best_candidate(weight, [(round_to_grid(weight, s, clip_range), s) for s in scales])


def quantize_int8_rows(weight: Tensor, *, scale_floor: bool = True, name: str = "weight") -> Coded:
    """Round an embedding table to codes int8 (R, C) in -127..127 and scale float16 (R,) (PR 1501).

    Rows are clipped just below their largest value. Raises PgolfError unless weight is a finite matrix.
    """
    check_matrix(weight, name)
    clip = row_clips(weight, [INT8_PERCENTILE])[0]
    # like the original, round with the float32 step and store the float16 one
    step = (clip / 127).clamp_min(1.0 / 127 if scale_floor else SMALLEST_SCALE)
    clipped = weight.float().clamp(-clip[:, None], clip[:, None])
    return round_to_grid(clipped, step, 127), step.half()


def check_matrix(weight: Tensor, name: str = "weight") -> None:
    """Raise PgolfError unless `weight` is a non-empty matrix of finite numbers."""
    what = f"{name} has shape {tuple(weight.shape)}"
    need(weight.ndim == 2 and weight.numel(), f"{what}; a matrix with rows and columns is needed")
    if problem := not_finite(weight):
        raise PgolfError(f"{name}: {problem}: the run diverged, quantize an earlier checkpoint")


class _Round(torch.autograd.Function):
    """Round to step * (low..high) + offset in at least float32; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, weight: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        codes = torch.round((wide if offset is None else wide - offset) / step).clamp_(low, high)
        return (codes * step if offset is None else codes * step + offset).to(weight.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grads[0], None, None, None, None


def fake_quantize_rows(weight: Tensor, clip_range: int = 31, *, scale_floor: bool = True) -> Tensor:
    """Round `weight` (..., R, C) to its rows' grids, in its dtype; gradients pass straight through.

    Steps are max |row| / clip_range, with `scale_floor` at least 1 / clip_range; codes >= -clip_range - 1.
    """
    with torch.no_grad():
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        largest = wide.abs().amax(dim=-1, keepdim=True)
        step = (largest / clip_range).clamp_min(1.0 / clip_range if scale_floor else SMALLEST_SCALE)
    return _Round.apply(weight, step, -clip_range - 1, clip_range, None)


_same_partial = functools.cache(functools.partial)  # the same object for the same arguments


def make_fake(bits: int, scale_floor: bool = True) -> Callable[[Tensor], Tensor]:
    """Return the fake quantization of a width: the same object for the same arguments, for torch.compile.

    Raises PgolfError unless bits is 2 to 8.
    """
    need(2 <= bits <= 8, f"fake quantization to {bits} bits is not possible; use 2 to 8")
    return _same_partial(fake_quantize_rows, clip_range=2 ** (bits - 1) - 1, scale_floor=scale_floor)


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
