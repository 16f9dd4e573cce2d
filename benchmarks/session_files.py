"""What the parts of a GPU session share: their JSON files, the machine they note, the time they have."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf_fast.bench.store import provenance
from pgolf_fast.bench.timer import gpu_state
from pgolf_fast.io import write_text


@dataclass(frozen=True)
class Session:
    """Arguments of a part."""

    out: Path
    seconds: float
    """What this part may take."""
    started: float
    """`time.monotonic()` at its start."""
    dry: bool
    """A rehearsal on a CPU at toy sizes."""
    preset: str
    ops: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    steps: int = 200
    """Training steps at most, for the comparison of losses."""
    peers: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()

    def wants(self, way: str) -> bool:
        """Whether a way of making a step is asked for, by a part of its name; all are by default."""
        return not self.ways or any(word in way for word in self.ways)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.started + self.seconds - time.monotonic()

    def deadline(self, share: float = 1.0) -> float:
        """`time.monotonic()` when that share of what is left will be over."""
        return time.monotonic() + share * self.left


class PartFile:
    """The JSON of one part: rewritten, whole, whenever something is known."""

    def __init__(self, session: Session, part: str):
        self.path = session.out / f"{part}.json"
        self.content: dict[str, object] = {
            "part": part,
            "status": "running",
            "dry_run": session.dry,
            "preset": session.preset,
            **provenance(),
            "gpu_before": gpu_state(session.device),
        }
        self._started, self._device = session.started, session.device
        self.write()

    def write(self, **values: object) -> None:
        self.content.update(values)
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")

    def finish(self, ok: bool, **values: object) -> None:
        """Say that the part came to its end, and whether what it found is right."""
        self.write(status="done", ok=ok, gpu_after=gpu_state(self._device), **values)
