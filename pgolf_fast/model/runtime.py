"""Kernels and dtype for this machine, and the environment to report with a number."""

import platform
from contextlib import suppress
from importlib import metadata

import torch

from pgolf_fast.config.schema import Dtype, KernelConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import attention_backend, native, tiles
from pgolf_fast.ops.tuned import load_tuned


def choose_kernels(config: KernelConfig, device: torch.device) -> None:
    """Select the configured implementation of every op, with launch rows measured on this GPU.

    Raises PgolfError if a forced attention is not installed.
    """
    for op in tiles.DEFAULTS:
        tiles.choose(op, config.implementation)
    try:
        attention_backend.choose(config.attention)
    except ValueError as error:
        raise PgolfError(f"kernels.attention: {error}") from error
    if device.type == "cuda":
        load_tuned(device)


def resolve_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """Return the torch dtype for `name`; auto is bfloat16 where the hardware multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if native.multiplies(torch.bfloat16) else torch.float32


def environment() -> dict[str, object]:
    """Return the machine and the versions behind a number."""
    from pgolf_fast import __version__
    from pgolf_fast.ops.lzma import backend

    packages = ("torch", "triton", "numpy", "sentencepiece", "safetensors")
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "pgolf_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
