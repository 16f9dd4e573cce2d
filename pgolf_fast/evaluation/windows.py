"""Windows over a token stream: which inputs each reads and which targets it scores.

A stream of N + 1 tokens has N targets; target t (0-based) is token t + 1, predicted at input position t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Windows:
    """Window i reads inputs start[i] .. end[i]-1 and scores targets first[i] .. end[i]-1."""

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    row: np.ndarray | None = None  # document of the batch, where these are scored in parallel

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: slice | np.ndarray) -> "Windows":
        row = None if self.row is None else self.row[index]
        return Windows(self.start[index], self.end[index], self.first[index], row)

    def places(self) -> np.ndarray:
        """Return the offset of each window's losses among all scored losses, and their total at the end."""
        return np.concatenate(([0], np.cumsum(self.end - self.first)))

    def targets(self) -> np.ndarray:
        """Return the scored targets in the order of their losses, (scored,) int64."""
        counts = self.end - self.first
        return np.repeat(self.first - self.places()[:-1], counts) + np.arange(counts.sum())


class Batch(NamedTuple):
    """Windows low .. high-1 of one shape: `length` inputs, of which the last `scored` are scored."""

    low: int
    high: int
    length: int
    scored: int
    full: int  # windows in other batches of the same shape; only the last may hold fewer


# Windows per batch as a function of their length
BatchSize = Callable[[int], int]


def batches(windows: Windows, low: int, high: int, size: BatchSize) -> list[Batch]:
    """Split windows low .. high-1, in order, into batches of one shape, the same for any world size."""
    if low == high:
        return []
    part = windows[low:high]
    shapes = np.stack((part.end - part.start, part.end - part.first), axis=1)
    changes = low + 1 + np.flatnonzero(np.diff(shapes, axis=0).any(axis=1))
    result = []
    for begin, end in pairwise([low, *changes.tolist(), high]):
        length, scored = shapes[begin - low].tolist()
        full = min(size(length), end - begin)
        starts = range(begin, end, full)
        result += [Batch(first, min(first + full, end), length, scored, full) for first in starts]
    return result


def plain_windows(num_targets: int, seq_len: int) -> Windows:
    """Return non-overlapping windows; the last may be shorter. Each target is scored once."""
    return sliding_windows(num_targets, seq_len, seq_len)


def sliding_windows(num_targets: int, seq_len: int, stride: int, *, repeat_tail: bool = False) -> Windows:
    """Return windows every `stride` tokens that score what the previous one did not (Press et al. 2021).

    The first window to reach the end is the last one, so each target is scored once. With `repeat_tail`
    (PR 1501) windows start up to the end and each scores its last `stride` targets, the last several times.
    """
    if num_targets < 1 or seq_len < 1:
        raise PgolfError(f"nothing to score: {num_targets} targets in windows of {seq_len} tokens")
    if not 0 < stride <= seq_len:
        raise PgolfError(f"stride {stride} must be between 1 and the window length {seq_len}")
    start = np.arange(0, num_targets, stride)
    end = np.minimum(start + seq_len, num_targets)
    if repeat_tail:
        keep = (end - start >= stride) | (start == 0)
        start, end = start[keep], end[keep]
        return Windows(start, end, np.where(start == 0, 0, np.maximum(end - stride, start)))
    count = int(np.searchsorted(end, num_targets)) + 1
    start, end = start[:count], end[:count]
    return Windows(start, end, np.concatenate(([0], end[:-1])))
