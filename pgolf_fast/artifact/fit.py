"""Fit a model to a byte target: prune +-1 codes, or search the price of a bit on grid rd."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pgolf_fast.config.checks import need
from pgolf_fast.console import logger
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, Stored, code_bits

PROBES = 10  # exact sizes that pruning may take, besides the first and the last
TOLERANCE = 100  # bytes that a price may leave under the target
BRACKET = 1.1  # largest ratio of the two prices whose rows are mixed
SIDE = BRACKET**0.4  # their intended distance from a guess
SAMPLE_WEIGHTS = 2_000_000  # size of the sample that gives the first estimate for a large model
COARSEST_PRICE = 1.0  # nats per bit; every weight is zero long before
Matrix = tuple[NDArray[np.int8], NDArray[np.float16]]  # codes (R, C), scale (R,)
Size = Callable[[QuantizedState], int]  # exact bytes of the artifact


@dataclass(frozen=True, eq=False)
class Pruned:
    """Pruned matrices: `count` of `candidates` +-1 codes are zero; `fits` tells if that is enough."""

    codes: list[NDArray[np.int8]]
    count: int
    candidates: int
    fits: bool


def prune_to_fit(
    matrices: Sequence[Matrix],
    budget: int,
    first_size: int,
    coded_size: Callable[[NDArray[np.int8]], int],
    tolerance: int,
) -> Pruned:
    """Zero +-1 codes, in rows with the smallest squared scale first, until the codes fit (PR 1501).

    matrices: in file order, as ties are taken, which saves most: entropy drops once a matrix has lost all its
    +-1 codes, hardly at all when every matrix has lost a few.
    budget: bytes that the codes may take; first_size: their size now; coded_size: the exact size of all codes
    concatenated. The search predicts sizes by each matrix's order-0 entropy, corrected by every exact size.
    It ends within `tolerance` bytes under the budget, or after PROBES sizes with the fewest codes that fit.
    """
    order = _Order(matrices)
    low, probes = (0, first_size), 0
    high: tuple[int, int] | None = None
    while probes < PROBES and not (high and (budget - high[1] <= tolerance or high[0] - low[0] <= 1)):
        last = high is None and probes == PROBES - 1
        guess = order.candidates if last else _guess(order, low, high, budget - tolerance // 2)
        size, probes = coded_size(order.pruned(guess)), probes + 1
        logger.info("prune: %d of %d codes -> %d bytes, budget %d", guess, order.candidates, size, budget)
        if size <= budget:
            high = guess, size
        elif guess == order.candidates:
            return Pruned([], guess, order.candidates, False)
        else:
            low = guess, size
    assert high is not None  # the last probe prunes everything if no earlier one fit
    return Pruned(order.split(order.pruned(high[0])), high[0], order.candidates, True)


def _guess(order: "_Order", low: tuple[int, int], high: tuple[int, int] | None, target: int) -> int:
    """Return the fewest codes whose predicted size is at most `target`, strictly inside the bracket."""
    (low_n, low_size), low_model = low, order.entropy_bytes(low[0])
    if high is None:
        goal, last = low_model * target / max(low_size, 1), order.candidates
    else:
        share = (low_size - target) / max(low_size - high[1], 1)
        goal = low_model + share * (order.entropy_bytes(high[0]) - low_model)
        last = high[0] - 1
    first = min(low_n + 1, last)
    return bisect.bisect_left(range(last), True, lo=first, key=lambda n: order.entropy_bytes(n) <= goal)


class _Order:
    """The order in which +-1 codes are zeroed, and the entropy after any number of them.

    It sorts rows, not codes: millions of codes share a few thousand scales.
    """

    def __init__(self, matrices: Sequence[Matrix]):
        self.shapes = [codes.shape for codes, _ in matrices]
        self.flat = np.concatenate([codes.ravel() for codes, _ in matrices])
        size = np.abs(np.concatenate([scale for _, scale in matrices]))
        self.rank = np.argsort(size, kind="stable")  # same order as by squared scale
        rows = [len(codes) for codes, _ in matrices]
        self.starts = np.cumsum([0, *rows[:-1]])  # each matrix's first row
        self.owners = np.repeat(np.arange(len(matrices)), rows)[self.rank]
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
        parts = self.split(flat)
        for part, rows in zip(parts, np.split(zeroed, self.starts[1:]), strict=True):
            part[rows] *= np.abs(part[rows]) != 1
        if rest:
            matrix = self.owners[whole]
            row = parts[matrix][self.rank[whole] - self.starts[matrix]]
            row[np.flatnonzero(np.abs(row) == 1)[:rest]] = 0
        return flat

    def entropy_bytes(self, number: int) -> float:
        """Return the bytes of an ideal order-0 coder that knows each matrix's histogram."""
        whole, rest = self.whole_rows(number)
        owners, kinds = self.owners[:whole], len(self.counts)
        lost = [np.bincount(owners, ones, minlength=kinds) for ones in self.ones[:whole].T]
        removed = np.stack(lost, axis=1).astype(np.float64)  # codes of each sign
        if rest:  # assumes that the row's first candidates have the sign ratio of all
            removed[self.owners[whole]] += rest * self.ones[whole] / self.ones[whole].sum()
        counts = self.counts.astype(np.float64)
        counts[:, 1] -= removed[:, 0]
        counts[:, 255] -= removed[:, 1]
        counts[:, 0] += removed.sum(1)
        totals = counts.sum(1, keepdims=True)
        bits = counts * np.log2(np.divide(totals, counts, out=np.ones_like(counts), where=counts > 0))
        return float(bits.sum() / 8)


@dataclass(frozen=True, eq=False)
class Fit:
    """A quantized state, its artifact's size, and the price of a bit (nats) that it was quantized at."""

    state: QuantizedState
    artifact_bytes: int
    price: float


def fit_to_target(grids: RateDistortion, artifact_bytes: Size, target: int) -> Fit:
    """Return the best state whose exact `artifact_bytes` are at most `target` and within TOLERANCE of it.

    Prices follow from the expected bytes, corrected by every exact size, until two of them bracket the
    target; a large model is sampled first, which saves one full pass. Then as few rows as needed, in file
    order, come from the coarser of the two. Stops at the finest useful price if everything fits there.
    Raises PgolfError when not even the coarsest grid fits.
    """
    fine: Fit | None = None  # too large; all later states are coarser, and share its columns
    coarse: Fit | None = None  # fits
    mixable = False

    def tried(price: float) -> Fit:
        state = grids.quantize(price, None if fine is None else fine.state)
        fit = Fit(state, artifact_bytes(state), price)
        logger.info("price %.3e nats/bit: %d bytes, target %d", price, fit.artifact_bytes, target)
        needed = f"even with nearly all weights zero the artifact needs {fit.artifact_bytes:,} bytes"
        hint = "raise quant.target_bytes or pack.limit_bytes"
        possible = fit.artifact_bytes <= target or price < COARSEST_PRICE
        need(possible, f"{needed}, more than the target of {target:,}: {hint}")
        return fit

    price = _first_price(grids, artifact_bytes, target)
    while fine is None or coarse is None or coarse.price / fine.price > BRACKET:
        fit = tried(price)
        if fit.artifact_bytes <= target:
            coarse, mixable = fit, fine is not None
            if price <= grids.finest_price:
                return fit
        else:
            fine = fit
        ratio = fit.artifact_bytes / grids.expected_bytes(price)
        price = _next_price(grids, _expected_price(grids, target / ratio), fine, coarse)
    if not mixable:
        coarse = tried(coarse.price)
    while coarse.artifact_bytes > target:  # with its own columns it was a little smaller
        coarse = tried(coarse.price * BRACKET)
    return _mix(fine, coarse, artifact_bytes, target)


def _first_price(grids: RateDistortion, artifact_bytes: Size, target: int) -> float:
    """Return the expected price, or for a large model slightly less than a sample of its rows suggests."""
    price, every = _expected_price(grids, target), grids.weights // SAMPLE_WEIGHTS
    if every < 2:
        return price
    sample = grids.sampled(every)
    ratio = artifact_bytes(sample.quantize(price)) / sample.expected_bytes(price)
    return max(_expected_price(grids, target / ratio) / SIDE, grids.finest_price)


def _expected_price(grids: RateDistortion, target: float) -> float:
    """Return the price at which the expected bytes are the target, by bisection."""
    low, high = math.log(grids.finest_price), math.log(COARSEST_PRICE)
    if grids.expected_bytes(math.exp(low)) <= target:
        return grids.finest_price
    for _ in range(30):
        middle = (low + high) / 2
        if grids.expected_bytes(math.exp(middle)) > target:
            low = middle
        else:
            high = middle
    return COARSEST_PRICE if high == math.log(COARSEST_PRICE) else math.exp(high)


def _next_price(grids: RateDistortion, guess: float, fine: Fit | None, coarse: Fit | None) -> float:
    """Return the guess, shifted toward the bound that is missing or farther away, and within the bounds."""
    lower = fine is None or (coarse is not None and guess / fine.price > coarse.price / guess)
    price = guess / SIDE if lower else guess * SIDE
    if fine is not None and coarse is not None and not fine.price < price < coarse.price:
        return math.sqrt(fine.price * coarse.price)
    lowest = grids.finest_price if fine is None else min(fine.price * SIDE, COARSEST_PRICE)
    highest = COARSEST_PRICE if coarse is None else coarse.price / SIDE
    return max(min(price, highest), lowest)


def _mix(fine: Fit, coarse: Fit, artifact_bytes: Size, target: int) -> Fit:
    """Take the fewest rows from `coarse` that fit, the rest from `fine`; every third step bisects."""
    best, low, above = coarse, 0, fine.artifact_bytes
    high = sum(len(t.codes) for t in fine.state.tensors.values() if isinstance(t, QuantizedTensor))
    for step in range(64):
        if high - low <= 1 or target - best.artifact_bytes <= TOLERANCE:
            break
        share = (above - target + TOLERANCE / 2) / max(above - best.artifact_bytes, 1)
        middle = (low + high) // 2 if step % 3 == 2 else low + round(share * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        state = mixed(fine.state, coarse.state, middle)
        size = artifact_bytes(state)
        if size <= target:
            high, best = middle, Fit(state, size, coarse.price)
        else:
            low, above = middle, size
    logger.info("%d bytes: %d rows at the coarser price", best.artifact_bytes, high)
    return best


def mixed(fine: QuantizedState, coarse: QuantizedState, rows: int) -> QuantizedState:
    """Take the first `rows` rows of all matrices from `coarse`, the rest from `fine`; columns are shared."""
    tensors: dict[str, Stored] = {}
    for name, a in fine.tensors.items():
        tensors[name], b = a, coarse.tensors[name]
        if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
            taken, low_rank = min(rows, len(a.codes)), a.low_rank
            codes = torch.cat((b.codes[:taken], a.codes[taken:]))
            scale = torch.cat((b.scale[:taken], a.scale[taken:]))
            if low_rank is not None and b.low_rank is not None:
                low_rank = torch.cat((b.low_rank[0][:taken], low_rank[0][taken:])), low_rank[1]
            tensors[name] = replace(a, codes=codes, scale=scale, bits=code_bits(codes), low_rank=low_rank)
            rows -= taken
    return QuantizedState(tensors)
