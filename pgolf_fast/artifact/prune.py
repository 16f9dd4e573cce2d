"""Prune a model to its byte budget: the choice of +-1 codes that become zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.console import logger

PROBES = 10  # exact sizes that a search may take, besides the first and the last


@dataclass(frozen=True, eq=False)
class Pruned:
    """Pruned matrices: `count` of `candidates` +-1 codes are zero; `fits` tells if that is enough."""

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
    """Zero +-1 codes, in rows with the smallest squared scale first, until the codes fit (PR 1501).

    matrices: (codes (R, C), scale (R,)), in file order. Ties are taken in file order, which saves most:
    entropy drops once a matrix has lost all its +-1 codes, hardly at all when every matrix has lost a few.
    budget: bytes that the codes may take; first_size: their size now; coded_size: the exact size of all codes
    concatenated. The search predicts sizes by each matrix's order-0 entropy, corrected by every exact size.
    It ends within `tolerance` bytes under the budget, or after PROBES sizes with the fewest codes that fit.
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
    assert high is not None  # the last probe prunes everything if no earlier one fit
    return Pruned(order.split(order.pruned(high)), high, order.candidates, probes, True)


def _guess(order: _Order, low: tuple[int, int], high: tuple[int, int] | None, target: int) -> int:
    """Return the fewest codes whose predicted size is at most `target`, strictly inside the bracket."""
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

    It sorts rows, not codes: millions of codes share a few thousand scales.
    """

    def __init__(self, matrices: Sequence[tuple[NDArray[np.int8], NDArray[np.float16]]]):
        self.shapes = [codes.shape for codes, _ in matrices]
        self.flat = np.concatenate([codes.ravel() for codes, _ in matrices])
        size = np.abs(np.concatenate([scale for _, scale in matrices]))
        self.rank = np.argsort(size, kind="stable")  # same order as by squared scale
        self.owners = np.repeat(np.arange(len(matrices)), [rows for rows, _ in self.shapes])[self.rank]
        # (rows, 2): +1 and -1 codes of every row in that order; ends: their cumulative number
        parts = self.split(self.flat)
        ones = [np.stack([np.count_nonzero(p == sign, axis=1) for sign in (1, -1)], axis=1) for p in parts]
        self.ones = np.concatenate(ones)[self.rank]
        self.ends = self.ones.sum(1).cumsum()
        self.candidates = int(self.ends[-1])
        self.counts = np.stack([np.bincount(p.ravel().view(np.uint8), minlength=256) for p in parts])

    def split(self, flat: NDArray[np.int8]) -> list[NDArray[np.int8]]:
        """Return views of the matrices in their concatenation."""
        ends = np.cumsum([rows * columns for rows, columns in self.shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self.shapes, strict=True)]

    def whole_rows(self, number: int) -> tuple[int, int]:
        """Return how many rows lose all candidates among the first `number`, and how many the next loses."""
        whole = int(np.searchsorted(self.ends, number, side="right"))
        return whole, number - (int(self.ends[whole - 1]) if whole else 0)

    def pruned(self, number: int) -> NDArray[np.int8]:
        """Return all codes, flat, with the first `number` candidates zeroed."""
        flat = self.flat.copy()
        whole, rest = self.whole_rows(number)
        zeroed = np.zeros(len(self.rank), np.bool_)
        zeroed[self.rank[:whole]] = True
        start = 0
        for part in self.split(flat):
            rows = zeroed[start : start + len(part)]
            kept = part[rows]
            kept *= np.abs(kept) != 1
            part[rows] = kept
            if rest and start <= (row := self.rank[whole]) < start + len(part):
                row = part[row - start]
                row[np.flatnonzero(np.abs(row) == 1)[:rest]] = 0
            start += len(part)
        return flat

    def entropy_bytes(self, number: int) -> float:
        """Return the bytes of an ideal order-0 coder that knows each matrix's histogram."""
        whole, rest = self.whole_rows(number)
        removed = np.zeros((len(self.counts), 2))
        for sign in (0, 1):
            removed[:, sign] = np.bincount(
                self.owners[:whole], self.ones[:whole, sign], minlength=len(self.counts)
            )
        if rest:  # assumes that the row's first candidates have the sign ratio of all
            removed[self.owners[whole]] += rest * self.ones[whole] / self.ones[whole].sum()
        counts = self.counts.astype(np.float64)
        counts[:, 1] -= removed[:, 0]
        counts[:, 255] -= removed[:, 1]
        counts[:, 0] += removed.sum(1)
        totals = counts.sum(1, keepdims=True)
        bits = counts * np.log2(np.divide(totals, counts, out=np.ones_like(counts), where=counts > 0))
        return float(bits.sum() / 8)
