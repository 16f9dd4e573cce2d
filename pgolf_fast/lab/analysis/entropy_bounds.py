"""How few bytes integer matrices could take: entropies of their codes, given classes of their elements.

Every bound is the plug-in entropy of the codes under the histograms of the codes themselves, so that no
static coder with these classes does better. What a decoder has to be told besides, histograms and classes, is
not in `Bound.bytes`; `Bound.side_bytes` estimates it. A histogram for each row would be told rather than
coded: 512 codes of 63 values have a plug-in entropy some 0.05 bits too low. So rows and columns enter by
their scale only, one number each on a lattice of 1/8 octave, and all elements of a class share a histogram.

order 0       one histogram for each matrix
row           the class is the root mean square of the row; classes are shared by all matrices
row x column  the class is the level of the row plus that of the column, those under which the codes are most
              probable as Gaussians of variance row * column; classes are shared by all matrices
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Levels = NDArray[np.int32]
STEPS_PER_OCTAVE = 8
_CLASSES = 512  # that a level of a row and one of a column, each within +-_CLASSES / 4, can add up to
_SWEEPS = 5  # over rows and columns; the fourth changes no level by 1e-4 any more
_SMALLEST = 1e-4  # variance, of rows of zeros


@dataclass(frozen=True)
class Bound:
    """Bytes of the codes alone, and about what their classes and histograms would add.

    side_bytes: the entropy of the classes of rows and columns, and half of log2(n) bits for every number that
    a histogram of n codes determines (J. Rissanen, "Modeling by shortest data description", 1978).
    """

    bytes: float
    side_bytes: float


def static_bounds(matrices: Sequence[Codes]) -> dict[str, Bound]:
    """The bounds named above of matrices int8 (R, C)."""
    order0 = np.stack([_counts(codes, np.zeros((1, 1), np.int32), 1)[0] for codes in matrices])
    return {
        "order 0": _bound(order0, []),
        "row": _classed(matrices, _row_levels),
        "row x column": _classed(matrices, _row_and_column_levels),
    }


def plane_bound(parts: Sequence[tuple[bytes, int]]) -> Bound:
    """Order 0 of the byte planes of (little-endian items, bytes of an item), one histogram for each plane."""
    counts = []
    for data, itemsize in parts:
        planes = np.frombuffer(data, np.uint8).reshape(-1, itemsize)
        counts += [np.bincount(planes[:, plane], minlength=256) for plane in range(itemsize)]
    return _bound(np.stack(counts), [])


def _classed(matrices: Sequence[Codes], levels_of: Callable[[Codes], list[Levels]]) -> Bound:
    """`levels_of` gives the levels of a matrix's rows, and of its columns if those count."""
    table = np.zeros((_CLASSES, 256), np.int64)
    told = []
    for codes in matrices:
        levels = levels_of(codes)
        classes = levels[0][:, None] + (levels[1] if len(levels) > 1 else 0) + _CLASSES // 2
        table += _counts(codes, classes, _CLASSES)
        told += levels
    return _bound(table, told)


def _row_levels(codes: Codes) -> list[Levels]:
    return [_level(np.square(codes, dtype=np.float32).mean(1))]


def _row_and_column_levels(codes: Codes) -> list[Levels]:
    squares = np.square(codes, dtype=np.float32)
    columns = np.ones(codes.shape[1], np.float32)
    for _ in range(_SWEEPS):  # each side's maximum of the likelihood, given the other
        rows = np.maximum(squares @ (1 / columns) / codes.shape[1], _SMALLEST)
        columns = np.maximum((1 / rows) @ squares / codes.shape[0], _SMALLEST)
        columns /= np.exp(np.log(columns).mean())  # one of the two sides may carry what they share
    return [_level(rows), _level(columns)]


def _level(variance: NDArray[np.float32]) -> Levels:
    octaves = 0.5 * np.log2(np.maximum(variance, _SMALLEST))
    limit = _CLASSES // 4 - 1
    return np.clip(np.rint(STEPS_PER_OCTAVE * octaves), -limit, limit).astype(np.int32)


def _counts(codes: Codes, classes: Levels, size: int) -> NDArray[np.int64]:
    """How often each byte occurs in each class, (size, 256); classes broadcast to the shape of codes."""
    cells = classes * 256 + codes.view(np.uint8)
    return np.bincount(cells.ravel(), minlength=size * 256).reshape(size, 256)


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    """Bits of all symbols counted in rows, each row with its own histogram."""
    seen = counts > 0
    share = np.divide(counts, counts.sum(-1, keepdims=True), out=np.ones(counts.shape), where=seen)
    return -float((counts * np.log2(share)).sum())


def _bound(table: NDArray[np.int64], told: Sequence[Levels]) -> Bound:
    totals, numbers = table.sum(1), (table > 0).sum(1)
    side = 0.5 * float((np.maximum(numbers - 1, 0) * np.log2(np.maximum(totals, 1))).sum())
    if told:
        levels = np.concatenate(told)
        side += _entropy_bits(np.bincount(levels - levels.min())[None])
    return Bound(_entropy_bits(table) / 8, side / 8)
