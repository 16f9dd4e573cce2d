"""How a token stream is cut into windows: which inputs each reads and which targets it scores.

A stream of N + 1 tokens has N targets; target t (0-based) is token t + 1, predicted at input position t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Windows:
    """Window i reads inputs start[i] .. end[i]-1 and scores the targets first[i] .. end[i]-1."""

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: slice | np.ndarray) -> Windows:
        return Windows(self.start[index], self.end[index], self.first[index])


def plain_windows(num_targets: int, seq_len: int) -> Windows:
    """Non-overlapping windows; the last may be shorter. Each target is scored once."""
    _check(num_targets, seq_len)
    start = np.arange(0, num_targets, seq_len)
    return Windows(start, np.minimum(start + seq_len, num_targets), start)


def sliding_windows(num_targets: int, seq_len: int, stride: int, *, repeat_tail: bool = False) -> Windows:
    """Windows every `stride` tokens, each scoring what the one before did not (Press et al. 2021).

    The last window is the first that reaches the end, so each target is scored once. With `repeat_tail`,
    windows go on to the end of the stream and each scores its last `stride` targets, as the program of
    PR 1501 does: the last targets are then counted several times.
    """
    _check(num_targets, seq_len)
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


def _check(num_targets: int, seq_len: int) -> None:
    if num_targets < 1 or seq_len < 1:
        raise PgolfError(f"nothing to score: {num_targets} targets in windows of {seq_len} tokens")
