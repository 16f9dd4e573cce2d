"""The one timer: contenders in turn, medians and quantiles; and the state of the GPU."""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than any L2: 60 MB on an H200
WANTED_RUNS, MIN_RUNS = 20, 5
Calls = Mapping[str, Callable[[], object]]


def deadline_after(minutes: float | None) -> float | None:
    """Return the time of `time.monotonic()` after that many minutes; None without a limit."""
    return None if minutes is None else time.monotonic() + 60 * minutes


def passed(deadline: float | None) -> bool:
    """True once `time.monotonic()` is past `deadline`; None never passes."""
    return deadline is not None and time.monotonic() > deadline


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every timed run of one contender."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def time_in_turn(
    calls: Calls, device: torch.device, *, seconds: float, rounds: int = 7, runs: int = WANTED_RUNS
) -> dict[str, Timing]:
    """Time each call in milliseconds, in the order A B C A B C ..., so that drift affects all alike.

    Each gets `runs` runs within about `seconds`, but at least five. On a GPU: CUDA events, a cold L2, and at
    least five warm-up runs; below about 0.1 ms, launch overhead is included. On a CPU: one thread and one
    warm-up run.
    """
    if device.type == "cuda":
        return _time_cuda(calls, device, seconds, rounds, runs)
    return _time_cpu(calls, seconds, runs)


def _time_cpu(calls: Calls, seconds: float, runs: int) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread():
        for call in calls.values():
            call()
        end = time.perf_counter() + seconds * len(calls)
        for done in range(runs):
            if done >= MIN_RUNS and time.perf_counter() > end:
                break
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(values) for name, values in samples.items()}


def _time_cuda(
    calls: Calls, device: torch.device, seconds: float, rounds: int, runs: int
) -> dict[str, Timing]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    each = {}
    for name, call in calls.items():
        first = min(_run_cuda(call, flush, 2))
        _run_cuda(call, flush, 1 if first > 200 else 3)
        affordable = int(1e3 * seconds / max(first, 1e-3))
        each[name] = -(-min(runs, max(MIN_RUNS, affordable)) // rounds)
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += _run_cuda(call, flush, each[name])
    return {name: Timing(values) for name, values in samples.items()}


def _run_cuda(call: Callable[[], object], flush: torch.Tensor, runs: int) -> list[float]:
    """Return the milliseconds of `runs` calls, each after the L2 was overwritten."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        flush.zero_()  # also lets the host queue the call before the GPU reaches it
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(flush.device)
    return [start.elapsed_time(end) for start, end in events]


@contextlib.contextmanager
def temporarily(choose: Callable[[Any], object], value: object, usual: object) -> Iterator[None]:
    """Call `choose(value)` before the block and `choose(usual)` after it."""
    choose(value)
    try:
        yield
    finally:
        choose(usual)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Use one CPU thread: with two on a busy machine, an op's median was 16 ms and its minimum 8 us."""
    return temporarily(torch.set_num_threads, 1, torch.get_num_threads())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the memory that one call allocates at its peak; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


_QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version")


def gpu_state(device: torch.device) -> dict[str, str]:
    """Return clocks, power, temperature and driver as nvidia-smi reads them (read-only); {} without it."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    index = device.index or 0
    values = [line.split(",") for line in done.stdout.strip().splitlines()][index : index + 1]
    return {name: value.strip() for row in values for name, value in zip(_QUERY, row, strict=False)}
