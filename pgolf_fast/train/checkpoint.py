"""Checkpoints of a run: the newest few, and weights read back strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf_fast.io import save_tensors

_KEEP = 2


def checkpoint_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], story: dict[str, Any]) -> Path:
    """Write the checkpoint of a step and drop all but the newest few."""
    path = checkpoint_file(folder, step)
    save_tensors(path, tensors, {**story, "step": step})
    for old in _all(folder)[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    found = _all(folder)
    return found[-1] if found else None


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"))
