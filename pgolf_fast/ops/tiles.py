"""Dispatch between Triton and PyTorch, and the table of tiles that Triton kernels are launched with.

An op asks `uses_kernels`. If True, it allocates its results, looks up a `Tile` and calls the launcher in
`pgolf_fast.kernels`. Each op declares the rows of its kernels; `set_tiles` replaces rows by measured ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Tile:
    """Tile sizes and pipeline of one kernel; kernels without a matmul read block_m, block_n and num_warps."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3


# op -> what "auto" means on a CUDA GPU. A kernel that was measured to lose to torch.compile becomes "torch".
_OPS = (
    "mlp weight_grad gqa_attention ngram_hash_embed residual_norm smear_gate softcap_cross_entropy "
    "newton_schulz muon int6_matmul"
)
DEFAULTS: dict[str, Implementation] = dict.fromkeys(_OPS.split(), "triton")
# By a cost model, not measured: 65 ms of an exp101 step on an H200 in cuBLAS, 114 in our kernel, whose tiles
# of 128 x 128 wait for L2.
DEFAULTS["weight_grad"] = "torch"

_INTERPRETER = Tile(32, 32, 32, 1, 1)  # small, so that small tensors still have several tiles
_table: dict[str, dict[str, Tile]] = {}  # kernel -> architecture -> tile
per_sm: dict[str, int] = {}  # kernel -> blocks of its sm90 row on a multiprocessor
_chosen: dict[str, Implementation] = {}
_forced: str | None = None
_record: list[str] | None = None


def declare(
    kernel: str, sm90: Tile, sm80: Tile | None = None, sm100: Tile | None = None, blocks: int = 1
) -> None:
    """Add the rows of `kernel` to the table; an architecture without its own row uses the sm90 row.

    `blocks` of the sm90 row share a multiprocessor, so that one computes while another waits.
    """
    per_sm[kernel] = blocks
    _table[kernel] = {"sm80": sm80 or sm90, "sm90": sm90, "sm100": sm100 or sm90}


def set_tiles(rows: Mapping[str, Mapping[str, Tile]]) -> None:
    """Replace rows of the table, kernel -> architecture -> tile (for example by measured ones)."""
    for kernel, by_architecture in rows.items():
        _table.setdefault(kernel, {}).update(by_architecture)


def kernels() -> tuple[str, ...]:
    """Return the names of all kernels in the table."""
    return tuple(sorted(_table))


def row(kernel: str, arch: str) -> Tile:
    """Return the table's row for 16-bit elements: sm80, sm90 or sm100."""
    return _table[kernel].get(arch) or _table[kernel]["sm80"]


def lookup(kernel: str, t: Tensor) -> Tile:
    """Return the tile for the GPU of `t`; 4-byte elements get half of block_k, to fit shared memory."""
    if _record is not None:
        _record.append(kernel)
    arch = _forced or architecture(t.device)
    if arch == "interpreter":
        return _INTERPRETER
    tile = row(kernel, arch)
    return replace(tile, block_k=max(16, tile.block_k // 2)) if t.element_size() > 2 else tile


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Record the names of kernels whose tile is looked up."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def architecture(device: torch.device) -> str:
    """Return the row name of a CUDA device: sm80, sm90 or sm100.

    sm80 also serves 86, 89 and 120, whose blocks have 99 KiB of shared memory.
    """
    major, _ = torch.cuda.get_device_capability(device)
    return "sm90" if major == 9 else "sm100" if major in (10, 11) else "sm80"


def choose(op: str, implementation: Implementation) -> None:
    """Force an implementation of `op` in this process; "auto" restores the default.

    Raises ValueError for unknown names.
    """
    if op not in DEFAULTS:
        raise ValueError(f"no op {op!r} with kernels; ops are {', '.join(DEFAULTS)}")
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f"{op}: implementation is {implementation!r}; use auto, triton or torch")
    _chosen[op] = implementation


def implementation(op: str) -> Implementation:
    """Return what `op` runs on a CUDA GPU: "triton" or "torch"."""
    chosen = _chosen.get(op, "auto")
    return DEFAULTS[op] if chosen == "auto" else chosen


def uses_kernels(op: str, t: Tensor) -> bool:
    """Return True if `op` runs kernels on tensors like `t`: 16 or 32 bits, on a GPU with Triton."""
    if t.dtype not in (torch.float32, torch.bfloat16, torch.float16) or implementation(op) != "triton":
        return False
    if _forced is not None or not t.is_cuda:
        return _forced is not None
    # a fake CUDA tensor needs no GPU
    there = torch.cuda.is_available() and find_spec("triton") is not None
    return there and torch.cuda.get_device_capability(t.device) >= (8, 0)


def forced() -> str | None:
    """Return the architecture given to the innermost `kernels_on_cpu`, or None outside it."""
    return _forced


@contextmanager
def kernels_on_cpu(arch: str) -> Iterator[None]:
    """Run kernels on CPU tensors: in Triton's "interpreter", or with a driver that compiles for `arch`."""
    global _forced
    before, _forced = _forced, arch
    try:
        yield
    finally:
        _forced = before


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of `t` current: Triton launches on the current GPU, not on the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
