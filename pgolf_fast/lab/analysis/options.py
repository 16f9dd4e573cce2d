"""Settings of the analyses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf_fast.config.checks import need


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of all analyses; each reads those that it needs."""

    data: Path | None = None
    """Folder of validation shards; default: that of the first model's run."""
    tokenizer: Path | None = None
    """Tokenizer of those shards; default: the one that belongs to them."""
    tokens: int = 16_384
    """Validation targets for losses, from the beginning of the validation data."""
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    """Device on which models run."""
    hash_rows: tuple[int, ...] = ()
    """Sizes of additional hash tables whose buckets are counted."""
    calibration_tokens: int = 4096
    """Validation tokens whose inputs weight the rounding errors."""
    points: int = 7
    """Points on the line between two models, including the ends, where the loss is measured."""
    curvature_tokens: int = 512
    """Validation targets of the loss whose Hessian is analyzed, at least one window."""
    probes: int = 6
    """Random vectors for the trace of the Hessian."""
    lanczos_steps: int = 8
    """Hessian-vector products for the extreme eigenvalues."""
    seed: int = 0
    """Seed of all random vectors."""

    def __post_init__(self) -> None:
        least = {"points": 3, "probes": 2, "lanczos_steps": 2}
        for name in ("tokens", "calibration_tokens", "curvature_tokens", *least):
            value, lowest = getattr(self, name), least.get(name, 1)
            need(value >= lowest, f"--{name.replace('_', '-')} is {value}; it must be at least {lowest}")
        for rows in self.hash_rows:
            need(rows >= 4, f"--hash-rows is {rows}; it must be at least 4")
