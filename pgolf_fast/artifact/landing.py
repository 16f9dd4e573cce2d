"""Landing an artifact at a byte target: the price of a bit at which a rate-distortion grid just fits."""

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

TOLERANCE = 100  # bytes under the target that are good enough
BRACKET = 1.1  # ratio of the two prices whose rows are mixed
SIDE = BRACKET**0.4  # how far from a guess each of them is meant to be
SAMPLE_WEIGHTS = 2_000_000  # what the size of a whole model is first judged by
COARSEST_PRICE = 1.0  # nats per bit; nothing is left of a model long before


@dataclass(frozen=True, eq=False)
class Landing:
    """A state of `artifact_bytes`, at most the target, and the price of a bit (nats) it was made at."""

    state: QuantizedState
    artifact_bytes: int
    price: float


def land(grids: RateDistortion, artifact_bytes: Callable[[QuantizedState], int], target: int) -> Landing:
    """The best state whose exact `artifact_bytes` do not exceed `target`, ending within TOLERANCE bytes.

    Prices come from the expected bytes, corrected by every exact size (of a large model, that of some of its
    rows is taken first, to save a whole round), until two of them enclose the target;
    then as few rows as needed, in the order of the file, come from the coarser of the two. Stops at the
    finest useful price if everything fits there. Raises PgolfError when not even the coarsest grid fits.
    """

    fine: Landing | None = None  # too large; all that come after it are coarser, and share its columns
    coarse: Landing | None = None  # fits
    mixable = False

    def tried(price: float) -> Landing:
        state = grids.quantize(price, None if fine is None else fine.state)
        landing = Landing(state, artifact_bytes(state), price)
        logger.info("price %.3e nats/bit: %d bytes, target %d", price, landing.artifact_bytes, target)
        return landing

    price = _first_price(grids, artifact_bytes, target)
    while fine is None or coarse is None or coarse.price / fine.price > BRACKET:
        found = tried(price)
        if found.artifact_bytes <= target:
            coarse, mixable = found, fine is not None
            if price <= grids.finest_price:
                return found
        elif price >= COARSEST_PRICE:
            raise _too_small(found.artifact_bytes, target)
        else:
            fine = found
        ratio = found.artifact_bytes / grids.expected_bytes(price)
        price = _next_price(grids, _expected_price(grids, target / ratio), fine, coarse)
    if not mixable:
        coarse = tried(coarse.price)
    while coarse.artifact_bytes > target:  # its own columns were a little cheaper
        if coarse.price >= COARSEST_PRICE:
            raise _too_small(coarse.artifact_bytes, target)
        coarse = tried(coarse.price * BRACKET)
    return _mix(fine, coarse, artifact_bytes, target)


def _too_small(needed: int, target: int) -> PgolfError:
    return PgolfError(
        f"{needed:,} bytes are needed even when hardly a weight is left, more than the {target:,} of the "
        "target: raise quant.target_bytes or pack.limit_bytes"
    )


def _first_price(
    grids: RateDistortion, artifact_bytes: Callable[[QuantizedState], int], target: int
) -> float:
    """Where to begin: the expected price, or just below what a sample of the rows says."""
    price, every = _expected_price(grids, target), grids.weights // SAMPLE_WEIGHTS
    if every < 2:
        return price
    sample = grids.sampled(every)
    ratio = artifact_bytes(sample.quantize(price)) / sample.expected_bytes(price)
    return max(_expected_price(grids, target / ratio) / SIDE, grids.finest_price)


def _expected_price(grids: RateDistortion, target: float) -> float:
    """Where the expected bytes are the target, by bisection."""
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


def _next_price(grids: RateDistortion, guess: float, fine: Landing | None, coarse: Landing | None) -> float:
    """The guess, a little on the side that is missing or farther away, and inside what is known."""
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


def _mix(
    fine: Landing, coarse: Landing, artifact_bytes: Callable[[QuantizedState], int], target: int
) -> Landing:
    """The fewest rows from `coarse`, the rest from `fine`, that fit; by interpolation and halving in turn."""
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
            high, best = middle, Landing(state, size, coarse.price)
        else:
            low, above = middle, size
    logger.info("%d bytes: %d rows at the coarser price", best.artifact_bytes, high)
    return best


def mixed(fine: QuantizedState, coarse: QuantizedState, rows: int) -> QuantizedState:
    """The first `rows` rows of all matrices from `coarse`, the others from `fine`; columns must be alike."""
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
