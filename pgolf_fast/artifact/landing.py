"""Landing an artifact at a byte target: the price of a bit at which a rate-distortion grid just fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, code_bits
from pgolf_fast.report import logger

TOLERANCE = 100  # bytes under the target that are good enough
BRACKET = 1.05  # ratio of the two prices whose rows are mixed
COARSEST_PRICE = 1.0  # nats per bit; nothing is left of a model long before
_SLOPE = -0.35  # of log bytes over log price, before two sizes say


@dataclass(frozen=True, eq=False)
class Landing:
    """A state of `artifact_bytes`, at most the target, and the price of a bit (nats) it was made at."""

    state: QuantizedState
    artifact_bytes: int
    price: float


def land(grids: RateDistortion, artifact_bytes: Callable[[QuantizedState], int], target: int) -> Landing:
    """The best state whose exact `artifact_bytes` do not exceed `target`, ending within TOLERANCE bytes.

    A secant search brackets the target between two prices; then as few rows as possible, in the order of the
    file, come from the coarser of the two. Stops at the finest useful price if everything fits there.
    Raises PgolfError when not even the coarsest grid fits.
    """
    size: dict[float, int] = {}

    def tried(price: float, like: QuantizedState | None = None) -> QuantizedState:
        state = grids.quantize(price, like)
        size[price] = artifact_bytes(state)
        logger.info("price %.3e nats/bit: %d bytes, target %d", price, size[price], target)
        return state

    price, fine, coarse = _first_price(grids, target), None, None
    while fine is None or coarse is None or coarse / fine > BRACKET:
        state = tried(price)
        if size[price] <= target:
            coarse = price
            if price <= grids.finest_price:
                return Landing(state, size[price], price)
        elif price >= COARSEST_PRICE:
            raise PgolfError(
                f"{size[price]:,} bytes are needed even when hardly a weight is left, but {target:,} are the "
                "target: raise quant.target_bytes or pack.limit_bytes"
            )
        else:
            fine = price
        price = _next_price(size, fine, coarse, target, grids.finest_price)
    finer = tried(fine)
    coarser = tried(coarse, finer)
    while size[coarse] > target:  # its own columns were a little cheaper
        coarse *= BRACKET
        coarser = tried(coarse, finer)
    return _mix(finer, coarser, artifact_bytes, target, Landing(coarser, size[coarse], coarse))


def _first_price(grids: RateDistortion, target: int) -> float:
    """Where the expected bytes are the target, by bisection."""
    low, high = math.log(grids.finest_price), math.log(COARSEST_PRICE)
    if grids.expected_bytes(math.exp(low)) <= target:
        return grids.finest_price
    for _ in range(20):
        middle = (low + high) / 2
        if grids.expected_bytes(math.exp(middle)) > target:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _next_price(
    size: dict[float, int], fine: float | None, coarse: float | None, target: int, finest: float
) -> float:
    """Where the line through the two nearest sizes meets the target, a little on the side still missing."""
    known = sorted(size, key=lambda price: abs(math.log(size[price] / target)))[:2]
    slope = _SLOPE
    if len(known) == 2:
        rise = math.log(size[known[0]] / size[known[1]]) / math.log(known[0] / known[1])
        slope = min(max(rise, 4 * _SLOPE), _SLOPE / 4)
    guess = math.log(known[0]) + math.log(target / size[known[0]]) / slope
    side = 0.4 * math.log(BRACKET)
    if fine is None or (coarse is not None and math.exp(guess) - fine > coarse - math.exp(guess)):
        guess -= side
    else:
        guess += side
    price = min(max(math.exp(guess), finest), COARSEST_PRICE)
    if fine is not None and coarse is not None and not fine < price < coarse:
        return math.sqrt(fine * coarse)
    return price


def _mix(
    fine: QuantizedState,
    coarse: QuantizedState,
    artifact_bytes: Callable[[QuantizedState], int],
    target: int,
    best: Landing,
) -> Landing:
    """The fewest rows from `coarse`, the rest from `fine`, that fit; `best` has all from `coarse`."""
    low, high = 0, sum(len(t.codes) for t in fine.tensors.values() if isinstance(t, QuantizedTensor))
    while high - low > 1 and target - best.artifact_bytes > TOLERANCE:
        middle = (low + high) // 2
        state = mixed(fine, coarse, middle)
        size = artifact_bytes(state)
        if size <= target:
            high, best = middle, Landing(state, size, best.price)
        else:
            low = middle
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
    codes = torch.cat((coarse.codes[:rows], fine.codes[rows:]))
    low_rank = fine.low_rank
    if low_rank is not None and coarse.low_rank is not None:
        low_rank = torch.cat((coarse.low_rank[0][:rows], low_rank[0][rows:])), low_rank[1]
    scale = torch.cat((coarse.scale[:rows], fine.scale[rows:]))
    return replace(fine, codes=codes, scale=scale, bits=code_bits(codes), low_rank=low_rank)
