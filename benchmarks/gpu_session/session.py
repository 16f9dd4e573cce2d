"""State shared by the parts of a GPU session: arguments, remaining time, and the JSON file of a part."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pgolf_fast.bench.run import attempt
from pgolf_fast.bench.store import provenance
from pgolf_fast.bench.timer import gpu_state
from pgolf_fast.io import write_text

FIRST_WAY = 2.0  # least seconds for a way before one of its kind was measured
Runner = TypeVar("Runner")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Session:
    """Arguments of a part."""

    out: Path
    seconds: float  # time limit of this part
    started: float  # `time.monotonic()` at its start
    dry: bool  # a rehearsal on a CPU at toy sizes
    preset: str
    ops: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    steps: int = 200  # most training steps, for the comparison of losses
    peers: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    first: bool = False  # first contact: what a new GPU must show before anything else
    command: tuple[str, ...] = ()  # arguments of this process, which its ways get, too
    way: str = ""  # the only way to measure
    micro: int = 1  # micro-batches of the preset in one of this way's
    slow: str = ""  # a way that pretends to compile for ten minutes
    way_seconds: float = 240.0  # most time of one way

    def wants(self, contender: str) -> bool:
        """Return whether a contender is selected by a part of its name; by default all are."""
        return not self.contenders or any(word in contender for word in self.contenders)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.started + self.seconds - time.monotonic()

    def deadline(self, share: float = 1.0) -> float:
        """Return the `time.monotonic()` at which this share of the remaining time will have passed."""
        return time.monotonic() + share * self.left


class PartFile:
    """The JSON file of one part, rewritten with every new result."""

    def __init__(self, session: Session, part: str):
        self.path = session.out / f"{part}.json"
        self.content: dict[str, object] = {
            "part": part,
            "status": "running",
            "dry_run": session.dry,
            "preset": session.preset,
            **provenance(),
            "gpu_before": gpu_state(session.device),
        }
        self._started, self._device = session.started, session.device
        self.write()

    def write(self, **values: object) -> None:
        self.content.update(values)
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")

    def finish(self, ok: bool, **values: object) -> None:
        """Record that the part is complete, and whether its results are right."""
        self.write(status="done", ok=ok, gpu_after=gpu_state(self._device), **values)


def each_alone(
    ways: Mapping[str, bool],
    session: Session,
    deadline: float,
    note: Callable[[str, dict[str, Any]], None],
    *words: str,
) -> dict[str, str]:
    """Measure each way in a process of its own, most important first; return failures with reasons.

    `ways` tells which compile. `note` gets a way's results when they are there. A process ends after half of
    the time left, so that a slow compile costs one way. One that would not end, by the longest of its kind so
    far, is not started, nor is one after the deadline if two were measured.
    """
    failed: dict[str, str] = {}
    took: dict[bool, list[float]] = {True: [], False: []}
    for name, compiles in ways.items():
        start, limit = time.monotonic(), min(session.way_seconds, session.left / 2)
        late = start > deadline and len(took[True] + took[False]) > 1
        if late or limit < max(took[compiles], default=FIRST_WAY):
            failed[name] = "not started: out of time"
            continue
        found = alone(session, name, limit, *words)
        if isinstance(found, str):
            failed[name] = found
        else:
            took[compiles].append(time.monotonic() - start)
            note(name, found)
        print(f"{name}: {failed.get(name, 'measured')} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


def alone(session: Session, name: str, limit: float, *words: str) -> dict[str, Any] | str:
    """Return the results of a way, measured in another process, or why there are none."""
    path = session.out / "way.json"
    path.unlink(missing_ok=True)
    own = ("--way", name, "--seconds", str(limit), *words)
    command = [sys.executable, str(Path(__file__).parent), *session.command, *own]
    with subprocess.Popen(command, start_new_session=True) as process:  # ends with its compilers
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.unlink(missing_ok=True)
    return found.get("failed") or found or f"crashed with exit status {status}"


def measure_way(session: Session, measure: Callable[[], dict[str, Any]]) -> bool:
    """Write the results of this process's way for `alone`; return whether there are any."""
    if session.slow == session.way:
        time.sleep(600)  # a rehearsal of a slow compile
    found = attempt(measure)
    content = {"failed": found} if isinstance(found, str) else found
    write_text(session.out / "way.json", json.dumps(content))
    return not isinstance(found, str)


def prepared(
    makers: Mapping[str, Callable[[], Runner]], file: PartFile, deadline: float, took: Mapping[str, float]
) -> tuple[list[Runner], dict[str, str]]:
    """Make every contender that ends before the deadline if it takes as long as it took before.

    Return them, and the failures with reasons.
    """
    runners: list[Runner] = []
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        start = time.monotonic()
        if start + took[name] > deadline:
            failed[name] = "skipped: out of time"
            continue
        made = attempt(make)
        if isinstance(made, str):
            failed[name] = made
        else:
            runners.append(made)
            seconds[name] = time.monotonic() - start
        print(f"{name}: {failed.get(name) or f'ready after {seconds[name]:.0f} s'}", flush=True)
        file.write(prepared=seconds)
    return runners, failed


def take_turns(
    runners: list[Any],
    step: Callable[[Any], object],
    most: int,
    deadline: float,
    failed: dict[str, str],
    write: Callable[[], None],
) -> None:
    """Call `step` with each runner in turn, `most` times or, after three, until the deadline.

    A runner that fails is removed, with its reason in `failed`. Calls `write` now and then, and at the end.
    """
    longest = 0.0
    for i in range(most):
        if i >= 3 and time.monotonic() + longest > deadline:
            break
        start = time.monotonic()
        for runner in list(runners):
            problem = attempt(partial(step, runner))
            if isinstance(problem, str):
                runners.remove(runner)
                failed[runner.contender.name] = problem
        longest = max(longest, time.monotonic() - start) if i else 0.0
        if i in (0, 2) or i % 10 == 9:
            write()
    write()


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of a call and its milliseconds, between two synchronizations."""
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return result, 1e3 * (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
