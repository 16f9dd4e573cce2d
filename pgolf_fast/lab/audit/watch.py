"""An evaluation that is watched: what is scored, what is learned from, and what changes when.

The watch keeps its own ledger. It does not ask the protocol which targets an adapter was given, but looks
their tokens up in the stream: they must be found where everything has its score.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.evaluation.protocol import Chunk
from pgolf_fast.evaluation.score import LossFunction, Score, Scorer, Stream
from pgolf_fast.evaluation.windows import BatchSize, Windows


@dataclass(frozen=True)
class Method:
    """How an evaluation is put together. Each piece can be replaced, by what is to be audited instead."""

    plan: Callable[[Stream], tuple[Windows, Sequence[Chunk]]]
    """The windows of a stream, and its chunks of them."""
    adapter: Callable[[], AbstractContextManager[Adapter]]
    """A fresh adapter, after which everything is as before."""
    protocol: Callable[..., list[Score]]
    """`evaluation.protocol.score_and_adapt`, or what stands for it."""
    seq_len: int
    size: BatchSize


def evaluate(method: Method, stream: Stream, world: World = SINGLE) -> np.ndarray:
    """The losses that a method gives, (targets,) float32; zero where another rank scores."""
    windows, chunks = method.plan(stream)
    scorer = Scorer(stream, windows, method.seq_len, method.size, world)
    with method.adapter() as adapter:
        method.protocol(adapter, scorer, chunks, "audit")
    return by_target(scorer)


def by_target(scorer: Scorer) -> np.ndarray:
    """The losses in the order of the stream, (targets,) float32; the first of several, NaN where none is."""
    losses = np.full(scorer.stream.num_targets, np.nan, dtype=np.float32)
    targets, firsts = np.unique(scored_targets(scorer.windows), return_index=True)
    losses[targets] = scorer.losses.cpu().numpy()[firsts]
    return losses


def scored_targets(windows: Windows) -> np.ndarray:
    """The targets of all windows in their order, one after another."""
    counts = windows.end - windows.first
    return np.repeat(windows.first - windows.places()[:-1], counts) + np.arange(counts.sum())


@dataclass
class Watched:
    """What was seen of an evaluation."""

    times: np.ndarray
    """How often each target was scored, (targets,)."""
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """As from `evaluate`."""
    score: Score = field(default_factory=Score)
    """What the protocol reports."""
    lessons: int = 0
    """How often something was learned from."""
    updates: int = 0
    """Gradient steps."""
    batches: int = 0
    """Batches of windows that were scored."""
    checksums: int = 0
    """Comparisons of everything that can change."""
    premature: list[str] = field(default_factory=list)
    """What was learned from before it had its score, or changed while a chunk was scored."""
    touched: list[str] = field(default_factory=list)
    """What changed or was differentiated while a batch was scored."""
    late: list[str] = field(default_factory=list)
    """What was done after the last score."""


def watch(method: Method, stream: Stream, model: nn.Module) -> Watched:
    """Evaluate with one thread, watching the adapter and the weights of `model`, which it may change."""
    windows, chunks = method.plan(stream)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is seen before and after a batch is then of that batch
    try:
        with method.adapter() as adapter:
            watcher = _Watcher(adapter, stream, model)
            scorer = _WatchedScorer(watcher, stream, windows, method.seq_len, method.size)
            scores = method.protocol(watcher, scorer, chunks, "audit, watched")
            watcher.end()
    finally:
        torch.set_num_threads(threads)
    seen = watcher.seen
    seen.losses, seen.score = by_target(scorer), scores[-1]
    return seen


class _Watcher:
    """Stands for an adapter: hands everything on, and notes it."""

    def __init__(self, adapter: Adapter, stream: Stream, model: nn.Module):
        self._adapter, self._model = adapter, model
        self._tokens = stream.tokens.cpu().numpy()
        self.seen = Watched(np.zeros(stream.num_targets, dtype=np.int64))
        self._last = self._now()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def score(self, *arguments: Any) -> Tensor:
        before, kept = self.checksum(), 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = self._adapter.score(*arguments)
        self.seen.batches += 1
        if self.checksum() != before:
            self.seen.touched.append(f"batch {self.seen.batches} changed weights or optimiser state")
        if kept:  # autograd keeps tensors for a backward pass only
            self.seen.touched.append(f"batch {self.seen.batches} was scored with gradients")
        return losses

    def adapt(self, scored: Scored) -> None:
        self.seen.lessons += 1
        rows = scored.tokens.cpu().numpy()
        for row in rows:
            if not self._is_scored(row):
                self.seen.premature.append(
                    f"lesson {self.seen.lessons} holds {len(row) - 1:,} targets of which not all are scored"
                )
        self._adapter.adapt(scored)

    def _is_scored(self, row: np.ndarray) -> bool:
        """Whether these tokens stand somewhere in the stream where every target has its score."""
        last = len(self._tokens) - len(row)
        starts = np.arange(last + 1)
        for offset, token in enumerate(row):
            starts = starts[self._tokens[starts + offset] == token]
        return any(self.seen.times[start : start + len(row) - 1].all() for start in starts)

    def checksum(self) -> int:
        """Of the model's tensors and the adapter's state."""
        self.seen.checksums += 1
        found = 0
        for tensor in [*self._model.state_dict().values(), *self._adapter.state().values()]:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found = zlib.crc32(flat.view(torch.uint8).numpy(), found)
        return found

    def scored(self, windows: Windows, unchanged: bool) -> None:
        """These windows have their scores."""
        np.add.at(self.seen.times, scored_targets(windows), 1)
        if not unchanged:
            self.seen.premature.append("weights or optimiser state changed while a chunk was scored")
        if len(windows):
            self._last = self._now()

    def end(self) -> None:
        """Nothing more is scored."""
        self.seen.updates = self._adapter.updates
        lessons, updates, checksum = (now - then for now, then in zip(self._now(), self._last, strict=True))
        if lessons:
            self.seen.late.append(f"{lessons} lesson(s) after the last chunk was scored")
        if updates:
            self.seen.late.append(f"{updates:,} gradient steps after the last score")
        if checksum:
            self.seen.late.append("weights or optimiser state changed after the last score")

    def _now(self) -> tuple[int, int, int]:
        return self.seen.lessons, self._adapter.updates, self.checksum()


class _WatchedScorer(Scorer):
    def __init__(self, watcher: _Watcher, *arguments: Any):
        super().__init__(*arguments)
        self._watcher = watcher

    def score(self, losses_of: LossFunction, low: int, high: int) -> Score:
        before = self._watcher.checksum()
        score = super().score(losses_of, low, high)
        self._watcher.scored(self.windows[low:high], self._watcher.checksum() == before)
        return score
