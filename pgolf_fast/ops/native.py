"""Access to the C++ extension (codecs and fused CPU passes), with one warning where it is missing."""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.ops import tiles

_log = logging.getLogger("pgolf_fast")


@functools.cache
def extension() -> ModuleType | None:
    """Return `pgolf_fast._C`, or None if it was not built, which is logged once."""
    try:
        from pgolf_fast import _C
    except ImportError as error:
        _log.warning(
            "the C++ codecs are not in use (%s): bits, LZMA and artifact sections use Python, with the same "
            "results, but artifacts written here are larger, since only C++ writes rANS; to build them, run "
            "`pip install -e .` in the checkout with a C++ compiler installed",
            error,
        )
        return None
    if not hasattr(_C, "lzma_compress"):
        _log.warning(
            "LZMA runs in Python's lzma module: liblzma was missing when the C++ codecs were built; install "
            "its headers (on Debian: liblzma-dev) and run `pip install -e .` again"
        )
    return _C


def passes(op: str, t: Tensor) -> ModuleType | None:
    """Return `pgolf_fast._C` if `op` runs its fused pass on tensors like `t`; None means PyTorch runs it.

    Passes take float32 and bfloat16 on a CPU. `tiles.choose(op, "torch")` and `kernels_on_cpu` disable them.
    """
    # No pass is slower than PyTorch on one thread (roughly: busy AVX2 CPU, shapes of `small`, float32 and
    # bfloat16): forward takes 0.1 to 0.9 of PyTorch's time, backward 0.07 to 0.5; portable passes take at
    # most 0.53 of the time of PyTorch without AVX.
    fits = t.is_cpu and t.dtype in (torch.float32, torch.bfloat16)
    return extension() if fits and tiles.implementation(op) != "torch" and not tiles.forced() else None


def call(run: Callable[..., None], *operands: Any) -> None:
    """Run a pass on PyTorch's threads; tensors that it writes must be contiguous: others are copied."""
    run(*(_array(t) if isinstance(t, Tensor) else t for t in operands), torch.get_num_threads())


def _array(t: Tensor) -> np.ndarray:
    """Return a CPU tensor as an array, bfloat16 as uint16: a view if it is contiguous, else a copy."""
    t = t.detach().contiguous()
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def multiplies(dtype: torch.dtype) -> bool:
    """Return True if this CPU multiplies in the 16-bit `dtype` natively; emulation is slow."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(known.get(name) for name in names)
