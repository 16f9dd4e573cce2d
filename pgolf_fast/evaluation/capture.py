"""A step of fixed shape, replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replay:
    """Runs `step(*inputs)` from a capture, which costs the host one launch instead of hundreds.

    The capture is tied to the addresses of all that the step reads and writes, except its inputs, which are
    copied to where it was captured. `changed` is everything the step writes and somebody reads later: it is
    what it was before, as if the runs that a capture needs had not happened.
    """

    WARM_UP_RUNS = 3  # what PyTorch's documentation asks for before a capture

    def __init__(self, step: Callable[..., None], inputs: Sequence[Tensor], changed: Sequence[Tensor]):
        self._inputs = [t.clone() for t in inputs]
        with torch.no_grad():
            before = [t.clone() for t in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP_RUNS):
                step(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            step(*self._inputs)
        with torch.no_grad():
            for now, then in zip(changed, before, strict=True):
                now.copy_(then)

    def __call__(self, *inputs: Tensor) -> None:
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self._graph.replay()
