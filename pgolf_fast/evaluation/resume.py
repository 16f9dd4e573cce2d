"""An evaluation that is interrupted goes on from its last saved chunk, and ends with the same numbers."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pgolf_fast import console
from pgolf_fast.evaluation.adapt import Adapter
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.io import load_tensors, save_tensors


def identity(model: nn.Module, stream: Stream, settings: object) -> str:
    """A digest of weights, tokens and settings: what must be the same for an evaluation to go on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in [*model.state_dict().items(), ("tokens", stream.tokens)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Resume:
    """Where the passes of one evaluation leave their states, beside its result `beside`."""

    beside: Path
    identity: str
    seconds: float = 120.0
    """A state is written after a chunk once this much time has passed since the last."""
    writes: bool = True
    """Whether this process writes; all read, so the folder must be one that all can see."""

    def of(self, name: str) -> SavedState:
        """The state of the pass of that name."""
        return SavedState(self.beside.with_name(f"{self.beside.stem}.{name}.state"), self)

    def forget(self) -> None:
        """Remove all states: the result is written."""
        for path in self.beside.parent.glob(f"{self.beside.stem}.*.state"):
            path.unlink(missing_ok=True)


class SavedState:
    """The state of one pass over the windows in a file of its own, written whole or not at all.

    It holds the scores so far, all losses, and what the adapter has changed.
    """

    def __init__(self, path: Path, resume: Resume):
        self.path, self.identity, self.seconds = path, resume.identity, resume.seconds
        self.writes = resume.writes
        self.spent = 0.0
        """Seconds that earlier processes took for the chunks they left here."""
        self._begin = self._last = time.monotonic()

    def load(self, scorer: Scorer, adapter: Adapter) -> list[Score]:
        """Bring losses and adapter to where the file was written; the running scores up to there."""
        if not self.path.is_file():
            return []
        tensors, story = load_tensors(self.path)
        if story.get("identity") != self.identity:
            console.logger.info("%s belongs to other weights, data or settings: starting over", self.path)
            return []
        losses = tensors.pop("losses")
        scorer.losses[: len(losses)] = losses.to(scorer.losses.device)
        adapter.load_state(tensors)
        self.spent = story["seconds"]
        console.logger.info("%s: going on after %d chunks", self.path, len(story["scores"]))
        return [Score(*score) for score in story["scores"]]

    def save(self, scorer: Scorer, adapter: Adapter, scores: list[Score], *, last: bool) -> None:
        """Note a finished chunk, if it is time or the last."""
        if not self.writes or (not last and time.monotonic() - self._last < self.seconds):
            return
        losses = scorer.losses[: scores[-1].tokens]
        story = {
            "identity": self.identity,
            "scores": [(score.nats, score.tokens, score.text_bytes) for score in scores],
            "seconds": self.spent + time.monotonic() - self._begin,
        }
        save_tensors(self.path, {**adapter.state(), "losses": losses}, story)
        self._last = time.monotonic()
