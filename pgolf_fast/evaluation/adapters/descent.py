"""What a model may do with tokens that are scored: the protocol of adapters, and those of all its parameters.

`evaluation.protocol` scores a chunk through an adapter and then hands it that chunk's tokens, and no others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.capture import Replay
from pgolf_fast.evaluation.score import frozen_losses
from pgolf_fast.model.bank import BANK_NAMES, Banks, Transform, make_banks, transformed
from pgolf_fast.model.compiled import compiled
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import fake_int6

ADAM_EPS = 1e-8
Tensors = list[Tensor]


@dataclass(frozen=True)
class Scored:
    """A chunk that may be learned from: every target in it has its final score.

    `tokens` (n + 1,) is a copy that nothing else is reached from: inputs tokens[:-1], targets tokens[1:]. Of
    documents in step it is (m, n + 1), the newest n of each of the first m documents. `chunk` of `chunks` is
    `protocol.Chunk`'s number and count.
    """

    tokens: Tensor
    chunk: int = 0
    chunks: int = 1


class Adapter(Protocol):
    """Gives losses, and learns from what was scored.

    The evaluator calls `score` for all windows of a chunk, on a CPU from several threads at once, and then
    `adapt` once; never `adapt` after the last chunk. With several processes, each calls `adapt` with the same
    tokens, so the results must be the same on each.
    """

    trainable: int
    """Numbers that adapt."""
    updates: int
    """Gradient steps so far."""

    def score(self, tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        """Losses in nats of the targets (B, W) of the last W positions of tokens (B, T), as (B, W).

        Positions are encoded for windows of `context` tokens. Nothing may be learned here.
        """

    def adapt(self, scored: Scored) -> None:
        """Learn from a chunk."""

    def state(self) -> dict[str, Tensor]:
        """Everything that `adapt` changes and a resumed evaluation needs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""


class DocumentAdapter(Adapter, Protocol):
    """An adapter that learns from several documents in step, from each for itself."""

    def begin(self, documents: int) -> None:
        """So many new documents begin; what was learned from each of those before is forgotten."""

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        """As `Adapter.score`; window i is of document rows[i]."""


class Frozen:
    """No adaptation: a model as it stands."""

    trainable, updates = 0, 0

    def __init__(self, model: GPT, transform: Transform = None, *, compile: bool = False):
        """`compile` runs batches of several windows, which all have one shape, under torch.compile."""
        eager = frozen_losses(model, transform)
        fast = frozen_losses(model, transform, compiled(model.token_losses)) if compile else eager

        def score(tokens: Tensor, targets: Tensor, context: int) -> Tensor:
            return (fast if len(tokens) > 1 else eager)(tokens, targets, context)

        self.score = score

    def adapt(self, scored: Scored) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


@contextmanager
def borrowed(model: GPT) -> Iterator[None]:
    """Afterwards the model has the weights, gradients and flags that it had before, whatever happened."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        model.projection_transform = None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = grads[name]


def trainable_parameters(model: GPT, config: TTTConfig) -> list[nn.Parameter]:
    """The parameters that adapt, as `TTTConfig.parameters` says; of banks, `moving_slots` do."""
    if config.parameters == "banks":
        return model.bank_parameters()
    if config.parameters == "mlps":
        return [model.mlp_up_bank, model.mlp_down_bank]
    frozen = tuple(f"blocks.{i}." for i in range(config.freeze_blocks))
    names = ("",) if config.parameters == "all" else (*BANK_NAMES, "blocks.", "skip_weights")
    return [
        p for name, p in model.named_parameters() if name.startswith(names) and not name.startswith(frozen)
    ]


def moving_slots(tensor: Tensor, num_layers: int, frozen: int) -> list[Tensor]:
    """Views of a bank's slots (slots, rows, columns) but for those of the first `frozen` blocks.

    Any other tensor, and a bank of which nothing is frozen, is one view.
    """
    if not frozen or tensor.ndim < 3:
        return [tensor]
    return [tensor[at + frozen : at + num_layers] for at in range(0, len(tensor), num_layers)]


def chunk_lr(config: TTTConfig, chunk: int, chunks: int) -> float:
    """Constant within a chunk; across them constant too, or a half cosine from `config.lr` to zero."""
    if config.decay == "constant":
        return config.lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


class Descent(ABC):
    """Clipped gradient steps on a model's own parameters, to be used while it is `borrowed` (PR 1501).

    A chunk is passed over `epochs` times, in batches of sequences in order; a rest shorter than a sequence
    is left out, and what the rule remembers lives on from chunk to chunk. Gradients go to gradient banks, and
    forward reads copies that are written once per update. Nothing waits for a GPU.
    """

    MEMORIES: tuple[str, ...]
    """What the rule remembers of each parameter, as tensors like it that start at zero."""

    def __init__(
        self,
        model: GPT,
        config: TTTConfig,
        seq_len: int,
        grid: Transform = fake_int6,
        *,
        compile: bool = False,
        cuda_graph: bool = False,
    ):
        """`grid` is what `config.quantize_forward` rounds the banks to; `cuda_graph` replays each update."""
        self.model, self.config, self.seq_len = model, config, seq_len
        self._grid = grid if config.quantize_forward == "banks" else None
        self._projections = fake_int6 if config.quantize_forward == "projections" else None
        masters, adapting = model.bank_parameters(), trainable_parameters(model, config)
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in (*adapting, *masters):  # gradient banks are all there or none
            parameter.grad = torch.zeros_like(parameter)
        for parameter in adapting:
            parameter.requires_grad_()
        slots = partial(moving_slots, num_layers=model.config.num_layers, frozen=config.frozen_slots)
        self._parameters = [part for p in adapting for part in slots(p.detach())]
        self._grads = [part for p in adapting if p.grad is not None for part in slots(p.grad)]
        self.trainable, self.updates = sum(p.numel() for p in self._parameters), 0
        self._memories = {name: [torch.zeros_like(p) for p in self._parameters] for name in self.MEMORIES}
        self._lr, self._step_number = torch.zeros(2, device=model.qo_bank.device).unbind()
        kept = self._grid is None and all(m.dtype == model.compute_dtype for m in masters)
        self._weights = [
            m.detach() if kept else m.detach().to(model.compute_dtype, copy=True) for m in masters
        ]
        self._refresh()
        self._banks = make_banks(self._weights, [m.grad for m in masters if m.grad is not None])
        self._loss = compiled(model.loss) if compile else model.loss
        self._token_losses = compiled(model.token_losses) if compile else model.token_losses
        self._replays: dict[torch.Size, Replay] | None = {} if cuda_graph else None

    @abstractmethod
    def _rule(self, parameters: Tensors, grads: Tensors, memories: list[Tensors], divisor: Tensor) -> None:
        """One update of parameters of one dtype by their gradients, which are divided by `divisor` first."""

    def banks(self) -> Banks:
        """What forward reads now."""
        return Banks(*self._weights)

    def score(self, tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        losses = self._token_losses if len(tokens) > 1 else self.model.token_losses
        with torch.no_grad():
            return losses(tokens, targets, self.banks(), context=context)

    def adapt(self, scored: Scored) -> None:
        sequences = (len(scored.tokens) - 1) // self.seq_len
        length = sequences * self.seq_len
        x, y = (scored.tokens[i : i + length].view(sequences, self.seq_len) for i in (0, 1))
        self._lr.fill_(chunk_lr(self.config, scored.chunk, scored.chunks))
        step = self.config.batch_seqs
        for _ in range(self.config.epochs):
            for first in range(0, sequences, step):
                self._run(x[first : first + step], y[first : first + step])
                self.updates += 1

    def _run(self, x: Tensor, y: Tensor) -> None:
        if self._replays is None:
            return self._update(x, y)
        if x.shape not in self._replays:
            memories = chain(*self._memories.values())
            changed = [*self._parameters, *self._grads, *memories, *self._weights, self._step_number]
            self._replays[x.shape] = Replay(self._update, (x, y), changed)
        self._replays[x.shape](x, y)

    def _update(self, x: Tensor, y: Tensor) -> None:
        self.model.projection_transform = self._projections
        self._loss(x, y, self._banks).backward()
        self.model.projection_transform = None
        self._step()
        self._refresh()

    @torch.no_grad()
    def _step(self) -> None:
        """Clip to the global norm and update: one pass over the parameters of each dtype."""
        norms = [norm.float() for norm in torch._foreach_norm(self._grads)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        # gradients are divided by this: norm / limit where that is above 1
        divisor = ((norm + 1e-6) / (self.config.grad_clip or math.inf)).clamp_min_(1.0)
        self._step_number += 1
        for dtype in {p.dtype for p in self._parameters}:
            own = [i for i, p in enumerate(self._parameters) if p.dtype == dtype]
            every = (self._parameters, self._grads, *self._memories.values())
            parameters, grads, *memories = [[tensors[i] for i in own] for tensors in every]
            self._rule(parameters, grads, memories, divisor)
        torch._foreach_zero_(self._grads)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Write what forward reads of the banks."""
        masters = list(self.model.bank_parameters())
        for weight, fresh in zip(self._weights, transformed(masters, self._grid), strict=True):
            if weight.data_ptr() != fresh.data_ptr():
                weight.copy_(fresh)

    def _lists(self) -> dict[str, Tensors]:
        return {**self._memories, "parameter": self._parameters}

    def state(self) -> dict[str, Tensor]:
        lists = self._lists().items()
        named = {f"{kind}.{i}": t.detach() for kind, tensors in lists for i, t in enumerate(tensors)}
        return {**named, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for kind, tensors in self._lists().items():
            for i, tensor in enumerate(tensors):
                tensor.copy_(state[f"{kind}.{i}"])
        self.updates = int(state["updates"])
        self._step_number.fill_(self.updates)
        self._refresh()


class SGD(Descent):
    """Stochastic gradient descent with momentum, as run in PR 1501."""

    MEMORIES = ("momentum",)

    def _rule(self, parameters: Tensors, grads: Tensors, memories: list[Tensors], divisor: Tensor) -> None:
        torch._fused_sgd_(
            parameters,
            grads,
            memories[0] if self.config.momentum else [],
            weight_decay=0.0,
            momentum=self.config.momentum,
            lr=self._lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # momenta start at zero, which is the same
            grad_scale=divisor,
        )


class AdamW(Descent):
    """Adam with decoupled weight decay (Kingma and Ba 2014; Loshchilov and Hutter 2017)."""

    MEMORIES = ("mean", "square")

    def _rule(self, parameters: Tensors, grads: Tensors, memories: list[Tensors], divisor: Tensor) -> None:
        torch._fused_adamw_(
            parameters,
            grads,
            memories[0],
            memories[1],
            [],
            [self._step_number] * len(parameters),
            lr=self._lr,
            beta1=self.config.momentum,
            beta2=self.config.beta2,
            weight_decay=self.config.weight_decay,
            eps=ADAM_EPS,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )
