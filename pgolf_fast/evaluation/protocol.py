"""Score first, then adapt: the loop behind every score (PR 1501; rules: the challenge's issue 1017).

A chunk of windows is scored; then, unless it is the last, the adapter is given its tokens. The ledger records
which targets have been scored and hands out nothing else.

Ranks divide the batches of a chunk, gather their losses, and all adapt on the same sequences in one order.
The result depends on the number of ranks only where the hardware's arithmetic is not reproducible.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from pgolf_fast import console
from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.evaluation.resume import SavedState
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.evaluation.windows import BatchSize, Windows

# `score_and_adapt`, or a function that is called like it
ProtocolFunction = Callable[..., list[Score]]
BATCHES_PER_CHUNK = 64  # without adaptation: enough to divide among ranks, few enough to resume from


@dataclass(frozen=True)
class Chunk:
    """Windows low .. high-1, and the targets to learn from once these are scored.

    Row i of the targets is starts[i] .. starts[i] + length-1. A chunk of the stream has one row; a chunk
    `by_document` has one for each of the first documents of the current batch that continue after it. Without
    rows nothing is learned. `index` of `count` positions a decaying learning rate: both follow from where the
    chunk begins and from the stream's length, never from later tokens.
    """

    low: int
    high: int
    starts: tuple[int, ...] = ()
    length: int = 0
    index: int = 0
    count: int = 1
    by_document: bool = False
    new_documents: int = 0
    """Documents that begin with this chunk and replace the last batch of them; 0 if that batch continues."""

    @property
    def targets(self) -> np.ndarray:
        """The targets to learn from, (rows, length) int64."""
        return np.array(self.starts, dtype=np.int64)[:, None] + np.arange(self.length)


Chunks = Sequence[Chunk]
Saved = SavedState | None


def target_chunks(windows: Windows, num_targets: int, chunk_tokens: int) -> list[Chunk]:
    """Return chunks of `chunk_tokens` targets; a window belongs to the chunk of its first scored target."""
    starts = range(0, num_targets, chunk_tokens)
    edges = [*np.searchsorted(windows.first, starts).tolist(), len(windows)]
    return [
        Chunk(low, high, (start,), min(chunk_tokens, num_targets - start), index, len(starts))
        for index, (start, (low, high)) in enumerate(zip(starts, pairwise(edges), strict=True))
    ]


def window_chunks(windows: Windows, size: BatchSize) -> list[Chunk]:
    """Return chunks of many batches, for scoring only."""
    count = BATCHES_PER_CHUNK * size(int((windows.end - windows.start).max()))
    return [Chunk(low, high) for low, high in pairwise([*range(0, len(windows), count), len(windows)])]


class Ledger:
    """Record of which targets have their score; only these may be learned from."""

    def __init__(self, stream: Stream):
        self._tokens = stream.tokens
        self._scored = np.zeros(stream.num_targets, dtype=bool)

    def note(self, windows: Windows) -> None:
        """Record that the targets of these windows are scored."""
        self._scored[windows.targets()] = True

    def hand_over(self, chunk: Chunk) -> Scored:
        """Return a copy of a chunk's tokens. Raises AssertionError unless each of its targets is scored."""
        targets = chunk.targets
        if not self._scored[targets].all():
            where = f"{targets.min()}..{targets.max() + 1}"
            raise AssertionError(f"test-time training would use unscored targets in {where}")
        positions = torch.from_numpy(np.concatenate((targets, targets[:, -1:] + 1), axis=1))
        tokens = self._tokens[positions.to(self._tokens.device)]
        return Scored(tokens, chunk.index, chunk.count, chunk.by_document)


def score_and_adapt(
    adapter: Adapter, scorer: Scorer, chunks: Chunks, what: str, saved: Saved = None
) -> list[Score]:
    """Return running scores by chunk, the last being the result; `saved` is resumed from and written to."""
    scores, ledger = saved.load(scorer, adapter) if saved is not None else [], Ledger(scorer.stream)
    if scores:
        ledger.note(scorer.windows[: chunks[len(scores) - 1].high])
    left = range(len(scores), len(chunks))
    shown = console.progress(
        left, what, unit="chunk", note=lambda: f"bpb {console.number(scores[-1].bpb, '.4f')} so far"
    )
    for number in shown if scorer.world.is_main else left:
        chunk, last = chunks[number], number == len(chunks) - 1
        if chunk.new_documents:
            adapter.begin(chunk.new_documents)
        score = scorer.score(adapter.score, chunk.low, chunk.high)
        scores.append(scores[-1] + score if scores else score)
        ledger.note(scorer.windows[chunk.low : chunk.high])
        if chunk.starts and not last:
            adapter.adapt(ledger.hand_over(chunk))
        if saved is not None:
            saved.save(scorer, adapter, scores, last=last)
    return scores
