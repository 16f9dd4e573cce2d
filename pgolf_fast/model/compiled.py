"""torch.compile with an on-disk cache that knows the version of our ops."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pgolf_fast.ops import launch

Result = TypeVar("Result")


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return `function` under torch.compile: one graph, static shapes."""
    tag_compile_cache()
    return torch.compile(function, dynamic=False, fullgraph=True)


def tag_compile_cache() -> None:
    """Separate PyTorch's on-disk cache of compiled graphs by the source of our ops and their implementation.

    The cache key holds an op's name but neither its fake and backward nor the implementation chosen, on which
    the saved tensors depend. Without the tag, a changed op may be served a graph of the old one.
    """
    sources = sorted(Path(launch.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(repr([(op, launch.implementation(op)) for op in launch.DEFAULTS]).encode())
    torch.compiler.config.cache_key_tag = f"pgolf-{digest.hexdigest()[:16]}"
