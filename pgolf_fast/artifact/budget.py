"""Fitting a model into its bytes: which weights become zero when it is too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.console import logger

PROBES = 10  # sizes that look for the number of codes to prune, after the first and before the last


@dataclass(frozen=True, eq=False)
class Pruned:
    """Matrices after pruning: `count` of `candidates` +-1 codes are zero; `fits`: whether that is enough."""

    codes: list[NDArray[np.int8]]
    count: int
    candidates: int
    compressions: int
    fits: bool


def prune_to_fit(
    matrices: Sequence[tuple[NDArray[np.int8], NDArray[np.float16]]],
    budget: int,
    first_size: int,
    coded_size: Callable[[NDArray[np.int8]], int],
    tolerance: int,
) -> Pruned:
    """Zero +-1 codes, those of the rows with the smallest squared scale first, until the codes fit (PR 1501).

    matrices: (codes (R, C), scale (R,)), in file order; ties go in file order too, which is what saves most:
    entropy falls once a matrix has lost all its +-1 codes, and hardly when every matrix has lost a few.
    budget: bytes that the codes may take; first_size: what they take now; coded_size: what the codec makes of
    all of them, one after another, flat.
    The smallest number that fits is searched with the order-0 entropy of each matrix as a stand-in for the
    codec, corrected by every real size; it ends within `tolerance` bytes under the budget or after PROBES
    sizes, with the smallest number found to fit.
    """
    order = _Order(matrices)
    low, low_size, high, high_size, probes = 0, first_size, None, 0, 0
    while probes < PROBES and not (high is not None and (budget - high_size <= tolerance or high - low <= 1)):
        guess = _guess(
            order, (low, low_size), None if high is None else (high, high_size), budget - tolerance // 2
        )
        if high is None and probes == PROBES - 1:
            guess = order.candidates
        size, probes = coded_size(order.pruned(guess)), probes + 1
        logger.info("prune: %d of %d codes -> %d bytes, budget %d", guess, order.candidates, size, budget)
        if size <= budget:
            high, high_size = guess, size
        elif guess == order.candidates:
            return Pruned([], guess, order.candidates, probes, False)
        else:
            low, low_size = guess, size
    assert high is not None  # the last probe prunes everything if none before fitted
    return Pruned(order.split(order.pruned(high)), high, order.candidates, probes, True)


def _guess(order: _Order, low: tuple[int, int], high: tuple[int, int] | None, target: int) -> int:
    """The least number of codes whose predicted size is at most `target`, strictly inside the bracket."""
    (low_n, low_size), low_model = low, order.entropy_bytes(low[0])
    if high is None:
        goal, last = low_model * target / max(low_size, 1), order.candidates
    else:
        share = (low_size - target) / max(low_size - high[1], 1)
        goal = low_model + share * (order.entropy_bytes(high[0]) - low_model)
        last = high[0] - 1
    first = min(low_n + 1, last)
    while first < last:
        middle = (first + last) // 2
        if order.entropy_bytes(middle) <= goal:
            last = middle
        else:
            first = middle + 1
    return first


class _Order:
    """The order in which +-1 codes are zeroed, and the entropy after any number of them.

    Rows are put in order, not codes: millions of codes share the thousands of scales there are.
    """

    def __init__(self, matrices: Sequence[tuple[NDArray[np.int8], NDArray[np.float16]]]):
        self.shapes = [codes.shape for codes, _ in matrices]
        self.flat = np.concatenate([codes.ravel() for codes, _ in matrices])
        size = np.abs(np.concatenate([scale for _, scale in matrices]))
        self.rank = np.argsort(size, kind="stable")  # as squares would be
        self.owners = np.repeat(np.arange(len(matrices)), [rows for rows, _ in self.shapes])[self.rank]
        # +1 and -1 codes of every row, (rows, 2), and how many there are up to and with it, in that order
        parts = self.split(self.flat)
        ones = [np.stack([np.count_nonzero(p == sign, axis=1) for sign in (1, -1)], axis=1) for p in parts]
        self.ones = np.concatenate(ones)[self.rank]
        self.ends = self.ones.sum(1).cumsum()
        self.candidates = int(self.ends[-1])
        self.counts = np.stack([np.bincount(p.ravel().view(np.uint8), minlength=256) for p in parts])

    def split(self, flat: NDArray[np.int8]) -> list[NDArray[np.int8]]:
        """Views of the matrices in their concatenation."""
        ends = np.cumsum([rows * columns for rows, columns in self.shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self.shapes, strict=True)]

    def whole_rows(self, number: int) -> tuple[int, int]:
        """How many rows lose all their candidates among the first `number`, and how many codes the next."""
        whole = int(np.searchsorted(self.ends, number, side="right"))
        return whole, number - (int(self.ends[whole - 1]) if whole else 0)

    def pruned(self, number: int) -> NDArray[np.int8]:
        """All codes, flat, with the first `number` candidates zero."""
        flat = self.flat.copy()
        whole, rest = self.whole_rows(number)
        gone = np.zeros(len(self.rank), np.bool_)
        gone[self.rank[:whole]] = True
        start = 0
        for part in self.split(flat):
            rows = gone[start : start + len(part)]
            kept = part[rows]
            kept *= np.abs(kept) != 1
            part[rows] = kept
            if rest and start <= (row := self.rank[whole]) < start + len(part):
                row = part[row - start]
                row[np.flatnonzero(np.abs(row) == 1)[:rest]] = 0
            start += len(part)
        return flat

    def entropy_bytes(self, number: int) -> float:
        """Bytes of an ideal order-0 coder that knows each matrix's histogram."""
        whole, rest = self.whole_rows(number)
        removed = np.zeros((len(self.counts), 2))
        for sign in (0, 1):
            removed[:, sign] = np.bincount(
                self.owners[:whole], self.ones[:whole, sign], minlength=len(self.counts)
            )
        if rest:  # as if the signs of the row's first candidates were mixed as those of all
            removed[self.owners[whole]] += rest * self.ones[whole] / self.ones[whole].sum()
        counts = self.counts.astype(np.float64)
        counts[:, 1] -= removed[:, 0]
        counts[:, 255] -= removed[:, 1]
        counts[:, 0] += removed.sum(1)
        totals = counts.sum(1, keepdims=True)
        bits = counts * np.log2(np.divide(totals, counts, out=np.ones_like(counts), where=counts > 0))
        return float(bits.sum() / 8)
