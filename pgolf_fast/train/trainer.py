"""One optimizer step, and all state that a step changes."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.loader import Loader, Rows
from pgolf_fast.distributed import World
from pgolf_fast.model.bank import Banks
from pgolf_fast.model.compiled import CapturedStep, compiled
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.segments import Segments
from pgolf_fast.model.weights import Tensors, load_weights
from pgolf_fast.optim.average import WeightAverage
from pgolf_fast.optim.optimizer import Optimizer
from pgolf_fast.optim.schedule import Schedule, ScheduleState
from pgolf_fast.quant.grid import make_fake
from pgolf_fast.train.meta import SlotRates, meta_step
from pgolf_fast.train.reptile import Reptile
from pgolf_fast.train.shares import LossFunction, Shares


class MicroStep:
    """Adds the gradients of `scale * loss` to the model's gradients and returns the loss, detached.

    With `cuda_graph` it replays a capture, which depends on the addresses of the banks and their gradients
    and on the batch's shape: any change makes a new one. The next call then overwrites the returned loss.
    """

    def __init__(self, model: GPT, scale: float, *, cuda_graph: bool = False):
        self.model, self.scale, self.cuda_graph = model, scale, cuda_graph
        self._key: object = None
        self._captured: CapturedStep[Tensor] | None = None

    def __call__(
        self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks, *segments: Tensor
    ) -> Tensor:
        def step(tokens: Tensor, targets: Tensor, *segments: Tensor) -> Tensor:
            loss = loss_function(tokens, targets, banks, *segments)
            (loss * self.scale).backward()
            return loss.detach()

        if not self.cuda_graph:
            return step(tokens, targets, *segments)
        inputs = tokens, targets, *segments
        addresses = tuple(w.data_ptr() for w in banks.weights())
        key = (loss_function, self.model.looping, *(t.shape for t in inputs), addresses)
        if self._captured is None or key != self._key:
            self._captured, self._key = CapturedStep(step, inputs, self._gradients()), key
        return self._captured(*inputs)

    def _gradients(self) -> list[Tensor]:
        """Return the gradient of every parameter, made where there is none: a capture adds in place."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]


def packed(loss: Callable[..., Tensor], longest: int) -> LossFunction:
    """Return `loss` of a packed row, with the starts of its segments of up to `longest` tokens at the end."""

    def of_row(tokens: Tensor, targets: Tensor, banks: Banks, cu_seqlens: Tensor) -> Tensor:
        return loss(tokens, targets, banks, segments=Segments(cu_seqlens, longest))

    return of_row


class NonFiniteError(RuntimeError):
    """A loss or the gradient of a step was NaN or infinite."""


@dataclass(frozen=True)
class StepResult:
    """One step's numbers for the log. In the Reptile phase, they are means over inner steps."""

    step: int  # Number of the step, from 1
    tokens: int
    multiplier: float
    qat: bool
    reptile: bool
    loss: float = math.nan
    grad_norm: float = math.nan
    meta_loss: float | None = None


class PendingStep:
    """A launched step, whose numbers the GPU may not have computed yet."""

    def __init__(self, known: StepResult, numbers: Tensor, *, has_meta_loss: bool):
        """`numbers` are loss, gradient norm and meta loss, of shape (3,)."""
        self._known, self._numbers, self._has_meta_loss = known, numbers, has_meta_loss
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:  # reading them here would stall the launch of the next step
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> StepResult:
        """Wait for the numbers and return them. Raises NonFiniteError if one of them is not finite."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm, meta_loss = self._numbers.tolist()
        for name, value in (("loss", loss), ("meta loss", meta_loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(f"the {name} at step {self._known.step} is {value}")
        meta = meta_loss if self._has_meta_loss else None
        return replace(self._known, loss=loss, grad_norm=norm, meta_loss=meta)


class Trainer:
    """Model, optimizer, schedule, averages and place in the data, advanced one step at a time (PR 1501)."""

    def __init__(self, model: GPT, config: RunConfig, loader: Loader, world: World):
        self.model, self.config, self.loader, self.world = model, config, loader, world
        train = config.train
        self.rates = SlotRates(model) if train.meta is not None and train.meta.slot_rates else None
        named = () if self.rates is None else self.rates.named_parameters()
        self._rates = {f"slot_rates.{name}": rate for name, rate in named}
        self.reptile = None if train.reptile is None else Reptile(model, train.reptile)
        self.reptile_from: int | None = None  # steps before the Reptile phase, once it has begun
        self.optimizer = Optimizer(model, config.optim, world, self._rates)
        self.schedule = Schedule(train)
        self.average = WeightAverage(model, config.average)
        self.micro_steps = max(1, train.batch_tokens // (train.micro_batch_tokens * world.world_size))
        self.tokens_per_step = self.micro_steps * train.micro_batch_tokens * world.world_size
        """Tokens of a step before the Reptile phase, over all ranks."""
        sequences = 0 if train.reptile is None else train.reptile.inner_steps * train.reptile.batch_seqs
        self.tokens_per_outer_step = sequences * train.seq_len * world.world_size
        """Tokens of a step of the Reptile phase, over all ranks."""
        loss: LossFunction = partial(model.loss, z_loss=train.z_loss) if train.z_loss else model.loss
        loss = loss if train.max_document is None else packed(loss, train.max_document)
        self.loss_function: LossFunction = compiled(loss) if train.compile else loss
        self.micro_step: MicroStep | Shares = MicroStep(
            model, 1 / self.micro_steps, cuda_graph=bool(train.cuda_graph)
        )
        rows = train.micro_batch_tokens // train.seq_len if train.max_document is None else 1
        shares = math.gcd(train.cpu_shares, rows)
        # One thread gains nothing from parts
        if shares > 1 < torch.get_num_threads() and world.device.type == "cpu" and not train.compile:
            self.micro_step = Shares(model, 1 / self.micro_steps, shares)
        self.step, self.elapsed, self.qat = 0, 0.0, False
        model.allocate_gradient_banks()

    def launch(self) -> PendingStep:
        """Launch one optimizer step without waiting for the GPU.

        A non-finite number raises NonFiniteError: on a CPU here, before any update; on a GPU, in the result.
        """
        self.model.looping = self.schedule.loops(self.step, self.elapsed)
        if self.reptile is not None and (self.in_reptile or self.schedule.over(self.step, self.elapsed)):
            return self._outer_step(self.reptile)
        multiplier = self.schedule.multiplier(self.step, self.elapsed)
        self.qat = self.qat or self.schedule.quantizes(self.step, self.elapsed)
        loss, tokens, targets = self._accumulate()
        meta_loss = self._meta(multiplier, tokens, targets)  # on the last micro-batch
        self._mask_frozen_skips()
        per_rank = self.optimizer.config.grad_clip_per_rank
        norm = self.optimizer.clip() if per_rank else None
        for gradient in self.optimizer.gradients():
            self.world.mean_(gradient)
        norm = self.optimizer.clip() if norm is None else norm
        # before the update: on the CPU a non-finite number must not reach the weights
        pending = self._pending(loss, norm, meta_loss, multiplier)
        self.optimizer.step(self.step, multiplier)
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.step, multiplier)
        return pending

    def observe(self, result: StepResult, elapsed: float) -> bool:
        """Return True if this step, launched at `elapsed`, triggers the decay of the adaptive schedule."""
        return not result.reptile and self.schedule.observe(result.step - 1, result.loss, elapsed)

    def advance(self) -> StepResult:
        """Make one step and wait for its numbers, without advancing the clock."""
        result = self.launch().result()
        self.observe(result, self.elapsed)
        return result

    @property
    def in_reptile(self) -> bool:
        return self.reptile_from is not None

    @property
    def tokens(self) -> int:
        """Tokens of all steps so far, over all ranks."""
        plain = self.step if self.reptile_from is None else self.reptile_from
        return plain * self.tokens_per_step + (self.step - plain) * self.tokens_per_outer_step

    def _pending(self, loss: Tensor, norm: Tensor, meta: Tensor | None, multiplier: float) -> PendingStep:
        """Start reading the step's numbers, averaged over ranks; on the CPU they must be finite."""
        numbers = (loss, norm, torch.zeros_like(loss) if meta is None else meta)
        tokens = self.tokens_per_outer_step if self.in_reptile else self.tokens_per_step
        known = StepResult(self.step + 1, tokens, multiplier, self.qat, self.in_reptile)
        means = self.world.mean_(torch.stack([number.double() for number in numbers]))
        pending = PendingStep(known, means, has_meta_loss=meta is not None)
        if self.world.device.type == "cpu":
            pending.result()
        return pending

    def _outer_step(self, reptile: Reptile) -> PendingStep:
        """Make one step of the Reptile phase, which leaves schedule, optimizer and averages unchanged."""
        if not self.in_reptile:
            load_weights(self.model, self.average.final(), "the average")
            self._start_reptile(reptile, self.step)
        batches = ((x, y) for x, y in (self._next_batch() for _ in range(reptile.config.inner_steps)))
        inner = reptile.adapt(batches, self._rounding())
        for end in inner.ends:
            self.world.mean_(end)
        pending = self._pending(inner.loss, inner.grad_norm, None, 0.0)
        reptile.move(inner.ends)
        self.step += 1
        return pending

    def _start_reptile(self, reptile: Reptile, step: int) -> None:
        self.reptile_from = step
        # batches of another size from here on, also after a resume
        self.loader.set_batch(reptile.config.batch_seqs * self.config.train.seq_len)

    def _next_batch(self) -> Rows:
        return tuple(t.to(self.world.device, non_blocking=True) for t in self.loader.next_batch())

    def _rounding(self) -> Callable[[Tensor], Tensor] | None:
        """Return the fake quantization that forward applies to the banks, or None while it is off."""
        qat, quant = self.config.train.qat, self.config.quant
        on = self.qat and qat is not None and qat.banks
        return make_fake(quant.bits, quant.scale_floor) if on else None

    def _accumulate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradients of the whole batch; return its mean loss here, and the last micro-batch."""
        banks = self.model.banks(self._rounding())  # rounded and cast once for all micro-batches
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for _ in range(self.micro_steps):
            tokens, targets, *segments = self._next_batch()
            total += self.micro_step(self.loss_function, tokens, targets, banks, *segments).double()
        return total / self.micro_steps, tokens, targets

    def _meta(self, multiplier: float, tokens: Tensor, targets: Tensor) -> Tensor | None:
        """Add the meta-gradient if a meta step is due; return its outer loss."""
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
        """Run steps to compile everything, and undo all their effects (PR 1501)."""
        tensors, metadata = {k: v.detach().clone() for k, v in self.tensors().items()}, self.metadata()
        late = self.config.model.num_loops and self.config.train.loop_from
        for looping in (False, True) if late else (True,):  # each is a graph of its own
            self.model.looping = looping
            for _ in range(steps):
                self._accumulate()
                self.optimizer.step(self.step, 1.0)  # its ops compile at their first call too
                self.optimizer.zero_grad()
        self.restore(tensors, metadata)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a step changes."""
        weights = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        rates = {name: rate.detach() for name, rate in self._rates.items()}
        return {**weights, **rates, **self.optimizer.state(), **self.average.state()}

    def metadata(self) -> dict[str, Any]:
        """Return everything else that a step changes, as JSON values."""
        clock = {"step": self.step, "elapsed": self.elapsed, "qat": self.qat}
        phase = {"swa_count": self.average.swa_count, "reptile_from": self.reptile_from}
        return {**clock, **phase, "schedule": asdict(self.schedule.state), "loader": self.loader.state()}

    def restore(self, tensors: Tensors, metadata: dict[str, Any], origin: str = "the snapshot") -> None:
        """Continue from `tensors` and `metadata`. Raises PgolfError if they belong to another model."""
        weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        load_weights(self.model, weights, origin)
        for name, rate in self._rates.items():
            rate.data.copy_(tensors[name])
        self.optimizer.load_state(tensors)
        self.average.load_state(tensors, metadata["swa_count"])
        self.schedule.state = ScheduleState(**metadata["schedule"])
        if self.reptile is not None and metadata["reptile_from"] is not None:
            self._start_reptile(self.reptile, metadata["reptile_from"])
        self.loader.load_state(metadata["loader"])
        self.step, self.elapsed, self.qat = metadata["step"], metadata["elapsed"], metadata["qat"]
