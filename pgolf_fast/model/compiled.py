"""torch.compile with a cache that knows the version of our ops, and CUDA graphs."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pgolf_fast.ops import tiles

Result = TypeVar("Result")
Tensors = Sequence[Tensor]


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return `function` under torch.compile: one graph, static shapes."""
    tag_compile_cache()
    return torch.compile(function, dynamic=False, fullgraph=True)


def tag_compile_cache() -> None:
    """Separate PyTorch's on-disk cache of compiled graphs by the source of our ops and their implementation.

    The cache key holds an op's name but neither its fake and backward nor the implementation chosen, on which
    the saved tensors depend. Without the tag, a changed op may get the old op's graph.
    """
    sources = sorted(Path(tiles.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(repr([(op, tiles.implementation(op)) for op in tiles.DEFAULTS]).encode())
    torch.compiler.config.cache_key_tag = f"pgolf-{digest.hexdigest()[:16]}"


WARM_UP_RUNS = 3  # PyTorch's documentation asks for a few before a capture: they load and choose kernels


class CapturedStep(Generic[Result]):
    """`step(*inputs)` replayed from a CUDA graph: one launch for the host instead of hundreds.

    A capture is tied to the address of everything that `step` reads and writes. Inputs are copied to fixed
    places; the rest must stay where it is. The result is overwritten by the next call. `changed` lists what
    the step updates in place: it gets its old values back after the warm-up runs.
    """

    def __init__(self, step: Callable[..., Result], inputs: Tensors = (), changed: Tensors = ()):
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
