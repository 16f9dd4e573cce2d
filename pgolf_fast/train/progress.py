"""The progress line of training."""

from __future__ import annotations

import resource
import sys

import torch

from pgolf_fast import console
from pgolf_fast.config.schema import TrainConfig
from pgolf_fast.distributed import World
from pgolf_fast.train.trainer import StepResult


class StepLog:
    """Prints step, loss, tokens/s, ms/step, time left and memory every train.log_every steps."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self._since, self._tokens = (0, 0.0), 0

    def start_at(self, step: int, elapsed: float) -> None:
        """Measure from here on: earlier steps were made by another process."""
        self._since = (step, elapsed)

    def after_step(self, result: StepResult, elapsed: float, *, last: bool) -> None:
        """Count a step, and print the line if it is due."""
        step = result.step
        self._tokens += result.tokens
        if not (step == 1 or step % self.config.log_every == 0 or last):
            return
        steps, seconds = step - self._since[0], elapsed - self._since[1]
        pace, rate = seconds / max(steps, 1), self._tokens / max(seconds, 1e-9)
        self._since, self._tokens = (step, elapsed), 0
        console.logger.info(
            "step %d/%d  loss %.4f  %s%s  %s tok/s  %.0f ms/step  %s elapsed, ETA %s  %d MiB",
            step,
            self.config.steps,
            result.loss,
            "reptile" if result.reptile else f"lr x{result.multiplier:.3f}",
            "  int6" if result.qat else "",
            f"{rate:,.0f}",
            1e3 * pace,
            console.duration(elapsed),
            console.duration(self._time_left(step, elapsed, pace)),
            peak_memory_mib(self.world),
        )

    def _time_left(self, step: int, elapsed: float, pace: float) -> float:
        by_steps = (self.config.steps - step) * pace
        if self.config.max_seconds is None:
            return by_steps
        return max(0.0, min(by_steps, self.config.max_seconds - elapsed))


def peak_memory_mib(world: World) -> int:
    """Return this process's peak memory in MiB: allocated on its GPU if it has one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, KiB on Linux
