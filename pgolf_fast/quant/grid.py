"""Uniform grids with one step per row: 6-bit rows by percentile search, 8-bit rows for tables (PR 1501)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT8_PERCENTILE = 0.9999984
SMALLEST_SCALE = 2.0**-24  # of float16, so that a row of zeros has a step to be divided by


def row_scale(row_clip: Tensor, clip_range: int, *, floor: bool = True) -> Tensor:
    """Step of each row, float16 (R,): row_clip / clip_range, with `floor` never below 1 / clip_range."""
    smallest = 1.0 / clip_range if floor else SMALLEST_SCALE
    return (row_clip.float() / clip_range).clamp_min(smallest).half()


def row_clips(weight: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Quantiles of |row|, float32 (percentiles, R), interpolated linearly: `torch.quantile` to the bit.

    Of a row only the largest values are put in order, as many as the lowest percentile reaches down to.
    """
    size = weight.float().abs()
    last = size.shape[1] - 1
    ranks = torch.tensor(percentiles, dtype=torch.float32) * last
    below, above = ranks.floor().long(), ranks.ceil().long()
    largest = size.topk(last - int(below.min()) + 1, dim=1).values.T
    share = (ranks - below).to(size.device)[:, None]
    return torch.lerp(largest[(last - below).to(size.device)], largest[(last - above).to(size.device)], share)


def scale_candidates(
    weight: Tensor, clip_range: int, percentiles: Sequence[float], floor: bool
) -> list[Tensor]:
    """The different row scales, float16 (R,), that the percentiles lead to, in their order.

    With the floor, rows below 1.0 all get the same step, so there is often one candidate only.
    """
    candidates: list[Tensor] = []
    for clip in row_clips(weight, percentiles):
        scale = row_scale(clip, clip_range, floor=floor)
        if not any(torch.equal(scale, other) for other in candidates):
            candidates.append(scale)
    return candidates


def round_to_grid(weight: Tensor, scale: Tensor, clip_range: int) -> Tensor:
    """Nearest codes in -clip_range..clip_range, int8 (R, C)."""
    steps = torch.round(weight.float() / scale.float()[:, None])
    return steps.clamp_(-clip_range, clip_range).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale, (R, C), computed in float32."""
    return (codes.float() * scale.float()[:, None]).to(dtype)


def best_candidate(weight: Tensor, candidates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (codes, scale) with the least squared error over the whole matrix; the first of equals."""
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
) -> tuple[Tensor, Tensor]:
    """Plain rounding: codes int8 (R, C) in -clip_range..clip_range and scale float16 (R,).

    Of the percentiles, the whole matrix takes the one with the least squared error (PR 1501).
    Raises PgolfError unless weight is a finite matrix.
    """
    check_matrix(weight)
    scales = scale_candidates(weight, clip_range, percentiles, scale_floor)
    return best_candidate(weight, [(round_to_grid(weight, s, clip_range), s) for s in scales])


def quantize_int8_rows(weight: Tensor, *, scale_floor: bool = True) -> tuple[Tensor, Tensor]:
    """Codes int8 (R, C) in -127..127 and scale float16 (R,) of an embedding table (PR 1501).

    Rows are clipped at a quantile that is nearly their largest value. Raises PgolfError unless weight is a
    finite matrix.
    """
    check_matrix(weight)
    clip = row_clips(weight, [INT8_PERCENTILE])[0]
    # rounded with the float32 step, stored with the float16 one, as the original does
    step = (clip / 127).clamp_min(1.0 / 127 if scale_floor else SMALLEST_SCALE)
    clipped = weight.float().clamp(-clip[:, None], clip[:, None])
    codes = torch.round(clipped / step[:, None]).clamp_(-127, 127).to(torch.int8)
    return codes, step.half()


def check_matrix(weight: Tensor, name: str = "weight") -> None:
    """Raise PgolfError unless `weight` is a matrix of finite numbers that float16 scales can reach."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise PgolfError(f"{name} has shape {tuple(weight.shape)}; a matrix with rows and columns is needed")
    if not bool(torch.isfinite(weight).all()):
        raise PgolfError(
            f"{name} has values that are not finite: the training run diverged, so there is "
            "nothing to quantise; use an earlier checkpoint"
        )
