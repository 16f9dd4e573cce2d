"""What an ideal static coder needs for integer matrices: the entropies that packing is measured against.

Each bound is the entropy of the codes given a class of every element, with the histograms of the codes
themselves, so no static coder with these classes can do better:

one histogram   all codes alike
order 0         one histogram a matrix
row             the class is that of the row: its root mean square on a lattice of 1/8 octave; classes are
                shared by all matrices
row x column    the class is that of row scale times column scale on the same lattice, with the scales that
                are likeliest if the codes are Gaussian

A coder has to know histograms and classes too. What they take is not in `bytes`; `side_bytes` estimates it,
at half of log2(n) bits for a number that n codes determine, and the entropy of the classes of rows and
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Levels = NDArray[np.int64]
STEPS_PER_OCTAVE = 8
_LEVELS = 256  # of the lattice; level 128 is a scale of 1
_SWEEPS = 10


@dataclass(frozen=True)
class Bound:
    """Bytes of the codes alone, and about what the classes and histograms would add."""

    bytes: float
    side_bytes: float


def static_bounds(matrices: Sequence[Codes]) -> dict[str, Bound]:
    """The bounds of matrices int8 (R, C), by name."""
    tables = [_counts(np.zeros((1, 1), np.int64), m, 1) for m in matrices]
    found = {"one histogram": _bound(np.sum(tables, axis=0)), "order 0": _bound(np.concatenate(tables))}
    for name, split in {"row": _by_row, "row x column": _by_row_and_column}.items():
        found[name] = _by_class(matrices, split)
    return found


def best(bounds: dict[str, Bound]) -> str:
    """The name of the smallest."""
    return min(bounds, key=lambda name: bounds[name].bytes)


def _by_class(matrices: Iterable[Codes], split: Callable[[Codes], tuple[Levels, list[Levels]]]) -> Bound:
    """`split` gives the level of every element, (R, C) or (R, 1), and those that a decoder must be told."""
    table = np.zeros((_LEVELS, 256), np.int64)
    told: list[Levels] = []
    for matrix in matrices:
        levels, parts = split(matrix)
        table += _counts(levels, matrix, _LEVELS)
        told += parts
    return _bound(table, np.concatenate(told))


def _by_row(codes: Codes) -> tuple[Levels, list[Levels]]:
    levels = _level(np.square(codes, dtype=np.float32).mean(1))
    return levels[:, None], [levels]


def _by_row_and_column(codes: Codes) -> tuple[Levels, list[Levels]]:
    squares = np.square(codes, dtype=np.float32)
    rows, columns = np.ones(codes.shape[0], np.float32), np.ones(codes.shape[1], np.float32)
    for _ in range(_SWEEPS):  # the maximum of the likelihood, one side at a time
        rows = np.maximum(squares @ (1 / columns) / len(columns), 1e-4)
        columns = np.maximum((1 / rows) @ squares / len(rows), 1e-4)
    return _level(rows[:, None] * columns), [_level(rows), _level(columns)]


def _level(variance: NDArray[np.float32]) -> Levels:
    octaves = 0.5 * np.log2(np.maximum(variance, 1e-4))
    return np.clip(np.rint(STEPS_PER_OCTAVE * octaves) + _LEVELS // 2, 0, _LEVELS - 1).astype(np.int64)


def _counts(levels: Levels, codes: Codes, size: int) -> NDArray[np.int64]:
    """How often each code occurs at each level, (size, 256); levels broadcast to the shape of codes."""
    cells = levels * 256 + (codes.astype(np.int64) + 128)
    return np.bincount(cells.ravel(), minlength=size * 256).reshape(size, 256)


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    """Bits of all symbols counted in rows, each row with its own histogram."""
    totals = counts.sum(-1, keepdims=True)
    seen = counts > 0
    return float((counts * np.log2(np.where(seen, totals / np.maximum(counts, 1), 1))).sum())


def _bound(table: NDArray[np.int64], told: Levels | None = None) -> Bound:
    totals, cells = table.sum(1), (table > 0).sum(1)
    side = 0.5 * float((np.maximum(cells - 1, 0) * np.log2(np.maximum(totals, 1))).sum())
    if told is not None:
        side += _entropy_bits(np.bincount(told)[None])
    return Bound(_entropy_bits(table) / 8, side / 8)
