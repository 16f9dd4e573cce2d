"""One optimiser step, and everything whose state a step changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.distributed import World
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import load_weights
from pgolf_fast.optim.average import WeightAverage
from pgolf_fast.optim.optimizer import Optimizer
from pgolf_fast.optim.schedule import Schedule
from pgolf_fast.optim.sharding import Sharding, mean_gradients
from pgolf_fast.quant.fake import make_fake
from pgolf_fast.train.meta.rates import SlotRates
from pgolf_fast.train.meta.reptile import Reptile
from pgolf_fast.train.meta.step import meta_step
from pgolf_fast.train.micro_step import DirectStep, GraphStep, LossFunction, MicroStep


class Loader(Protocol):
    """Batches of (tokens, targets), each (B, T), from a position that can be saved."""

    def next_batch(self) -> tuple[Tensor, Tensor]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def set_batch(self, micro_batch_tokens: int) -> None: ...


class NonFiniteError(RuntimeError):
    """A loss or the gradient of a step was NaN or infinite; no update was made from it."""


@dataclass(frozen=True)
class StepResult:
    """What one step reports: numbers for the log. In the Reptile phase: means of inner steps."""

    loss: float
    multiplier: float
    grad_norm: float
    qat: bool
    meta_loss: float | None
    decay_triggered: bool
    tokens: int
    reptile: bool


class PendingStep:
    """A step that was launched, whose numbers may still be on their way from the GPU."""

    def __init__(self, trainer: Trainer, numbers: Tensor, meta: bool, multiplier: float):
        self._trainer, self._meta, self._multiplier = trainer, meta, multiplier
        self._step, self._elapsed, self._qat = trainer.step, trainer.elapsed, trainer.qat
        self._reptile = trainer.in_reptile
        self._tokens = trainer.tokens_per_outer_step if self._reptile else trainer.tokens_per_step
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def need_finite(self) -> tuple[float, float, float]:
        """Wait for loss, gradient norm and meta loss. Raises NonFiniteError when one is not finite."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm, meta_loss = self._numbers.tolist()
        for what, value in (("loss", loss), ("meta loss", meta_loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(f"the {what} at step {self._step + 1} is {value}")
        return loss, norm, meta_loss

    def result(self) -> StepResult:
        """The numbers, after a look at the adaptive decay. Raises NonFiniteError as `need_finite` does."""
        loss, norm, meta_loss = self.need_finite()
        triggered = not self._reptile and self._trainer.schedule.observe(self._step, loss, self._elapsed)
        return StepResult(
            loss=loss,
            multiplier=self._multiplier,
            grad_norm=norm,
            qat=self._qat,
            meta_loss=meta_loss if self._meta else None,
            decay_triggered=triggered,
            tokens=self._tokens,
            reptile=self._reptile,
        )


class Trainer:
    """Model, optimiser, schedule and averages of a run, advanced one step at a time (PR 1501)."""

    def __init__(self, model: GPT, config: RunConfig, loader: Loader, world: World):
        self.model, self.config, self.loader, self.world = model, config, loader, world
        self.sharding = Sharding(world.rank, world.world_size)
        meta, reptile = config.train.meta, config.train.reptile
        self.rates = SlotRates(model) if meta is not None and meta.slot_rates else None
        self.reptile = None if reptile is None else Reptile(model, reptile)
        self.reptile_from: int | None = None
        """Steps before the Reptile phase, once it has begun."""
        self.optimizer = Optimizer(model, config.optim, self.sharding, self._rates())
        self.schedule = Schedule(config.train)
        self.average = WeightAverage(model, config.average)
        self.micro_steps = max(
            1, config.train.batch_tokens // (config.train.micro_batch_tokens * world.world_size)
        )
        z_loss = config.train.z_loss
        self.loss_function: LossFunction = partial(model.loss, z_loss=z_loss) if z_loss else model.loss
        scale = 1 / self.micro_steps
        self.micro_step: MicroStep = GraphStep(model, scale) if config.train.cuda_graph else DirectStep(scale)
        self.step, self.elapsed, self.qat = 0, 0.0, False
        model.allocate_gradient_banks()

    @property
    def in_reptile(self) -> bool:
        return self.reptile_from is not None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step before the Reptile phase, over all ranks."""
        return self.micro_steps * self.config.train.micro_batch_tokens * self.world.world_size

    @property
    def tokens_per_outer_step(self) -> int:
        """Tokens of a step of the Reptile phase, over all ranks."""
        train = self.config.train
        segments = 0 if train.reptile is None else train.reptile.inner_steps * train.reptile.batch_seqs
        return segments * train.seq_len * self.world.world_size

    @property
    def tokens(self) -> int:
        """Tokens of all steps so far, over all ranks."""
        plain = self.step if self.reptile_from is None else self.reptile_from
        return plain * self.tokens_per_step + (self.step - plain) * self.tokens_per_outer_step

    def advance(self) -> StepResult:
        """One optimiser step, and its numbers. Raises NonFiniteError when one of them is not finite."""
        return self.launch().result()

    def launch(self) -> PendingStep:
        """One optimiser step, without waiting for the GPU.

        On the CPU a number that is not finite raises NonFiniteError before any update; on a GPU the update is
        made, and `PendingStep.result` raises.
        """
        if self.reptile is not None and (self.in_reptile or self.schedule.over(self.step, self.elapsed)):
            return self._outer_step(self.reptile)
        multiplier = self.schedule.multiplier(self.step, self.elapsed)
        self.qat = self.qat or self.schedule.quantises(self.step, self.elapsed)
        loss, tokens, targets = self._accumulate()
        meta_loss = self._meta(multiplier, tokens, targets)
        self._mask_frozen_skips()
        mean_gradients(
            [p.grad for p in self.optimizer.parameters if p.grad is not None], self.world.world_size
        )
        norm = self.optimizer.clip()
        meta_number = torch.zeros_like(loss) if meta_loss is None else meta_loss
        pending = self._pending((loss, norm, meta_number), meta_loss is not None, multiplier)
        self.optimizer.step(self.step, multiplier)
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.step, multiplier)
        return pending

    def _pending(self, numbers: tuple[Tensor, ...], meta: bool, multiplier: float) -> PendingStep:
        """The step's numbers, as means over ranks, on their way; on the CPU they must be finite."""
        means = self.world.mean_(torch.stack([number.double() for number in numbers]))
        pending = PendingStep(self, means, meta, multiplier)
        if self.world.device.type == "cpu":
            pending.need_finite()
        return pending

    def _outer_step(self, reptile: Reptile) -> PendingStep:
        """One step of the Reptile phase, in which the schedule and the averages have no part any more."""
        if not self.in_reptile:
            load_weights(self.model, self.average.final(), "the average")
            self._read_segments_from(self.step)
        batches = (self._next_batch() for _ in range(reptile.config.inner_steps))
        way = reptile.adapt(batches, self._rounding())
        mean_gradients(way.ends, self.world.world_size)
        pending = self._pending((way.loss, way.grad_norm, torch.zeros_like(way.loss)), False, 0.0)
        reptile.move(way.ends)
        self.step += 1
        return pending

    def _read_segments_from(self, step: int) -> None:
        assert self.reptile is not None
        self.reptile_from = step
        self.loader.set_batch(self.reptile.config.batch_seqs * self.config.train.seq_len)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        tokens, targets = self.loader.next_batch()
        device = self.world.device
        return tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def _rounding(self) -> Callable[[Tensor], Tensor] | None:
        """What forward does to the banks: fake quantisation once it is switched on."""
        qat = self.config.train.qat
        if not self.qat or qat is None or not qat.banks:
            return None
        return make_fake(self.config.quant.bits, self.config.quant.scale_floor)

    def _accumulate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the whole batch; its mean loss on this rank, and the last micro-batch."""
        banks = self.model.banks(self._rounding())
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for _ in range(self.micro_steps):
            tokens, targets = self._next_batch()
            total += self.micro_step(self.loss_function, tokens, targets, banks).double()
        return total / self.micro_steps, tokens, targets

    def _meta(self, multiplier: float, tokens: Tensor, targets: Tensor) -> Tensor | None:
        meta = self.config.train.meta
        if meta is None or self.step % meta.every != 0 or multiplier <= meta.above:
            return None
        scale = 1 / self.micro_steps if meta.dilute else 1.0
        return meta_step(self.model, tokens, targets, meta, loss_scale=scale, rates=self.rates)

    def _mask_frozen_skips(self) -> None:
        frozen, gradient = self.config.model.frozen_skips, self.model.skip_weights.grad
        if frozen and gradient is not None:
            gradient[len(gradient) - frozen :] = 0

    def warm_up(self, steps: int) -> None:
        """Run steps (so that everything is compiled) and undo every effect they had (PR 1501)."""
        tensors, story = {k: v.detach().clone() for k, v in self.tensors().items()}, self.story()
        for _ in range(steps):
            self._accumulate()
            self.optimizer.step(self.step, 1.0)
            self.optimizer.zero_grad()
        self.restore(tensors, story)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step changes."""
        weights = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        rates = {name: rate.detach() for name, rate in self._rates().items()}
        return {**weights, **rates, **self.optimizer.state(), **self.average.state()}

    def _rates(self) -> dict[str, nn.Parameter]:
        named = () if self.rates is None else self.rates.named_parameters()
        return {f"slot_rates.{name}": rate for name, rate in named}

    def story(self) -> dict[str, Any]:
        """Everything else that a step changes, as JSON values."""
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "qat": self.qat,
            "swa_count": self.average.swa_count,
            "reptile_from": self.reptile_from,
            "schedule": self.schedule.state_dict(),
            "loader": self.loader.state(),
        }

    def restore(
        self, tensors: dict[str, Tensor], story: dict[str, Any], origin: str = "the snapshot"
    ) -> None:
        """Continue from `tensors` and `story`. Raises PgolfError when they belong to another model."""
        weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        load_weights(self.model, weights, origin)
        for name, rate in self._rates().items():
            rate.data.copy_(tensors[name])
        self.optimizer.load_state(tensors)
        self.average.load_state(tensors, story["swa_count"])
        self.schedule.load_state(story["schedule"])
        if story.get("reptile_from") is not None:  # which earlier versions did not write
            self._read_segments_from(story["reptile_from"])
        self.loader.load_state(story["loader"])
        self.step, self.elapsed, self.qat = story["step"], story["elapsed"], story["qat"]
