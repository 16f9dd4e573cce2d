"""Lower bounds on the bytes of integer matrices: entropies of their codes within classes of elements.

Every bound is the plug-in entropy of the codes under their own histograms, so no static coder with these
classes does better. `Bound.bytes` excludes what a decoder needs besides, the histograms and classes;
`Bound.side_bytes` estimates that. A histogram per row would mostly be side information: 512 codes of 63
values have a plug-in entropy about 0.05 bits too low. Rows and columns are therefore classified by their
scale only, in steps of 1/8 octave, and all elements of a class share a histogram.

order 0       one histogram per matrix
row           classified by the root mean square of the row; classes are shared by all matrices
row x column  classified by the level of the row plus that of the column, where the levels maximize the
              likelihood of Gaussian codes of variance row * column; classes are shared by all matrices
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Levels = NDArray[np.int32]
STEPS_PER_OCTAVE = 8
_CLASSES = 512  # sums of a row level and a column level, each within +-_CLASSES / 4
_SWEEPS = 5  # alternations over rows and columns; the fourth changes no level by 1e-4
_SMALLEST = 1e-4  # variance of a row of zeros


@dataclass(frozen=True)
class Bound:
    """Bytes of the codes alone, and an estimate of the side information.

    side_bytes: the entropy of the row and column classes, plus log2(n) / 2 bits per free parameter of a
    histogram of n codes (J. Rissanen, "Modeling by shortest data description", 1978).
    """

    bytes: float
    side_bytes: float


def static_bounds(matrices: Sequence[Codes]) -> dict[str, Bound]:
    """Return the bounds of the module docstring for int8 matrices (R, C)."""
    order0 = np.stack([_counts(codes, np.zeros((1, 1), np.int32), 1)[0] for codes in matrices])
    return {
        "order 0": _bound(order0, []),
        "row": _classed(matrices, _row_levels),
        "row x column": _classed(matrices, _row_and_column_levels),
    }


def plane_bound(parts: Sequence[tuple[bytes, int]]) -> Bound:
    """Return the order-0 bound of (little-endian items, item size), with one histogram per byte plane."""
    counts = []
    for data, itemsize in parts:
        planes = np.frombuffer(data, np.uint8).reshape(-1, itemsize)
        counts += [np.bincount(planes[:, plane], minlength=256) for plane in range(itemsize)]
    return _bound(np.stack(counts), [])


def _classed(matrices: Sequence[Codes], levels_of: Callable[[Codes], list[Levels]]) -> Bound:
    """Bound matrices whose classes come from `levels_of`: row levels, and column levels if any."""
    table = np.zeros((_CLASSES, 256), np.int64)
    all_levels = []
    for codes in matrices:
        levels = levels_of(codes)
        classes = levels[0][:, None] + (levels[1] if len(levels) > 1 else 0) + _CLASSES // 2
        table += _counts(codes, classes, _CLASSES)
        all_levels += levels
    return _bound(table, all_levels)


def _row_levels(codes: Codes) -> list[Levels]:
    return [_level(np.square(codes, dtype=np.float32).mean(1))]


def _row_and_column_levels(codes: Codes) -> list[Levels]:
    squares = np.square(codes, dtype=np.float32)
    columns = np.ones(codes.shape[1], np.float32)
    for _ in range(_SWEEPS):  # maximizes the likelihood of one side given the other
        rows = np.maximum(squares @ (1 / columns) / codes.shape[1], _SMALLEST)
        columns = np.maximum((1 / rows) @ squares / codes.shape[0], _SMALLEST)
        columns /= np.exp(np.log(columns).mean())  # the common factor belongs to the rows
    return [_level(rows), _level(columns)]


def _level(variance: NDArray[np.float32]) -> Levels:
    octaves = 0.5 * np.log2(np.maximum(variance, _SMALLEST))
    limit = _CLASSES // 4 - 1
    return np.clip(np.rint(STEPS_PER_OCTAVE * octaves), -limit, limit).astype(np.int32)


def _counts(codes: Codes, classes: Levels, size: int) -> NDArray[np.int64]:
    """Count each byte value per class, (size, 256); classes broadcast to the shape of codes."""
    cells = classes * 256 + codes.view(np.uint8)
    return np.bincount(cells.ravel(), minlength=size * 256).reshape(size, 256)


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    """Return the bits of all counted symbols, each row of counts being its own histogram."""
    seen = counts > 0
    share = np.divide(counts, counts.sum(-1, keepdims=True), out=np.ones(counts.shape), where=seen)
    return -float((counts * np.log2(share)).sum())


def _bound(table: NDArray[np.int64], all_levels: Sequence[Levels]) -> Bound:
    totals, numbers = table.sum(1), (table > 0).sum(1)
    side = 0.5 * float((np.maximum(numbers - 1, 0) * np.log2(np.maximum(totals, 1))).sum())
    if all_levels:
        levels = np.concatenate(all_levels)
        side += _entropy_bits(np.bincount(levels - levels.min())[None])
    return Bound(_entropy_bits(table) / 8, side / 8)
