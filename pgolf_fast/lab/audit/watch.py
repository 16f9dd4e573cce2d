"""Watch an evaluation: which targets are scored, which tokens updates use, and what changes when.

The watcher keeps its own ledger. It does not trust the protocol about the targets of an update, but searches
the stream for the tokens: they must occur at a position where every target has its score.
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pgolf_fast.bench.timer import one_thread
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.evaluation.protocol import Chunk
from pgolf_fast.evaluation.score import LossFunction, Score, Scorer, Stream
from pgolf_fast.evaluation.windows import BatchSize, Windows


@dataclass(frozen=True)
class Method:
    """The parts of an evaluation. Each can be replaced by the part to audit."""

    plan: Callable[[Stream], tuple[Windows, Sequence[Chunk]]]  # cuts a stream into windows, and into chunks
    adapter: Callable[[], AbstractContextManager[Adapter]]  # makes one; on exit the model is as before
    protocol: Callable[..., list[Score]]  # `evaluation.protocol.score_and_adapt` or a replacement
    seq_len: int
    size: BatchSize


def evaluate(method: Method, stream: Stream, world: World = SINGLE) -> np.ndarray:
    """Return the losses of a method, (targets,) float32; zero for targets of other ranks."""
    windows, chunks = method.plan(stream)
    scorer = Scorer(stream, windows, method.seq_len, method.size, world)
    with method.adapter() as adapter:
        method.protocol(adapter, scorer, chunks, "audit")
    return by_target(scorer)


def by_target(scorer: Scorer) -> np.ndarray:
    """Return losses in the order of the stream, (targets,) float32: the first of several, NaN for none."""
    losses = np.full(scorer.stream.num_targets, np.nan, dtype=np.float32)
    # backwards: of several values for an index, numpy keeps the last
    losses[scorer.windows.targets()[::-1]] = scorer.losses.cpu().numpy()[::-1]
    return losses


@dataclass
class Watched:
    """Observations of one evaluation."""

    times: np.ndarray  # number of times each target was scored, (targets,)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # as `evaluate` returns them
    score: Score = field(default_factory=Score)  # as the protocol reports it
    updates: int = 0  # calls of the adapter's `adapt`
    steps: int = 0  # gradient steps
    batches: int = 0  # batches of windows that were scored
    checksums: int = 0  # of all weights and optimizer state
    # Updates on targets without a score, and changes while a chunk was scored
    early_updates: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)  # changes and gradients while a batch was scored
    late_updates: list[str] = field(default_factory=list)  # updates and changes after the last score


def watch(method: Method, stream: Stream, model: nn.Module) -> Watched:
    """Evaluate with one thread, watching the adapter and the weights of `model`, which it may change."""
    windows, chunks = method.plan(stream)
    # With more threads, batches overlap and a change could not be attributed.
    with one_thread(), method.adapter() as adapter:
        watcher = _Watcher(adapter, stream, model)
        scorer = _WatchedScorer(watcher, stream, windows, method.seq_len, method.size)
        scores = method.protocol(watcher, scorer, chunks, "audit, watched")
        watcher.end()
    seen = watcher.seen
    seen.losses, seen.score = by_target(scorer), scores[-1]
    return seen


class _Watcher:
    """Wrap an adapter: forward every call and record it."""

    def __init__(self, adapter: Adapter, stream: Stream, model: nn.Module):
        self._adapter, self._model = adapter, model
        self._tokens = stream.tokens.cpu().numpy()
        self.seen = Watched(np.zeros(stream.num_targets, dtype=np.int64))
        self._last = self._now()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def score(self, *arguments: Any) -> Tensor:
        before, kept = self.checksum(), list[Tensor]()

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = self._adapter.score(*arguments)
        self.seen.batches += 1
        if self.checksum() != before:
            self.seen.touched.append(f"batch {self.seen.batches} changed weights or optimizer state")
        if kept:  # autograd saves tensors only for a backward
            self.seen.touched.append(f"batch {self.seen.batches} was scored with gradients")
        return losses

    def adapt(self, scored: Scored) -> None:
        self.seen.updates += 1
        early = [row for row in scored.tokens.cpu().numpy() if not self._is_scored(row)]
        self.seen.early_updates += [
            f"update {self.seen.updates} uses {len(row) - 1:,} targets, not all of which are scored"
            for row in early
        ]
        self._adapter.adapt(scored)

    def _is_scored(self, row: np.ndarray) -> bool:
        """Return whether these tokens occur in the stream where every target has its score."""
        starts = np.arange(len(self._tokens) - len(row) + 1)
        for offset, token in enumerate(row):
            starts = starts[self._tokens[starts + offset] == token]
        return any(self.seen.times[start : start + len(row) - 1].all() for start in starts)

    def checksum(self) -> int:
        """Return a checksum of the model's tensors and the adapter's state."""
        self.seen.checksums += 1
        crc = 0
        for tensor in [*self._model.state_dict().values(), *self._adapter.state().values()]:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            crc = zlib.crc32(flat.view(torch.uint8).numpy(), crc)
        return crc

    def scored(self, windows: Windows, unchanged: bool) -> None:
        """Record that these windows have their scores."""
        np.add.at(self.seen.times, windows.targets(), 1)
        if not unchanged:
            self.seen.early_updates.append("weights or optimizer state changed while a chunk was scored")
        if len(windows):
            self._last = self._now()

    def end(self) -> None:
        """Compare with the state at the last score."""
        self.seen.steps = self._adapter.updates
        updates, steps, checksum = (now - then for now, then in zip(self._now(), self._last, strict=True))
        changes = {
            f"{updates} update(s) after the last chunk was scored": updates,
            f"{steps:,} gradient steps after the last score": steps,
            "weights or optimizer state changed after the last score": checksum,
        }
        self.seen.late_updates += [text for text, change in changes.items() if change]

    def _now(self) -> tuple[int, int, int]:
        return self.seen.updates, self._adapter.updates, self.checksum()


class _WatchedScorer(Scorer):
    def __init__(self, watcher: _Watcher, *arguments: Any):
        super().__init__(*arguments)
        self._watcher = watcher

    def score(self, losses_of: LossFunction, low: int, high: int) -> Score:
        before = self._watcher.checksum()
        score = super().score(losses_of, low, high)
        self._watcher.scored(self.windows[low:high], self._watcher.checksum() == before)
        return score
