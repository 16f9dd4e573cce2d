"""The learning-rate multiplier: constant, then a fall to zero over time or steps (PR 1501, PR 301)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from pgolf_fast.config.schema import TrainConfig


@dataclass
class ScheduleState:
    """What the adaptive trigger remembers. Positions are seconds or steps, as the schedule is measured."""

    loss_ema: float | None = None
    decay_start: float | None = None
    trigger_step: int | None = None


class Schedule:
    """Multiplier of every learning rate. Decisions use the training loss only, never validation."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.state = ScheduleState()

    def multiplier(self, step: int, elapsed: float) -> float:
        """1 before the decay, then a half cosine or a line that reaches 0 at the end of the run.

        A decay longer than the run is squeezed into it if it is a cosine; a line begins below 1.
        """
        c = self.config
        if step < c.lr_hold_steps:
            return 1.0
        position, end, pace = self._position(step, elapsed)
        start = self.state.decay_start
        if start is None:
            length = (
                (c.warmdown_fraction or 0.0) * end if c.warmdown_steps is None else c.warmdown_steps * pace
            )
            start = end - length if c.warmdown_shape == "linear" else max(end - length, 0.0)
        if position < start:
            return 1.0
        done = min((position - start) / max(end - start, 1e-9), 1.0)
        return 1 - done if c.warmdown_shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def quantises(self, step: int, elapsed: float) -> bool:
        """Whether quantisation-aware training begins here, if it has not before."""
        qat = self.config.qat
        if qat is None:
            return False
        if qat.from_share is not None:
            position, end, _ = self._position(step, elapsed)
            return position >= qat.from_share * end
        assert qat.below is not None
        return self.multiplier(step, elapsed) < qat.below

    def over(self, step: int, elapsed: float) -> bool:
        """Whether the decay has come to its end, where the Reptile phase begins if there is one."""
        position, end, _ = self._position(step, elapsed)
        return position >= end

    def _position(self, step: int, elapsed: float) -> tuple[float, float, float]:
        """Where the run is, where the decay ends, and how far a step goes, in the schedule's measure."""
        c = self.config
        if c.schedule == "time":
            assert c.max_seconds is not None
            share = 0.0 if c.reptile is None else c.reptile.share
            return elapsed, (1 - share) * c.max_seconds, elapsed / max(step, 1)
        steps = c.steps if c.reptile is None else c.steps - c.reptile.steps(c.steps)
        return float(step), float(steps), 1.0

    def observe(self, step: int, loss: float, elapsed: float) -> bool:
        """Look at this step's training loss; True on the step at which the decay is triggered."""
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

    def state_dict(self) -> dict[str, float | int | None]:
        return asdict(self.state)

    def load_state(self, state: dict[str, float | int | None]) -> None:
        self.state = ScheduleState(**state)  # type: ignore[arg-type]
