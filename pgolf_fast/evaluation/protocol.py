"""Score first, then adapt: the loop that all scores come from (PR 1501; rules: the challenge's issue 1017).

The windows are taken chunk by chunk. A chunk is scored; then, unless it is the last, the adapter is handed
its tokens. The ledger knows which targets have their score, and hands over nothing else.

With several processes the batches of a chunk are shared out, their losses are put together, and every process
adapts on the same sequences in the same order. So the result does not depend on the number of processes, with
test-time training or without, as far as the hardware repeats its own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pgolf_fast import report
from pgolf_fast.evaluation.adapt import Adapter, Scored
from pgolf_fast.evaluation.resume import SavedState
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.evaluation.windows import BatchSize, Windows

BATCHES_A_CHUNK = 64  # where nothing is learned in between: enough to share out, few enough to resume from


@dataclass(frozen=True)
class Chunk:
    """Windows low .. high-1; once they are scored, targets begin .. end-1 may be learned from."""

    low: int
    high: int
    begin: int
    end: int


def target_chunks(windows: Windows, num_targets: int, chunk_tokens: int) -> list[Chunk]:
    """Chunks of `chunk_tokens` targets; a window belongs to that of the first target it scores."""
    begins = np.arange(0, num_targets, chunk_tokens)
    edges = [*np.searchsorted(windows.first, begins).tolist(), len(windows)]
    ends = np.minimum(begins + chunk_tokens, num_targets)
    return [
        Chunk(low, high, int(begin), int(end))
        for low, high, begin, end in zip(edges, edges[1:], begins, ends, strict=False)
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
        if len(windows):
            low, high = int(windows.first.min()), int(windows.end.max())
            steps = np.zeros(high - low + 1, dtype=np.int64)
            np.add.at(steps, windows.first - low, 1)
            np.add.at(steps, windows.end - low, -1)
            self._scored[low:high] |= np.cumsum(steps)[:-1] > 0

    def hand_over(self, chunks: list[Chunk], number: int) -> Scored:
        """The tokens of a chunk, copied. Raises AssertionError unless each of its targets is scored."""
        begin, end = chunks[number].begin, chunks[number].end
        if not self._scored[begin:end].all():
            raise AssertionError(f"test-time training would use unscored targets in {begin}..{end}")
        return Scored(self._tokens[begin : end + 1].clone(), number, len(chunks))


def score_and_adapt(
    adapter: Adapter, scorer: Scorer, chunks: list[Chunk], what: str, saved: SavedState | None = None
) -> list[Score]:
    """The running score after each chunk; the last is the result. Progress is shown as `what`.

    With `saved`, goes on from there, and leaves a state there now and then.
    """
    scores = saved.load(scorer, adapter) if saved is not None else []
    ledger = Ledger(scorer.stream)
    if scores:
        ledger.note(scorer.windows[: chunks[len(scores) - 1].high])
    left = range(len(scores), len(chunks))
    numbers = report.progress(left, what, total=len(left), unit="chunk") if scorer.ranks.rank == 0 else left
    for number in numbers:
        chunk, last = chunks[number], number == len(chunks) - 1
        score = scorer.score(adapter.score, chunk.low, chunk.high)
        scores.append(scores[-1] + score if scores else score)
        ledger.note(scorer.windows[chunk.low : chunk.high])
        if not last:
            adapter.adapt(ledger.hand_over(chunks, number))
        if saved is not None:
            saved.save(scorer, adapter, scores, last=last)
    return scores
