"""torch.compile, with PyTorch's cache of compiled graphs kept apart for every version of our ops."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pgolf_fast.ops import tiles

Result = TypeVar("Result")


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` under torch.compile: one graph, static shapes."""
    tag_compile_cache()
    return torch.compile(function, dynamic=False, fullgraph=True)


def tag_compile_cache() -> None:
    """Keep PyTorch's cache of compiled graphs on disk apart for every version and choice of our ops.

    Its key holds an op's name but neither its fake and backward nor which implementation is chosen, on which
    the saved tensors depend: without the tag, a changed op may meet a graph of the old one.
    """
    sources = sorted(Path(tiles.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(repr([(op, tiles.implementation(op)) for op in tiles.DEFAULTS]).encode())
    torch.compiler.config.cache_key_tag = f"pgolf-{digest.hexdigest()[:16]}"
