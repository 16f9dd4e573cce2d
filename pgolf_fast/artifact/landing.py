"""Fit a rate-distortion grid to a byte target: search the price of a bit at which the artifact just fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf_fast.console import logger
from pgolf_fast.errors import PgolfError
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, code_bits

TOLERANCE = 100  # bytes that may be left under the target
BRACKET = 1.1  # largest ratio of the two prices whose rows are mixed
SIDE = BRACKET**0.4  # their intended distance from a guess
SAMPLE_WEIGHTS = 2_000_000  # size of the sample that gives the first estimate for a large model
COARSEST_PRICE = 1.0  # nats per bit; every weight is zero long before


@dataclass(frozen=True, eq=False)
class Fit:
    """A quantized state, its artifact's size, and the price of a bit (nats) that it was quantized at."""

    state: QuantizedState
    artifact_bytes: int
    price: float


def fit_to_target(grids: RateDistortion, artifact_bytes: Callable[[QuantizedState], int], target: int) -> Fit:
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
        return fit

    price = _first_price(grids, artifact_bytes, target)
    while fine is None or coarse is None or coarse.price / fine.price > BRACKET:
        fit = tried(price)
        if fit.artifact_bytes <= target:
            coarse, mixable = fit, fine is not None
            if price <= grids.finest_price:
                return fit
        elif price >= COARSEST_PRICE:
            raise _too_small(fit.artifact_bytes, target)
        else:
            fine = fit
        ratio = fit.artifact_bytes / grids.expected_bytes(price)
        price = _next_price(grids, _expected_price(grids, target / ratio), fine, coarse)
    if not mixable:
        coarse = tried(coarse.price)
    while coarse.artifact_bytes > target:  # with its own columns it was a little smaller
        if coarse.price >= COARSEST_PRICE:
            raise _too_small(coarse.artifact_bytes, target)
        coarse = tried(coarse.price * BRACKET)
    return _mix(fine, coarse, artifact_bytes, target)


def _too_small(needed: int, target: int) -> PgolfError:
    return PgolfError(
        f"even with nearly all weights zero the artifact needs {needed:,} bytes, more than the target of "
        f"{target:,}: raise quant.target_bytes or pack.limit_bytes"
    )


def _first_price(
    grids: RateDistortion, artifact_bytes: Callable[[QuantizedState], int], target: int
) -> float:
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
    if fine is None or (coarse is not None and guess / fine.price > coarse.price / guess):
        price = guess / SIDE
    else:
        price = guess * SIDE
    below = grids.finest_price if fine is None else fine.price
    above = COARSEST_PRICE if coarse is None else coarse.price
    if fine is not None and coarse is not None and not below < price < above:
        return math.sqrt(below * above)
    if fine is None and coarse is not None:
        price = min(price, coarse.price / SIDE)
    if coarse is None and fine is not None:
        price = max(price, fine.price * SIDE)
    return min(max(price, grids.finest_price), COARSEST_PRICE)


def _mix(fine: Fit, coarse: Fit, artifact_bytes: Callable[[QuantizedState], int], target: int) -> Fit:
    """Take the fewest rows from `coarse`, the rest from `fine`, that fit.

    Every third step bisects; the rest interpolate.
    """
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
    tensors: dict[str, QuantizedTensor | Tensor] = {}
    for name, a in fine.tensors.items():
        b = coarse.tensors[name]
        if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
            taken = min(rows, len(a.codes))
            rows -= taken
            tensors[name] = _mixed_rows(a, b, taken)
        else:
            tensors[name] = a
    return QuantizedState(tensors)


def _mixed_rows(fine: QuantizedTensor, coarse: QuantizedTensor, rows: int) -> QuantizedTensor:
    if rows in (0, len(fine.codes)):
        return coarse if rows else fine
    codes = torch.cat((coarse.codes[:rows], fine.codes[rows:]))
    low_rank = fine.low_rank
    if low_rank is not None and coarse.low_rank is not None:
        low_rank = torch.cat((coarse.low_rank[0][:rows], low_rank[0][rows:])), low_rank[1]
    scale = torch.cat((coarse.scale[:rows], fine.scale[rows:]))
    return replace(fine, codes=codes, scale=scale, bits=code_bits(codes), low_rank=low_rank)
