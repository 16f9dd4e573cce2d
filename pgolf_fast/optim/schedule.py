"""The learning-rate multiplier: constant, then a decay to zero over time or steps (PR 1501, PR 301)."""

import math
from dataclasses import dataclass

from pgolf_fast.config.schema import TrainConfig


@dataclass
class ScheduleState:
    """State of the adaptive trigger. Positions are in seconds or steps, the unit of train.schedule."""

    loss_ema: float | None = None
    decay_start: float | None = None
    trigger_step: int | None = None


class Schedule:
    """The multiplier of every learning rate. Decisions use the training loss only, never validation."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.state = ScheduleState()

    def multiplier(self, step: int, elapsed: float) -> float:
        """Return 1 before the decay, then a half cosine or a line that reaches 0 at the end of the run.

        If the decay is longer than the run, a cosine is compressed to fit, and a line starts below 1. Neither
        falls below train.min_lr.
        """
        c = self.config
        if step < c.lr_hold_steps:
            return 1.0
        position, end, pace = self._position(step, elapsed)
        start = self.state.decay_start
        if start is None:
            steps, fraction = c.warmdown_steps, c.warmdown_fraction or 0.0
            length = fraction * end if steps is None else steps * pace
            start = end - length if c.warmdown_shape == "linear" else max(end - length, 0.0)
        if position < start:
            return 1.0
        done = min((position - start) / max(end - start, 1e-9), 1.0)  # the trigger may come at the end
        left = 1 - done if c.warmdown_shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return max(left, c.min_lr)

    def quantizes(self, step: int, elapsed: float) -> bool:
        """Return True if quantization-aware training is due to begin by this step."""
        qat = self.config.qat
        if qat is None:
            return False
        if qat.below is not None:
            return self.multiplier(step, elapsed) < qat.below
        position, end, _ = self._position(step, elapsed)
        return position >= (qat.from_share or 0.0) * end

    def loops(self, step: int, elapsed: float) -> bool:
        """Return True if this step runs the extra passes of model.num_loops."""
        position, end, _ = self._position(step, elapsed)
        return position >= self.config.loop_from * end

    def over(self, step: int, elapsed: float) -> bool:
        """Return True at the end of the decay, which is where a Reptile phase begins."""
        position, end, _ = self._position(step, elapsed)
        return position >= end

    def _position(self, step: int, elapsed: float) -> tuple[float, float, float]:
        """Return the position in the run, the end of the decay, and the length of a step, in one unit."""
        c = self.config
        if c.schedule == "time":
            assert c.max_seconds is not None
            share = 0.0 if c.reptile is None else c.reptile.share
            return elapsed, (1 - share) * c.max_seconds, elapsed / max(step, 1)
        steps = c.steps if c.reptile is None else c.steps - c.reptile.steps(c.steps)
        return float(step), float(steps), 1.0

    def observe(self, step: int, loss: float, elapsed: float) -> bool:
        """Watch a step's training loss; return True at the step that triggers the decay."""
        c, s = self.config, self.state
        due = step >= c.adaptive_min_step and step % c.adaptive_every == 0
        if not (c.adaptive_warmdown and due and s.decay_start is None):
            return False
        if s.loss_ema is None:
            s.loss_ema = loss
            return False
        smoothed = c.adaptive_ema * s.loss_ema + (1 - c.adaptive_ema) * loss
        improvement, s.loss_ema = s.loss_ema - smoothed, smoothed
        if improvement >= c.adaptive_threshold:
            return False
        s.decay_start, s.trigger_step = self._position(step, elapsed)[0], step
        return True
