"""The one place that knows about devices, ranks and what the hardware computes in."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_fast.config.schema import Dtype, KernelConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import attention_backend, launch
from pgolf_fast.ops.tuned import load_tuned


@dataclass(frozen=True)
class World:
    """This process among all; `torchrun` sets the numbers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean_(self, values: Tensor) -> Tensor:
        """Replace numbers by their means over ranks; nothing waits for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Replace numbers by their sums over ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def same(self, value: float) -> float:
        """The main process's value of a number that every process measured for itself."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)  # on the CPU: the GPU's queue is left alone
        dist.broadcast(shared, src=0)
        return float(shared)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise PgolfError(
            f"rank {rank} wants GPU {local_rank} but this machine has {torch.cuda.device_count()}: "
            "start torchrun with --nproc_per_node at most that"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world_size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield World(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def devices() -> int:
    """How many GPUs this process can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the system, which CPU training asks for again.

    Measured on two cores: 9 % more tokens per second for `small`. Elsewhere than on glibc nothing happens.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of malloc.h's mallopt parameters
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
    mallopt(mmap_threshold, 2**30)


def choose_kernels(config: KernelConfig, device: torch.device) -> None:
    """Make this process's ops run what is configured, with the launch rows that were measured on this GPU.

    Raises PgolfError when a forced attention is not installed.
    """
    for op in launch.DEFAULTS:
        launch.choose(op, config.implementation)
    try:
        attention_backend.choose(config.attention)
    except ValueError as error:
        raise PgolfError(f"kernels.attention: {error}") from error
    if device.type == "cuda":
        load_tuned(device)


def resolve_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The torch dtype of a configured one; auto is bfloat16 where the hardware multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    fast = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if fast.get("avx512_bf16") or fast.get("amx_bf16") else torch.float32


def environment() -> dict[str, object]:
    """What a reader needs to know about the machine and versions behind a number."""
    from importlib import metadata

    from pgolf_fast import __version__
    from pgolf_fast.ops.lzma import backend

    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "numpy", "sentencepiece", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "pgolf_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "lzma": backend(),
        **versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
