"""Measuring: every op asked for, every mode and peer, each judged before it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from pgolf_fast import console
from pgolf_fast.bench import check, peers, registry
from pgolf_fast.bench.case import MODES, Case, Contender, Mode
from pgolf_fast.bench.roofline import roof
from pgolf_fast.bench.store import Record
from pgolf_fast.bench.timer import Timing, gpu_state, peak_bytes, time_in_turn
from pgolf_fast.config.schema import RunConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """What to measure and how long."""

    config: RunConfig
    ops: Sequence[str]
    tokens: Sequence[int]
    peers: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    modes: Sequence[Mode] = MODES
    seconds: float = 0.5
    """Timing of one contender in one mode."""
    runs: int = 20
    deadline: float | None = None
    """`time.monotonic()` after which nothing new is begun."""

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def places(self) -> list[tuple[str, int]]:
        """Ops with token counts: all ops at the first count, then all at the next; fixed sizes come last."""
        free = [name for name in self.ops if registry.OPS[name].tokens is None]
        fixed = [(name, m) for name in self.ops for m in registry.OPS[name].tokens or ()]
        return [(name, m) for m in self.tokens for name in free] + fixed


def attempt(action: Callable[[], Result]) -> Result | str:
    """The result of `action`, or what went wrong in one line."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - that a contender fails, in whatever way, is a result
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0][:300]}"


def measure(plan: Plan, write: Callable[[Record], None]) -> None:
    """Hand every record to `write` as soon as it is complete. Errors are records too."""
    for name, tokens in plan.places():
        about: Record = {
            "preset": plan.config.name,
            "op": name,
            "tokens": tokens,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": plan.device.type,
        }
        if plan.late:
            write({**about, "peer": "ours", "mode": "-", "error": "skipped: out of time"})
            continue
        console.logger.info("%s, %d tokens", name, tokens)
        torch._dynamo.reset()  # compiled code of other cases would count towards a limit
        place = registry.Place(plan.config, tokens, plan.dtype, plan.device)
        case = attempt(lambda name=name, place=place: registry.make_case(name, place))  # type: ignore[misc]
        if isinstance(case, str):
            write({**about, "peer": "ours", "mode": "-", "error": case})
            continue
        about |= {"shape": case.shape}
        _measure_case(plan, case, lambda record, about=about: write({**about, **record}))  # type: ignore[misc]
        del case
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_case(plan: Plan, case: Case, write: Callable[[Record], None]) -> None:
    contenders = _contenders(plan, case, write)
    modes = case.modes(plan.modes)
    truth = attempt(lambda: check.truth_of(case, modes[-1]))  # the last mode is the most complete
    if isinstance(truth, str):
        write({"peer": "ours", "mode": "-", "error": f"no reference result: {truth}"})
        return
    for mode in modes:
        wanted = truth if mode == "fwd+bwd" else replace(truth, douts=())
        errors: dict[str, float] = {}
        for contender in contenders:
            if plan.late and contender.name != "ours":
                write({"peer": contender.name, "mode": mode, "error": "skipped: out of time"})
                continue
            verdict = attempt(lambda c=contender, w=wanted: check.judge(c, w))  # type: ignore[misc]
            if isinstance(verdict, str) or not verdict.ok:
                what = verdict if isinstance(verdict, str) else f"refused, wrong result: {verdict}"
                write({"peer": contender.name, "mode": mode, "error": what})
            else:
                errors[contender.name] = verdict.error
            if contender.name == "ours" and "ours" not in errors:
                break  # nothing to compare the peers with
        if "ours" in errors:
            correct = [c for c in contenders if c.name in errors]
            for record in _time(plan, case, mode, correct, truth.douts):
                write({**record, "largest_error": errors[record["peer"]]})


def _contenders(plan: Plan, case: Case, write: Callable[[Record], None]) -> list[Contender]:
    """Ours first, then those of the plan's peers that exist here."""
    found = [case.ours]
    for peer in plan.peers:
        if not peers.applies(peer, case):
            continue
        try:
            found.append(peers.build(peer, case))
        except peers.UnavailableError as error:
            write({"peer": peer, "mode": "-", "error": f"unavailable: {error}"})
    return found


def _time(
    plan: Plan, case: Case, mode: Mode, contenders: Sequence[Contender], douts: Sequence[torch.Tensor]
) -> list[Record]:
    """One record a contender, timed in turn."""
    calls: dict[str, Callable[[], object]] = {
        c.name: c.forward if mode == "fwd" else (lambda c=c: c.both(douts))  # type: ignore[misc]
        for c in contenders
    }
    peaks = {name: peak_bytes(call, plan.device) for name, call in calls.items()}
    before = gpu_state(plan.device)
    times = time_in_turn(calls, plan.device, seconds=plan.seconds, runs=plan.runs)
    after = gpu_state(plan.device)
    return [
        {
            "peer": name,
            "mode": mode,
            **figures(case, mode, timing),
            "peak_bytes": peaks[name],
            "gpu_before": before,
            "gpu_after": after,
        }
        for name, timing in times.items()
    ]


def figures(case: Case, mode: Mode, timing: Timing) -> Record:
    """What follows from the times: rates by the op's FLOPs and ideal bytes, and the share of the roofline."""
    flops, moved = case.work.of(mode)
    limit = roof(case.device, case.dtype)
    seconds = timing.median / 1e3
    return {
        "median_ms": timing.median,
        "p20_ms": timing.quantile(0.2),
        "p80_ms": timing.quantile(0.8),
        "min_ms": min(timing.samples),
        "runs": len(timing.samples),
        "samples_ms": [round(sample, 5) for sample in timing.samples],
        "tflops": flops / seconds / 1e12,
        "gbytes_per_second": moved / seconds / 1e9,
        "roofline_percent": 100 * limit.seconds(flops, moved) / seconds,
        "flops": flops,
        "ideal_bytes": moved,
        "roof_tflops": limit.flops / 1e12,
        "roof_gbytes_per_second": limit.bytes / 1e9,
        "roof_source": limit.source,
    }
