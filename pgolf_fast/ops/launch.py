"""Which implementation an op runs, and with which block sizes its Triton kernels are launched.

An op asks `uses_kernels`; with True it allocates, takes a `Launch` from the table and calls the launcher in
`pgolf_fast.kernels`. The table is written by hand, one row a kernel; `sm90` rows stand for every GPU that has
none of its own unless it is older, and measured rows replace them through `set_launches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Launch:
    """Tile sizes and pipeline of one kernel. Kernels without a matmul read block_m and block_n only."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3


# op -> what "auto" means on a CUDA GPU. A kernel that was measured to lose to torch.compile becomes "torch".
DEFAULTS: dict[str, Implementation] = {
    "mlp": "triton",
    "weight_grad": "triton",
    "gqa_attention": "triton",
    "ngram_hash_embed": "triton",
    "residual_norm": "triton",
    "smear_gate": "triton",
    "softcap_cross_entropy": "triton",
    "newton_schulz": "triton",
    "muon": "triton",
    "int6_matmul": "triton",
}

# kernel -> architecture -> tiles; an op declares the rows of its kernels
_TABLE: dict[str, dict[str, Launch]] = {}

_INTERPRETER = Launch(32, 32, 32, 1, 1)
_chosen: dict[str, Implementation] = {}
_forced: str | None = None


def declare(kernel: str, sm90: Launch, sm80: Launch | None = None, sm100: Launch | None = None) -> None:
    """Give `kernel` its rows in the table; architectures left out fall back to a smaller one's row."""
    rows = {"sm80": sm80 or sm90, "sm90": sm90, "sm100": sm100 or sm90}
    _TABLE[kernel] = rows


def set_launches(rows: Mapping[str, Mapping[str, Launch]]) -> None:
    """Replace rows of the table, kernel -> architecture -> Launch (say, by measured ones)."""
    for kernel, by_arch in rows.items():
        _TABLE.setdefault(kernel, {}).update(by_arch)


def kernels() -> tuple[str, ...]:
    """Names of all kernels with a row in the table."""
    return tuple(sorted(_TABLE))


def launch(kernel: str, x: Tensor) -> Launch:
    """The row of `kernel` for the GPU and element size of `x`: 4-byte elements get half of block_k."""
    arch = _forced or architecture(x.device)
    if arch == "interpreter":
        return _INTERPRETER
    row = _TABLE[kernel].get(arch) or _TABLE[kernel]["sm80"]
    return replace(row, block_k=max(16, row.block_k // 2)) if x.element_size() > 2 else row


def architecture(device: torch.device) -> str:
    """The row name of a CUDA device: sm80, sm90 or sm100.

    sm80 also serves 86, 89 and 120, whose blocks have 99 KiB of shared memory.
    """
    major, _ = torch.cuda.get_device_capability(device)
    return "sm90" if major == 9 else "sm100" if major in (10, 11) else "sm80"


def choose(op: str, implementation: Implementation) -> None:
    """Force an implementation of `op` in this process, or go back to "auto".

    Raises ValueError for unknown names.
    """
    if op not in DEFAULTS:
        raise ValueError(f"no op {op!r} with kernels; ops are {', '.join(DEFAULTS)}")
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f"{op}: implementation is {implementation!r}; use auto, triton or torch")
    _chosen[op] = implementation


def implementation(op: str) -> Implementation:
    """What `op` runs on a CUDA GPU: "triton" or "torch"."""
    chosen = _chosen.get(op, "auto")
    return DEFAULTS[op] if chosen == "auto" else chosen


def uses_kernels(op: str, x: Tensor) -> bool:
    """Whether `op` runs Triton kernels on tensors like `x`: 16 or 32 bits, on a GPU that Triton serves."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if _forced is not None:
        return implementation(op) == "triton"
    return x.is_cuda and implementation(op) == "triton" and _triton_serves(x.device)


def _triton_serves(device: torch.device) -> bool:
    if not torch.cuda.is_available() or find_spec("triton") is None:  # a fake CUDA tensor needs no GPU
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def forced() -> str | None:
    """What `kernels_on_cpu` was given, within it."""
    return _forced


@contextmanager
def kernels_on_cpu(arch: str) -> Iterator[None]:
    """Within, ops run their kernels on CPU tensors: in Triton's interpreter (`arch` is "interpreter"), or
    under a driver that compiles for `arch` instead of running.
    """
    global _forced
    before, _forced = _forced, arch
    try:
        yield
    finally:
        _forced = before


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of `x` the current one while kernels are launched; nothing on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
