"""The interface between the protocol, which hands over scored tokens, and the adapter that learns."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.compiled import compiled
from pgolf_fast.model.gpt import GPT

ADAM_EPS = 1e-8
Tensors = list[Tensor]


@dataclass(frozen=True)
class Scored:
    """Tokens to learn from: every target among them has its final score.

    `tokens` (rows, n + 1) is a copy with storage of its own: inputs tokens[:, :-1], targets tokens[:, 1:].
    A chunk of the stream is one row. With `by_document`, row i holds the newest tokens of document i of those
    that `Adapter.begin` announced. Chunk `index` of `count` positions a decaying learning rate.
    """

    tokens: Tensor
    index: int = 0
    count: int = 1
    by_document: bool = False


class Adapter(ABC):
    """A model that gives losses, and learns from what was scored.

    The protocol calls `score` for all windows of a chunk, on a CPU from several threads in parallel, and then
    `adapt` once; never after the last chunk. Every rank adapts with the same tokens to the same weights.
    """

    trainable: int = 0  # count of the numbers that adapt
    updates: int = 0  # gradient steps so far

    def begin(self, documents: int) -> None:  # noqa: B027 - most adapters do not know documents
        """Start `documents` new documents and forget what was learned from each of the last ones."""

    @abstractmethod
    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        """Return losses (B, W) in nats of targets (B, W), those of the last W positions of tokens (B, T).

        Positions are encoded for windows of `context` tokens. Window i belongs to document rows[i] where
        documents are scored in parallel. Must not change anything.
        """

    @abstractmethod
    def adapt(self, scored: Scored) -> None:
        """Learn from a chunk."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return everything that `adapt` changes, for a resumed evaluation."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`."""


class Learner(Adapter):
    """An adapter whose state is named lists of tensors and the count of updates."""

    @abstractmethod
    def _lists(self) -> dict[str, Tensors]: ...

    def state(self) -> dict[str, Tensor]:
        lists = self._lists().items()
        tensors = {f"{kind}.{i}": t.detach() for kind, own in lists for i, t in enumerate(own)}
        return {**tensors, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for kind, tensors in self._lists().items():
            for i, tensor in enumerate(tensors):
                tensor.copy_(state[f"{kind}.{i}"])
        self.updates = int(state["updates"])


@contextmanager
def borrowed(model: GPT) -> Iterator[None]:
    """Restore the weights, gradients and flags of `model` on exit, also after an error."""
    before = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, value, flag, grad in before:
            parameter.detach().copy_(value)
            parameter.requires_grad_(flag)
            parameter.grad = grad


def freeze(model: GPT) -> None:
    """Drop all gradients and turn them off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def adamw_(
    tensors: Sequence[Tensors], step: Tensor, config: TTTConfig, lr: Tensor | float, divisor: Tensor | None
) -> None:
    """Update parameters in place by AdamW, given (parameters, gradients, means, squares).

    Gradients are divided by `divisor` first. Decay is decoupled (Loshchilov and Hutter 2017).
    """
    parameters, grads, means, squares = tensors
    rule: dict[str, Any] = {"lr": lr, "beta1": config.momentum, "beta2": config.beta2, "eps": ADAM_EPS}
    rule |= {"weight_decay": config.weight_decay, "amsgrad": False, "maximize": False, "grad_scale": divisor}
    torch._fused_adamw_(parameters, grads, means, squares, [], [step] * len(parameters), **rule)


class Frozen(Adapter):
    """The model with its current weights."""

    def __init__(self, model: GPT, transform: Transform = None, *, compile: bool = False):
        """Read the banks through `transform`; `compile` is for batches of several windows."""
        with torch.no_grad():
            self._banks = model.reading_banks(transform)
        self._eager = model.token_losses
        # batches of several windows have one shape; single windows, at the end of the stream, have many
        self._batched = compiled(model.token_losses) if compile else model.token_losses

    @torch.no_grad()
    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        losses = self._batched if len(tokens) > 1 else self._eager
        return losses(tokens, targets, self._banks, context=context)

    def adapt(self, scored: Scored) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass
