"""Saved states: an interrupted evaluation resumes after its last saved chunk, with the same result."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pgolf_fast import console
from pgolf_fast.evaluation.adapters.base import Adapter
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.io import load_tensors, save_tensors


def identity(model: nn.Module, stream: Stream, settings: object) -> str:
    """Return a digest of weights, tokens, their bytes and settings, which a resumed evaluation must share."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    counts = torch.from_numpy(stream.target_bytes)
    for name, tensor in [*model.state_dict().items(), ("tokens", stream.tokens), ("bytes", counts)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class SavedState:
    """One pass's state in a file that is written atomically: scores so far, losses, the adapter's state."""

    def __init__(self, path: Path, resume: "Resume"):
        self.path, self.resume = path, resume
        self.spent = 0.0  # seconds that earlier processes spent on the chunks saved here
        self._begin = self._last = time.monotonic()

    def load(self, scorer: Scorer, adapter: Adapter) -> list[Score]:
        """Restore losses and adapter from the file and return its running scores, or none."""
        if not self.path.is_file():
            return []
        tensors, metadata = load_tensors(self.path)
        if metadata.get("identity") != self.resume.identity:
            console.logger.info("%s belongs to other weights, data or settings: starting over", self.path)
            return []
        losses = tensors.pop("losses")
        scorer.losses[: len(losses)] = losses.to(scorer.losses.device)
        adapter.load_state(tensors)
        self.spent = metadata["seconds"]
        console.logger.info("%s: resuming after %d chunks", self.path, len(metadata["scores"]))
        return [Score(*score) for score in metadata["scores"]]

    def save(self, scorer: Scorer, adapter: Adapter, scores: list[Score], *, last: bool) -> None:
        """Write a state if enough time has passed or the chunk was the last."""
        if not self.resume.writes or (not last and time.monotonic() - self._last < self.resume.seconds):
            return
        losses = scorer.losses[: scores[-1].tokens]
        spent = self.spent + time.monotonic() - self._begin
        kept = [(score.nats, score.tokens, score.text_bytes) for score in scores]
        metadata = {"identity": self.resume.identity, "scores": kept, "seconds": spent}
        save_tensors(self.path, {**adapter.state(), "losses": losses}, metadata)
        self._last = time.monotonic()


@dataclass(frozen=True)
class Resume:
    """Saved states of one evaluation, in the folder of its `result`: one for each of its passes."""

    result: Path
    identity: str
    seconds: float = 120.0  # Time between states: one is written after the first chunk that ends later
    writes: bool = True  # Whether this rank writes. All ranks read, so they must share the folder

    def of(self, name: str) -> SavedState:
        """Return the state of the pass `name`."""
        return SavedState(self.result.with_name(f"{self.result.stem}.{name}.state"), self)

    def forget(self) -> None:
        """Remove all states, once the result is written."""
        for path in self.result.parent.glob(f"{self.result.stem}.*.state"):
            path.unlink(missing_ok=True)
