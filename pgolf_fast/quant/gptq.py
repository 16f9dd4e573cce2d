"""GPTQ: rounds column by column and lets the columns to come make up for each error (Frantar et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError
from pgolf_fast.quant.grid import PERCENTILES, best_candidate, check_matrix, scale_candidates

# Elements up to which torch keeps an elementwise operation on one thread. Tens of thousands of small ones
# that wait for a second thread took 15 to 40 s for exp101 on two busy cores, against 4.5 s on one thread.
_ONE_THREAD = 32_768


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    clip_range: int = 31,
    percentiles: Sequence[float] = PERCENTILES,
    scale_floor: bool = True,
    block_size: int = 128,
    damping: float = 0.01,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Codes int8 (R, C) and scale float16 (R,) of weight (R, C) that keep x W^T close for inputs x.

    hessian (C, C) is the sum of x^T x, to any factor. Columns go in descending order of its diagonal, to
    which `damping` times its mean is added; row scales are searched as in `quantize_rows` (PR 1501).
    Raises PgolfError for shapes that do not fit, values that are not finite, or a hessian that is not
    positive definite even with 100 times the damping.
    """
    weights = {name: weight}
    return gptq_shared(
        weights,
        hessian,
        clip_range=clip_range,
        percentiles=percentiles,
        scale_floor=scale_floor,
        block_size=block_size,
        damping=damping,
    )[name]


def gptq_shared(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    *,
    clip_range: int = 31,
    percentiles: Sequence[float] = PERCENTILES,
    scale_floor: bool = True,
    block_size: int = 128,
    damping: float = 0.01,
) -> dict[str, tuple[Tensor, Tensor]]:
    """`gptq` of several matrices with one input (say, of Q, K and V), for the price of one factorisation.

    Rows do not influence each other, so all matrices and all candidate scales go through in one pass.
    """
    names = ", ".join(weights)
    for name, weight in weights.items():
        _check(name, weight, hessian)
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    dead = torch.diagonal(hessian) == 0
    factor = _inverse_factor(hessian[order][:, order], damping, names)
    rows, scales, owners = [], [], []
    for name, weight in weights.items():
        live = weight.float().masked_fill(dead, 0.0)[:, order]
        for scale in scale_candidates(weight, clip_range, percentiles, scale_floor):
            rows.append(live)
            scales.append(scale)
            owners.append(name)
    # columns are worked on one by one, so they lie contiguous: (C, all rows)
    codes = _round_columns(
        torch.cat(rows).T.contiguous(), torch.cat(scales).float(), factor, clip_range, block_size
    )
    undone = torch.empty_like(codes)
    undone[order] = codes
    parts = undone.T.split([len(s) for s in scales])
    results = {}
    for name, weight in weights.items():
        mine = [
            (c.contiguous(), s) for c, s, owner in zip(parts, scales, owners, strict=True) if owner == name
        ]
        results[name] = best_candidate(weight, mine)
    return results


def _check(name: str, weight: Tensor, hessian: Tensor) -> None:
    check_matrix(weight, name)
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise PgolfError(
            f"{name} has {columns} columns, so its hessian must be ({columns}, {columns}), "
            f"but it is {tuple(hessian.shape)}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise PgolfError(f"the hessian of {name} has values that are not finite: check the calibration text")


def _inverse_factor(hessian: Tensor, damping: float, names: str) -> Tensor:
    """Upper U, float32 (C, C), with U^T U = (H + damping mean(diag H) I)^-1.

    With J reversing the order, J H J = L L^T gives H = (J L J)(J L J)^T, and J L J is upper: U = (J L J)^-1.
    In float64, where it costs little and Hessians of long, repetitive text stay positive definite.
    """
    wide = hessian.double()
    diagonal = torch.diagonal(wide)
    diagonal.masked_fill_(diagonal == 0, 1.0)
    mean = diagonal.mean().item()
    for strength in (damping, 10 * damping, 100 * damping):
        damped = wide + strength * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed.item():
            eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).float()
    raise PgolfError(
        f"the hessian of {names} is not positive definite, even with {100 * damping:g} of its mean "
        "diagonal added: calibrate with more text, raise quant.damping, or use quant.method round"
    )


def _round_columns(
    columns: Tensor, scale: Tensor, factor: Tensor, clip_range: int, block_size: int
) -> Tensor:
    """Codes int8 (C, N) of `columns` float32 (C, N), which is used up; scale (N,), factor (C, C)."""
    total, width = columns.shape
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    own = torch.diagonal(factor).tolist()
    tile = min(block_size, max(1, _ONE_THREAD // max(width, 1)))
    for start in range(0, total, block_size):
        end = min(start + block_size, total)
        for first in range(start, end, tile):
            last = min(first + tile, end)
            for i in range(first, last):
                code, error = codes[i], errors[i]
                torch.div(columns[i], scale, out=code).round_().clamp_(-clip_range, clip_range)
                torch.addcmul(columns[i], code, scale, value=-1, out=error).div_(own[i])
                if i + 1 < last:
                    columns[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
            _pass_on(columns, errors, factor, slice(first, last), slice(last, end))
        _pass_on(columns, errors, factor, slice(start, end), slice(end, total))
    return codes.to(torch.int8)


def _pass_on(columns: Tensor, errors: Tensor, factor: Tensor, done: slice, later: slice) -> None:
    """Take what the errors of the columns `done` call for off the columns `later`."""
    if later.start < later.stop:
        columns[later].addmm_(factor[done, later].T, errors[done], alpha=-1)
