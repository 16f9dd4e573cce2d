"""The line that training prints while it goes on."""

from __future__ import annotations

import resource
import sys

import torch

from pgolf_fast import console
from pgolf_fast.config.schema import TrainConfig
from pgolf_fast.distributed import World
from pgolf_fast.train.trainer import StepResult


class StepLog:
    """Step, loss, tokens/s, ms/step, time left and memory, at the configured interval."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self._since, self._tokens = (0, 0.0), 0

    def start_at(self, step: int, elapsed: float) -> None:
        """Measure from here: the steps before were another process's."""
        self._since = (step, elapsed)

    def after_step(self, step: int, elapsed: float, result: StepResult, *, last: bool) -> None:
        """Print if this step is due. `step` counts from 1."""
        if result.decay_triggered:
            console.logger.info(
                "step %d: training loss has stopped improving; learning rate decays from here", step
            )
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
    """Most memory this process has used: on the GPU if it has one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)
