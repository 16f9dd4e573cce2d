"""`pgolf tune`: launch rows by measurement, one kernel at a time, by stepping to better neighbours.

A kernel is timed inside its op at the preset's shapes, the best row so far and a candidate in turn. A
candidate that does not compile, does not fit or computes something else is counted and passed over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from pgolf_fast import console
from pgolf_fast.bench import check, registry
from pgolf_fast.bench.case import Case, Contender, Mode
from pgolf_fast.bench.run import attempt
from pgolf_fast.bench.timer import time_in_turn
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import tiles, tuned
from pgolf_fast.ops.tiles import Tile
from pgolf_fast.ops.tuned import Tuned

GAIN = 0.99  # a candidate counts as better when it takes less than this share of the time
# field -> smallest and largest value tried; tiles and warps double and halve, stages step by one
LIMITS = {
    "block_m": (16, 256),
    "block_n": (16, 256),
    "block_k": (16, 128),
    "num_warps": (1, 16),
    "num_stages": (1, 5),
}


@dataclass(frozen=True)
class TunePlan:
    """What to tune and how long."""

    config: RunConfig
    ops: Sequence[str]
    tokens: int
    dtype: torch.dtype
    device: torch.device
    kernels: Sequence[str] = ()
    """Kernels by name; empty tunes every kernel that the ops launch."""
    candidates: int = 24
    """Rows tried for one kernel at most."""
    runs: int = 10
    deadline: float | None = None
    """`time.monotonic()` after which no candidate is begun."""

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def arch(self) -> str:
        """Row of the table; a rehearsal on a CPU uses Hopper's."""
        return tiles.architecture(self.device) if self.device.type == "cuda" else "sm90"


@dataclass
class Found:
    """What came out for one kernel."""

    kernel: str
    op: str
    mode: Mode
    table: Tile
    best: Tile
    table_ms: float
    best_ms: float
    tried: int = 0
    failed: int = 0
    """Candidates that did not compile or did not fit."""
    wrong: int = 0
    """Candidates that were quicker and computed something else."""
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Use:
    """The case that a kernel is timed in."""

    op: str
    tokens: int
    mode: Mode
    variant: str = "ours"

    def contender(self, case: Case) -> Contender:
        found = case.ours if self.variant == "ours" else case.variants[self.variant]
        assert isinstance(found, Contender)
        return found


def tune(plan: TunePlan, done: Callable[[Found], None]) -> list[Found]:
    """Tune every kernel of the plan and hand each result to `done` at once. The table keeps the best rows."""
    uses = find_uses(plan)
    if plan.kernels:
        unknown = [name for name in plan.kernels if name not in tiles.kernels()]
        if unknown:
            raise PgolfError(f"no kernel {unknown[0]!r}: kernels are {', '.join(tiles.kernels())}")
        uses = {kernel: use for kernel, use in uses.items() if kernel in plan.kernels}
    found = []
    for use in dict.fromkeys(uses.values()):
        if plan.late:
            break
        case = _case(plan, use)
        truth = check.truth_of(case, use.mode)
        for kernel in (name for name, its in uses.items() if its == use):
            if plan.late:
                break
            found.append(tune_kernel(plan, kernel, replace(case, ours=use.contender(case)), truth))
            done(found[-1])
        del case, truth
    return found


def _case(plan: TunePlan, use: Use) -> Case:
    return registry.make_case(use.op, registry.Place(plan.config, use.tokens, plan.dtype, plan.device))


def find_uses(plan: TunePlan) -> dict[str, Use]:
    """For each kernel the first case that launches it, and whether forward already does."""
    uses: dict[str, Use] = {}
    for op in plan.ops:
        for tokens in registry.OPS[op].tokens or (plan.tokens,):
            case = _case(plan, Use(op, tokens, "fwd"))
            variants = [name for name, one in case.variants.items() if isinstance(one, Contender)]
            for variant in ("ours", *variants):
                _note_launches(uses, case, Use(op, tokens, "fwd", variant))
                if case.trained:
                    _note_launches(uses, case, Use(op, tokens, "fwd+bwd", variant))
    return uses


def _note_launches(uses: dict[str, Use], case: Case, use: Use) -> None:
    contender = use.contender(case)
    douts = tuple(torch.randn_like(out) for out in contender.forward()) if use.mode == "fwd+bwd" else ()
    with launched_kernels() as names:
        attempt(lambda: contender.results(douts) if douts else contender.forward())
    for name in names:
        uses.setdefault(name, use)


class _Noting(dict[str, dict[str, Tile]]):
    """A launch table that notes which rows are asked for."""

    def __init__(self, table: dict[str, dict[str, Tile]]):
        super().__init__(table)
        self.asked: list[str] = []

    def __getitem__(self, kernel: str) -> dict[str, Tile]:
        self.asked.append(kernel)
        return super().__getitem__(kernel)


@contextlib.contextmanager
def launched_kernels() -> Iterator[list[str]]:
    """Within, the names of kernels whose row is taken from the table."""
    table = tiles._table
    noting = _Noting(table)
    tiles._table = noting
    try:
        yield noting.asked
    finally:
        tiles._table = table


def neighbours(row: Tile) -> list[Tile]:
    """Rows that differ from `row` in one field, by one step."""
    found = []
    for name, (low, high) in LIMITS.items():
        value = getattr(row, name)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        # a table row may lie outside the limits (a tile as wide as the model): it may shrink
        found += [replace(row, **{name: step}) for step in steps if low <= step <= max(high, value)]
    return found


def tune_kernel(plan: TunePlan, kernel: str, case: Case, truth: check.Truth) -> Found:
    """Step from the table's row to better neighbours until none is better, or time or candidates run out.

    Backward is timed too when `truth` has incoming gradients.
    """
    table = tiles._table[kernel].get(plan.arch) or tiles._table[kernel]["sm80"]
    mode: Mode = "fwd+bwd" if truth.douts else "fwd"
    run: Callable[[], object] = case.ours.forward if mode == "fwd" else lambda: case.ours.both(truth.douts)

    def with_row(row: Tile) -> Callable[[], object]:
        def call() -> object:
            tiles.set_tiles({kernel: {plan.arch: row}})
            return run()

        return call

    def milliseconds(*rows: Tile) -> list[float]:
        calls = {str(i): with_row(row) for i, row in enumerate(rows)}
        times = time_in_turn(calls, plan.device, seconds=0.5, rounds=5, runs=plan.runs)
        return [timing.median for timing in times.values()]

    first = milliseconds(table)[0]
    result = Found(kernel, case.op, mode, table, table, first, first)
    try:
        _climb(plan, result, milliseconds, lambda row: _correct(with_row(row), case, truth))
        if result.best != table:  # the two that matter once more, side by side
            result.table_ms, result.best_ms = milliseconds(table, result.best)
            if result.best_ms > GAIN * result.table_ms:
                result.best, result.best_ms = table, result.table_ms
    finally:
        tiles.set_tiles({kernel: {plan.arch: result.best}})
    console.logger.info(
        "%s: %.4f -> %.4f ms in %s, %d candidates (%d failed, %d wrong)",
        *(kernel, result.table_ms, result.best_ms, case.op, result.tried, result.failed, result.wrong),
    )
    return result


def _climb(
    plan: TunePlan,
    result: Found,
    milliseconds: Callable[..., list[float]],
    correct: Callable[[Tile], bool],
) -> None:
    seen, improved = {result.table}, True
    while improved and not plan.late:
        improved, start = False, result.best
        for row in neighbours(start):
            if row in seen or result.tried >= plan.candidates or plan.late:
                continue
            seen.add(row)
            result.tried += 1
            times = attempt(lambda row=row: milliseconds(result.best, row))  # type: ignore[misc]
            if isinstance(times, str):
                result.failed += 1
                result.errors.append(f"{row}: {times}")
                continue
            best, candidate = times
            if candidate < GAIN * best:
                if not correct(row):
                    result.wrong += 1
                    continue
                result.best, result.best_ms, improved = row, candidate, True


def _correct(call: Callable[[], object], case: Case, truth: check.Truth) -> bool:
    """Whether the op is right with the row that `call` sets."""
    if isinstance(attempt(call), str):
        return False
    verdict = attempt(lambda: check.judge(case.ours, truth))
    return not isinstance(verdict, str) and verdict.ok


def as_tuned(found: Found, plan: TunePlan) -> Tuned:
    """The row as it is kept."""
    gpu = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu"
    return Tuned(
        kernel=found.kernel,
        dtype=str(plan.dtype).removeprefix("torch."),
        gpu=gpu,
        triton=tuned.triton_version(),
        source=tuned.source_hash(found.kernel),
        tile=found.best,
        ms=found.best_ms,
        table_ms=found.table_ms,
        measured=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
