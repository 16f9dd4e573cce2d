"""`pgolf bench`: every op, mode and peer that a plan asks for, each judged before it is timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from pgolf_fast import console
from pgolf_fast.bench import peers, registry
from pgolf_fast.bench.roofline import roof
from pgolf_fast.bench.store import Record
from pgolf_fast.bench.timer import Timing, deadline_after, gpu_state, passed, peak_bytes, time_in_turn
from pgolf_fast.config.presets import preset, shrink
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.ops import cases, judge, tuned
from pgolf_fast.ops.case import MODES, Case, Contender, Mode

Result = TypeVar("Result")
GPU_TOKENS = (98_304, 32_768, 196_608)
CPU_TOKENS = (2_048,)
QUICK_TOKENS = (128,)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Plan:
    """Ops, sizes and peers to measure, and for how long."""

    config: RunConfig
    ops: Sequence[str]
    tokens: Sequence[int]
    peers: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    modes: Sequence[Mode] = MODES
    seconds: float = 0.5  # Time spent on one contender in one mode
    runs: int = 20
    deadline: float | None = None  # `time.monotonic()` after which nothing new is started

    def items(self) -> list[tuple[str, int]]:
        """Return ops with token counts: all ops at the first count, then at the next; fixed counts last."""
        free = [name for name in self.ops if cases.CASES[name].rows is None]
        fixed = [(name, m) for name in self.ops for m in cases.CASES[name].rows or ()]
        return [(name, m) for m in self.tokens for name in free] + fixed


def bench_plan(
    name: str,
    *,
    ops: Sequence[str] = (),
    tokens: Sequence[int] = (),
    modes: Sequence[Mode] = MODES,
    peer_names: Sequence[str] | None = None,
    dtype: Dtype = "auto",
    quick: bool = False,
    minutes: float | None = None,
) -> Plan:
    """Return the plan for a preset on this machine; empty `ops` and `tokens` take all and the usual counts.

    quick: shrink the preset and measure little, to see whether everything runs. Raises PgolfError for unknown
    names.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    config = preset(name)
    usual: tuple[int, ...] = CPU_TOKENS if device is None else GPU_TOKENS
    chosen: tuple[str, ...] = peers.PEERS
    seconds, runs = (2.0 if device is None else 0.5), 20
    if quick:
        usual, chosen, seconds, runs = QUICK_TOKENS, peers.QUICK, 0.02, 5
        config = shrink(config, "tiny")
    for peer in peer_names or ():
        if peer not in peers.PEERS:
            raise PgolfError(f"unknown peer {peer!r}: peers are {', '.join(peers.PEERS)}")
    for count in tokens:
        if count < 1:
            raise PgolfError(f"--tokens has {count}; it must be positive")
    if device is not None and tuned.load_tuned(device) and not quick:
        console.logger.info("set PGOLF_FAST_TUNE=off to measure the launch table as it is written")
    if dtype != "auto":
        compute = getattr(torch, dtype)
    else:
        compute = torch.float32 if device is None else resolve_dtype("auto", device)
    named, modes = chosen if peer_names is None else peer_names, [mode for mode in MODES if mode in modes]
    place, deadline = device or torch.device("cpu"), deadline_after(minutes)
    ops, tokens = registry.select(ops), tokens or usual
    return Plan(config, ops, tokens, named, compute, place, modes, seconds, runs, deadline)


def attempt(action: Callable[..., Result], *arguments: Any) -> Result | str:
    """Return the result of `action(*arguments)`, or its error in one line."""
    try:
        return action(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever a contender raises is a result
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0][:300]}"


def measure(plan: Plan, write: Callable[[Record], None]) -> None:
    """Pass every record to `write` as soon as it is complete. Errors are records too."""
    kind = {"dtype": str(plan.dtype).removeprefix("torch."), "device": plan.device.type}
    for name, tokens in plan.items():
        about: Record = {"preset": plan.config.name, "op": name, "tokens": tokens, **kind}
        if passed(plan.deadline):
            write({**about, "peer": "ours", "mode": "-", "error": "skipped: out of time"})
            continue
        console.logger.info("%s, %d tokens", name, tokens)
        torch._dynamo.reset()  # compiled code of other cases would count toward the recompile limit
        case = attempt(registry.make_case, name, plan.config, tokens, plan.dtype, plan.device)
        if isinstance(case, str):
            write({**about, "peer": "ours", "mode": "-", "error": case})
            continue
        about["shape"] = asdict(case.sizes)
        for record in _measure_case(plan, case):
            write({**about, **record})
        del case
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_case(plan: Plan, case: Case) -> Iterator[Record]:
    contenders, modes = [case.ours()], case.modes(plan.modes)
    for peer in (peer for peer in plan.peers if peers.applies(peer, case)):
        try:
            contenders.append(peers.build(peer, case))
        except peers.UnavailableError as error:
            yield {"peer": peer, "mode": "-", "error": f"unavailable: {error}"}
    truth = attempt(lambda: judge.truth_of(case, backward=modes[-1] == "fwd+bwd"))
    if isinstance(truth, str):
        yield {"peer": "ours", "mode": "-", "error": f"no reference result: {truth}"}
        return
    for mode in modes:
        wanted = truth if mode == "fwd+bwd" else replace(truth, douts=())
        errors: dict[str, float] = {}
        for contender in contenders:
            if passed(plan.deadline) and contender.name != "ours":
                yield {"peer": contender.name, "mode": mode, "error": "skipped: out of time"}
                continue
            verdict = attempt(judge.judge, case, contender, wanted)
            if isinstance(verdict, str) or not verdict.ok:
                what = verdict if isinstance(verdict, str) else f"refused, wrong result: {verdict}"
                yield {"peer": contender.name, "mode": mode, "error": what}
            else:
                errors[contender.name] = verdict.error
            if contender.name == "ours" and "ours" not in errors:
                break  # nothing to compare the peers with
        if "ours" in errors:
            correct = [c for c in contenders if c.name in errors]
            for record in _time(plan, case, mode, correct, truth.douts):
                yield {**record, "largest_error": errors[record["peer"]]}


def _time(
    plan: Plan, case: Case, mode: Mode, contenders: Sequence[Contender], douts: Sequence[torch.Tensor]
) -> list[Record]:
    calls: dict[str, Callable[[], object]] = {
        c.name: c.forward if mode == "fwd" else partial(c.both, douts) for c in contenders
    }
    peaks = {name: peak_bytes(call, plan.device) for name, call in calls.items()}
    states = {"gpu_before": gpu_state(plan.device)}
    times = time_in_turn(calls, plan.device, seconds=plan.seconds, runs=plan.runs)
    states["gpu_after"] = gpu_state(plan.device)
    return [
        {"peer": name, "mode": mode, **figures(case, mode, timing), "peak_bytes": peaks[name], **states}
        for name, timing in times.items()
    ]


def figures(case: Case, mode: Mode, timing: Timing) -> Record:
    """Return times, rates by the op's FLOPs and ideal bytes, and the fraction of the roofline."""
    flops, moved = case.work.of(mode)
    limit, seconds, samples = roof(case.device, case.dtype), timing.median / 1e3, timing.samples
    times = {"median_ms": timing.median, "p20_ms": timing.quantile(0.2), "p80_ms": timing.quantile(0.8)}
    runs = {"min_ms": min(samples), "runs": len(samples), "samples_ms": [round(s, 5) for s in samples]}
    rates = {"tflops": flops / seconds / 1e12, "gbytes_per_second": moved / seconds / 1e9}
    rates["roofline_percent"] = 100 * limit.seconds(flops, moved) / seconds
    work = {"flops": flops, "ideal_bytes": moved}
    roofs = {"roof_tflops": limit.flops / 1e12, "roof_gbytes_per_second": limit.bytes / 1e9}
    return {**times, **runs, **rates, **work, **roofs, "roof_source": limit.source}
