"""How much an analysis looks at, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf_fast.config.model import need


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of all analyses; each reads those that it has a use for."""

    data: Path | None = None
    """Folder of validation shards; None takes that of the first model's run."""
    tokenizer: Path | None = None
    """Tokenizer of those shards; None takes the one that belongs to them."""
    tokens: int = 16_384
    """Targets that losses and Hessians are taken over, from the beginning of the validation data."""
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    """Where models run."""
    points: int = 7
    """Places on the line between two models, its ends included, where the loss is measured."""
    curvature_tokens: int = 1024
    """Targets whose mean loss is the error surface, at least one window."""
    probes: int = 8
    """Random vectors of the trace estimate."""
    lanczos_steps: int = 12
    """Hessian-vector products that the extreme eigenvalues are taken from."""
    seed: int = 0
    """Seed of all random vectors."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("curvature_tokens", 1), ("points", 3), ("probes", 2)):
            value = getattr(self, name)
            need(value >= least, f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        need(self.lanczos_steps >= 2, f"--lanczos-steps is {self.lanczos_steps}; it must be at least 2")
