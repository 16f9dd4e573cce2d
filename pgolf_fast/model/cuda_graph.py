"""CUDA-graph capture of a step with fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARM_UP_RUNS = 3  # PyTorch's documentation asks for a few before a capture: they load and choose kernels


class CapturedStep(Generic[Result]):
    """`step(*inputs)` replayed from a CUDA graph: one launch for the host instead of hundreds.

    A capture is tied to the address of everything that `step` reads and writes. Inputs are copied to fixed
    places; the rest must stay where it is. The result is overwritten by the next call. `changed` lists what
    the step updates in place: it gets its old values back after the warm-up runs.
    """

    def __init__(
        self, step: Callable[..., Result], inputs: Sequence[Tensor] = (), changed: Sequence[Tensor] = ()
    ):
        self._inputs = [t.clone() for t in inputs]
        before = [t.detach().clone() for t in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                step(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # training's prefetch thread may pin memory meanwhile, which fails under the default global mode
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = step(*self._inputs)
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

    def __call__(self, *inputs: Tensor) -> Result:
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result
