"""Checkpoints of a run, of which the newest few are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf_fast.io import save_tensors

_KEEP = 2  # one to fall back to if the newest turns out damaged


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the checkpoint of a step, and delete all but the newest few."""
    save_tensors(folder / f"step_{step:08d}.safetensors", tensors, metadata)
    for old in _checkpoints(folder)[:-_KEEP]:
        old.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None if there is none."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"))
