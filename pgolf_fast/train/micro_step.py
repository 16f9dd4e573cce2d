"""Forward and backward of one micro-batch, launched op by op or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf_fast.model.bank import Banks
from pgolf_fast.model.compiled import CapturedStep
from pgolf_fast.model.gpt import GPT

LossFunction = Callable[[Tensor, Tensor, Banks], Tensor]


class MicroStep:
    """Adds the gradients of `scale * loss` to the model's gradients and returns the loss, detached.

    With `cuda_graph` it replays a capture, which depends on the addresses of the banks and their gradients
    and on the shape of the batch: any change of these makes a new one. The returned loss is then overwritten
    by the next call.
    """

    def __init__(self, model: GPT, scale: float, *, cuda_graph: bool = False):
        self.model, self.scale, self.cuda_graph = model, scale, cuda_graph
        self._key: object = None
        self._captured: CapturedStep[Tensor] | None = None

    def __call__(self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks) -> Tensor:
        def step(tokens: Tensor, targets: Tensor) -> Tensor:
            loss = loss_function(tokens, targets, banks)
            (loss * self.scale).backward()
            return loss.detach()

        if not self.cuda_graph:
            return step(tokens, targets)
        key = (loss_function, tokens.shape, tuple(w.data_ptr() for w in banks.weights()))
        if self._captured is None or key != self._key:
            self._captured, self._key = CapturedStep(step, (tokens, targets), self._gradients()), key
        return self._captured(tokens, targets)

    def _gradients(self) -> list[Tensor]:
        """Return the gradient of every parameter, made where there is none: a capture adds in place."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]
