"""Forward and backward of one micro-batch: launched operation by operation, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pgolf_fast.model.bank import Banks
from pgolf_fast.model.compiled import compiled
from pgolf_fast.model.cuda_graph import CapturedStep
from pgolf_fast.model.gpt import GPT

LossFunction = Callable[[Tensor, Tensor, Banks], Tensor]


def compile_loss(loss_function: LossFunction) -> LossFunction:
    """`loss_function` under torch.compile: one graph, static shapes."""
    return compiled(loss_function)


class MicroStep(Protocol):
    """Adds the gradients of `scale * loss` to the model's gradients; returns the loss, detached."""

    def __call__(
        self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks
    ) -> Tensor: ...


class DirectStep:
    """Runs the loss function and autograd as they are, on any device."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks) -> Tensor:
        loss = loss_function(tokens, targets, banks)
        (loss * self.scale).backward()
        return loss.detach()


class GraphStep:
    """Replays a capture of `DirectStep`, which costs the host one launch instead of hundreds.

    What was captured is tied to addresses: of the banks, of the gradients (which are cleared in place) and of
    its own copy of the batch. Any other bank address or batch shape makes a new capture. The returned loss is
    overwritten by the next call.
    """

    def __init__(self, model: GPT, scale: float):
        self.direct, self.model = DirectStep(scale), model
        self._key: object = None
        self._captured: CapturedStep[Tensor] | None = None

    def __call__(self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks) -> Tensor:
        key = (loss_function, tokens.shape, tuple(w.data_ptr() for w in banks.weights()))
        if self._captured is None or key != self._key:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in parameters:  # a capture adds in place: there must be something to add to
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters if p.grad is not None]

            def step(tokens: Tensor, targets: Tensor) -> Tensor:
                return self.direct(loss_function, tokens, targets, banks)

            self._captured, self._key = CapturedStep(step, (tokens, targets), gradients), key
        return self._captured(tokens, targets)
