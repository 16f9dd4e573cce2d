"""Score first, then adapt: the loop that all scores come from (PR 1501; rules: the challenge's issue 1017).

The windows are taken chunk by chunk. A chunk is scored; then, unless it is the last, the adapter is handed
its tokens. The ledger knows which targets have their score, and hands over nothing else.

With several processes the batches of a chunk are shared out, their losses are put together, and every process
adapts on the same sequences in the same order. So the result does not depend on the number of processes, with
test-time training or without, as far as the hardware repeats its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch

from pgolf_fast import console
from pgolf_fast.evaluation.adapt import Adapter, DocumentAdapter, Scored
from pgolf_fast.evaluation.resume import SavedState
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.evaluation.windows import BatchSize, Windows

BATCHES_A_CHUNK = 64  # where nothing is learned in between: enough to share out, few enough to resume from


@dataclass(frozen=True)
class Chunk:
    """Windows low .. high-1; once they are scored, targets begin .. end-1 may be learned from.

    It is `number` of `count` for a learning rate that falls along the stream: both follow from where the
    chunk begins and how long the stream is, for no later token may have a say in them.
    """

    low: int
    high: int
    begin: int
    end: int
    number: int = 0
    count: int = 1


@dataclass(frozen=True)
class Segment:
    """Windows low .. high-1 of documents in step, each of its own row.

    Once they are scored, each of the first len(begin) documents may learn from its targets begin[i] ..
    begin[i] + length-1; the others end here, and nothing of them is scored that learning could serve.
    """

    low: int
    high: int
    begin: np.ndarray
    length: int
    opens: int
    """How many documents begin here, in place of those before; 0 where they go on."""


def target_chunks(windows: Windows, num_targets: int, chunk_tokens: int) -> list[Chunk]:
    """Chunks of `chunk_tokens` targets; a window belongs to that of the first target it scores."""
    begins = np.arange(0, num_targets, chunk_tokens)
    edges = [*np.searchsorted(windows.first, begins).tolist(), len(windows)]
    ends = np.minimum(begins + chunk_tokens, num_targets)
    return [
        Chunk(low, high, int(begin), int(end), number, len(begins))
        for number, (low, high, begin, end) in enumerate(zip(edges, edges[1:], begins, ends, strict=False))
    ]


def window_chunks(windows: Windows, size: BatchSize) -> list[Chunk]:
    """Chunks of many batches, to be scored only."""
    count = BATCHES_A_CHUNK * size(int((windows.end - windows.start).max()))
    edges = [*range(0, len(windows), count), len(windows)]
    return [
        Chunk(low, high, int(windows.first[low]), int(windows.end[high - 1])) for low, high in pairwise(edges)
    ]


class Ledger:
    """Which targets have their score; only these may be learned from."""

    def __init__(self, stream: Stream):
        self._tokens = stream.tokens
        self._scored = np.zeros(stream.num_targets, dtype=bool)

    def note(self, windows: Windows) -> None:
        """The targets of these windows are scored."""
        counts = windows.end - windows.first
        ahead = np.repeat(windows.first - windows.places()[:-1], counts)
        self._scored[ahead + np.arange(len(ahead))] = True

    def hand_over(self, chunk: Chunk | Segment) -> Scored:
        """The tokens of a chunk, copied. Raises AssertionError unless each of its targets is scored."""
        if isinstance(chunk, Segment):
            targets = chunk.begin[:, None] + np.arange(chunk.length)
        else:
            targets = np.arange(chunk.begin, chunk.end)
        if not self._scored[targets].all():
            raise AssertionError(
                f"test-time training would use unscored targets in {targets.min()}..{targets.max() + 1}"
            )
        positions = np.concatenate((targets, targets[..., -1:] + 1), axis=-1)
        tokens = self._tokens[torch.from_numpy(positions).to(self._tokens.device)]
        return Scored(tokens) if isinstance(chunk, Segment) else Scored(tokens, chunk.number, chunk.count)


def score_and_adapt(
    adapter: Adapter,
    scorer: Scorer,
    chunks: Sequence[Chunk | Segment],
    what: str,
    saved: SavedState | None = None,
) -> list[Score]:
    """The running score after each chunk; the last is the result. Progress is shown as `what`.

    Segments need a `DocumentAdapter`. With `saved`, goes on from there, and leaves states there now and then.
    """
    scores = saved.load(scorer, adapter) if saved is not None else []
    ledger = Ledger(scorer.stream)
    if scores:
        ledger.note(scorer.windows[: chunks[len(scores) - 1].high])
    left = range(len(scores), len(chunks))
    numbers: Iterable[int] = left
    if scorer.ranks.rank == 0:
        numbers = console.progress(
            left, what, total=len(left), unit="chunk", note=lambda: f"bpb {scores[-1].bpb:.4f} so far"
        )
    for number in numbers:
        chunk, last = chunks[number], number == len(chunks) - 1
        if isinstance(chunk, Segment) and chunk.opens:
            cast(DocumentAdapter, adapter).begin(chunk.opens)
        score = scorer.score(adapter.score, chunk.low, chunk.high)
        scores.append(scores[-1] + score if scores else score)
        ledger.note(scorer.windows[chunk.low : chunk.high])
        if not last and not (isinstance(chunk, Segment) and len(chunk.begin) == 0):
            adapter.adapt(ledger.hand_over(chunk))
        if saved is not None:
            saved.save(scorer, adapter, scores, last=last)
    return scores
