"""Forward and backward of one micro-batch: launched operation by operation, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pgolf_fast.model.bank import Banks
from pgolf_fast.model.compiled import compiled
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

    WARM_UP_RUNS = 3  # what PyTorch's documentation asks for before a capture

    def __init__(self, model: GPT, scale: float):
        self.direct, self.model = DirectStep(scale), model
        self._key: object = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks) -> Tensor:
        key = (loss_function, tokens.shape, tuple(w.data_ptr() for w in banks.weights()))
        if self._graph is None or key != self._key:
            self._capture(loss_function, tokens, targets, banks)
            self._key = key
        self._tokens.copy_(tokens, non_blocking=True)
        self._targets.copy_(targets, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return self._loss

    def _capture(self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:  # a capture adds in place: there must be something to add to
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        before = [gradient.clone() for gradient in gradients]
        self._tokens, self._targets = tokens.clone(), targets.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP_RUNS):
                self.direct(loss_function, self._tokens, self._targets, banks)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # the prefetch thread may pin memory meanwhile, which a global capture would not survive
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._loss = self.direct(loss_function, self._tokens, self._targets, banks)
        for gradient, value in zip(gradients, before, strict=True):
            gradient.copy_(value)
        self._graph = graph
