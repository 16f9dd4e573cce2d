"""A clock for training that excludes pauses of the process, and progress lines."""

import resource
import statistics
import sys
import time
from collections import deque

import torch

from pgolf_fast import console
from pgolf_fast.config.schema import TrainConfig
from pgolf_fast.distributed import World
from pgolf_fast.train.trainer import StepResult

_PAUSE = 2.0  # seconds; a shorter step is never treated as a pause


class StepClock:
    """Measures steps. One during which the process or machine was suspended counts as a typical one."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)

    def start(self) -> None:
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def stop(self) -> float:
        """Return the seconds since `start` that count as training time."""
        wall, busy = time.perf_counter() - self._wall, time.process_time() - self._busy
        usual = statistics.median(self._recent) if self._recent else wall
        # a step that is slow because of compilation keeps a processor busy; a pause does not
        if wall > max(5 * usual, _PAUSE) and busy < wall / 2:
            paused = f"the process was paused for {console.duration(wall - usual)}"
            console.logger.warning(f"{paused}, which does not count as training time")
            return usual
        self._recent.append(wall)
        return wall


class StepLog:
    """The progress line, every train.log_every steps, and more often if steps are slow."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self._since, self._tokens, self._line = (0, 0.0), 0, time.monotonic()

    def start_at(self, step: int, elapsed: float) -> None:
        """Measure from this step on; an earlier process ran the previous ones."""
        self._since = (step, elapsed)

    def after_step(self, result: StepResult, elapsed: float, *, last: bool) -> None:
        """Count a step, and log the line if it is due."""
        step, c = result.step, self.config
        self._tokens += result.tokens
        limit = 10.0 if sys.stderr.isatty() else 60.0  # more often on a terminal
        waited = time.monotonic() - self._line >= limit
        if not (step == 1 or step % c.log_every == 0 or last or waited):
            return
        self._line = time.monotonic()
        steps, seconds = step - self._since[0], elapsed - self._since[1]
        pace, rate = seconds / max(steps, 1), self._tokens / max(seconds, 1e-9)
        self._since, self._tokens = (step, elapsed), 0
        phase = "reptile" if result.reptile else f"lr x{result.multiplier:.3f}"
        phase, peak = phase + ("  int6" if result.qat else ""), peak_memory_mib(self.world)
        place, left = f"{step}/{c.steps}", (c.steps - step) * pace
        if c.max_seconds is not None:
            left = max(0.0, min(left, c.max_seconds - elapsed))
            if c.schedule == "time":
                share = min(1.0, elapsed / c.max_seconds)
                place = f"{step}, {100 * share:.0f} % of {console.duration(c.max_seconds)}"
        console.logger.info(
            f"step {place}  loss {result.loss:.4f}  {phase}  {rate:,.0f} tok/s  {1e3 * pace:.0f} ms/step  "
            f"{console.duration(elapsed)} elapsed, ETA {console.duration(left)}  {peak} MiB"
        )


def peak_memory_mib(world: World) -> int:
    """Return this process's peak memory in MiB: allocated on its GPU if it has one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, KiB on Linux
