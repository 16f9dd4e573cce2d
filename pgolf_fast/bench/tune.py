"""`pgolf tune`: tiles by measurement, one kernel at a time, by stepping to better neighbors.

A kernel is timed inside its op at the preset's shapes, the best tile so far and a candidate in turn. A
candidate that does not compile, does not fit or gives a wrong result is counted and skipped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from pgolf_fast import console
from pgolf_fast.bench import peers, registry
from pgolf_fast.bench.run import attempt
from pgolf_fast.bench.timer import deadline_after, passed, time_in_turn
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.ops import judge, tiles, tuned
from pgolf_fast.ops.case import Case, Contender, Mode
from pgolf_fast.ops.tiles import Tile
from pgolf_fast.ops.tuned import Tuned

GAIN = 0.99  # a candidate is better if it takes less than this share of the time
# field -> smallest and largest value tried; tiles and warps double and halve, stages step by one
LIMITS = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 128)}
LIMITS |= {"num_warps": (1, 16), "num_stages": (1, 5)}


@dataclass(frozen=True)
class TunePlan:
    """Kernels to tune, and for how long."""

    config: RunConfig
    ops: Sequence[str]
    tokens: int
    dtype: torch.dtype
    device: torch.device
    kernels: Sequence[str] = ()  # Kernels by name; empty tunes every kernel that the ops launch
    candidates: int = 24  # Maximum number of candidates per kernel
    runs: int = 10
    deadline: float | None = None  # `time.monotonic()` after which no candidate is started

    @property
    def arch(self) -> str:
        """Row of the table; a rehearsal on a CPU uses Hopper's."""
        return tiles.architecture(self.device) if self.device.type == "cuda" else "sm90"


def tune_plan(
    name: str,
    *,
    ops: Sequence[str] = (),
    kernels: Sequence[str] = (),
    tokens: int | None = None,
    candidates: int = 24,
    minutes: float | None = None,
) -> TunePlan:
    """Return the plan for a preset on this GPU. Raises PgolfError without a GPU."""
    if not torch.cuda.is_available():
        raise PgolfError("pgolf tune measures kernels on a GPU, and PyTorch sees none on this machine")
    config, device = preset(name), torch.device("cuda", torch.cuda.current_device())
    ops, tokens = registry.select(ops), tokens or config.train.micro_batch_tokens
    dtype, deadline = resolve_dtype("auto", device), deadline_after(minutes)
    return TunePlan(config, ops, tokens, dtype, device, kernels, candidates, deadline=deadline)


@dataclass
class Found:
    """Result for one kernel."""

    kernel: str
    op: str
    mode: Mode
    table: Tile
    best: Tile
    table_ms: float
    best_ms: float
    tried: int = 0
    failed: int = 0  # Candidates that did not compile or did not fit
    wrong: int = 0  # Candidates that were faster but gave a wrong result
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Use:
    """The case that a kernel is timed in."""

    op: str
    tokens: int
    mode: Mode
    variant: str = "ours"

    def contender(self, case: Case) -> Contender:
        variant = case.ours() if self.variant == "ours" else peers.variants(case)[self.variant]
        assert isinstance(variant, Contender)
        return variant


def tune(plan: TunePlan, done: Callable[[Found], None]) -> list[Found]:
    """Tune every kernel of the plan, pass each result to `done` at once, and keep the best in the table.

    Raises PgolfError for an unknown kernel.
    """
    uses = find_uses(plan)
    for name in plan.kernels:
        if name not in tiles.kernels():
            raise PgolfError(f"no kernel {name!r}: kernels are {', '.join(tiles.kernels())}")
    uses = {kernel: use for kernel, use in uses.items() if kernel in (plan.kernels or uses)}
    results = []
    for use in dict.fromkeys(uses.values()):
        if passed(plan.deadline):
            break
        case = registry.make_case(use.op, plan.config, use.tokens, plan.dtype, plan.device)
        truth = judge.truth_of(case, backward=use.mode == "fwd+bwd")
        for kernel in (name for name, its in uses.items() if its == use):
            if passed(plan.deadline):
                break
            results.append(tune_kernel(plan, kernel, case, use.contender(case), truth))
            done(results[-1])
        del case, truth
    return results


def find_uses(plan: TunePlan) -> dict[str, Use]:
    """Return the first case that launches each kernel, and the mode that it needs."""
    uses: dict[str, Use] = {}
    for op in plan.ops:
        for tokens in registry.token_counts(op, (plan.tokens,)):
            case = registry.make_case(op, plan.config, tokens, plan.dtype, plan.device)
            names = [name for name, one in peers.variants(case).items() if isinstance(one, Contender)]
            for variant in ("ours", *names):
                for mode in case.modes(("fwd", "fwd+bwd")):
                    use = Use(op, tokens, mode, variant)
                    for kernel in _launched(use.contender(case), mode):
                        uses.setdefault(kernel, use)
    return uses


def _launched(contender: Contender, mode: Mode) -> list[str]:
    """Return the kernels that a run looks up, even if it fails."""
    douts = tuple(torch.randn_like(out) for out in contender.forward()) if mode == "fwd+bwd" else ()
    with tiles.recorded() as names:
        attempt(lambda: contender.results(douts) if douts else contender.forward())
    return names


def neighbors(tile: Tile) -> list[Tile]:
    """Return tiles that differ from `tile` in one field, by one step."""
    found = []
    for name, (low, high) in LIMITS.items():
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        # a table row may exceed the limits (a tile as wide as the model): it may shrink
        found += [replace(tile, **{name: step}) for step in steps if low <= step <= max(high, value)]
    return found


def tune_kernel(plan: TunePlan, kernel: str, case: Case, ours: Contender, truth: judge.Truth) -> Found:
    """Step from the table's tile to better neighbors until none is better, or time or candidates run out.

    Backward is timed too if `truth` has incoming gradients.
    """
    table, mode = tiles.row(kernel, plan.arch), "fwd+bwd" if truth.douts else "fwd"
    run: Callable[[], object] = (lambda: ours.both(truth.douts)) if truth.douts else ours.forward

    def run_with(tile: Tile) -> object:
        tiles.set_tiles({kernel: {plan.arch: tile}})
        return run()

    def milliseconds(*candidates: Tile) -> list[float]:
        calls = {str(i): partial(run_with, tile) for i, tile in enumerate(candidates)}
        times = time_in_turn(calls, plan.device, seconds=0.5, rounds=5, runs=plan.runs)
        return [timing.median for timing in times.values()]

    def correct(tile: Tile) -> bool:
        if isinstance(attempt(run_with, tile), str):
            return False
        verdict = attempt(judge.judge, case, ours, truth)
        return not isinstance(verdict, str) and verdict.ok

    first = milliseconds(table)[0]
    result = Found(kernel, case.name, mode, table, table, first, first)  # type: ignore[arg-type]  # a Mode
    try:
        _climb(plan, result, milliseconds, correct)
        if result.best != table:  # confirm the winner against the table in one comparison
            result.table_ms, result.best_ms = milliseconds(table, result.best)
            if result.best_ms > GAIN * result.table_ms:
                result.best, result.best_ms = table, result.table_ms
    finally:
        tiles.set_tiles({kernel: {plan.arch: result.best}})
    console.logger.info(
        "%s: %.4f -> %.4f ms in %s, %d candidates (%d failed, %d wrong)",
        *(kernel, result.table_ms, result.best_ms, case.name, result.tried, result.failed, result.wrong),
    )
    return result


def _climb(
    plan: TunePlan, result: Found, milliseconds: Callable[..., list[float]], correct: Callable[[Tile], bool]
) -> None:
    seen, improved = {result.table}, True
    while improved and not passed(plan.deadline):
        improved, start = False, result.best
        for tile in neighbors(start):
            if tile in seen or result.tried >= plan.candidates or passed(plan.deadline):
                continue
            seen.add(tile)
            result.tried += 1
            times = attempt(milliseconds, result.best, tile)
            if isinstance(times, str):
                result.failed += 1
                result.errors.append(f"{tile}: {times}")
            elif times[1] < GAIN * times[0]:
                if correct(tile):
                    result.best, result.best_ms, improved = tile, times[1], True
                else:
                    result.wrong += 1


def as_tuned(found: Found, plan: TunePlan) -> Tuned:
    """Return the entry of the cache file."""
    gpu = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu"
    dtype, measured = str(plan.dtype).removeprefix("torch."), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    triton, source = tuned.triton_version(), tuned.source_hash(found.kernel)
    best = found.best, found.best_ms, found.table_ms
    return Tuned(found.kernel, dtype, gpu, triton, source, *best, measured)


def tune_table(found: list[Found]) -> str:
    """Return one line per kernel: its times before and after, and the fastest row."""
    rows = []
    for one in found:
        row, counts = one.best, f"{one.tried} ({one.failed} failed, {one.wrong} wrong)"
        best = f"{row.block_m} x {row.block_n} x {row.block_k}, "
        best += f"{row.num_warps} warps, {row.num_stages} stages"
        times = (f"{one.table_ms:.4f}", f"{one.best_ms:.4f}", f"{one.table_ms / one.best_ms:.3f}")
        rows.append((one.kernel, one.op, one.mode, *times, best, counts))
    header = ("kernel", "timed in", "mode", "table ms", "best ms", "ratio", "best row", "candidates")
    return console.Table(header, rows).text() if rows else "no kernel was tuned"
