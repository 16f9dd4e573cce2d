"""Legal test-time training: score a chunk with frozen weights, then learn from it (PR 1501).

What is not legal goes through here too, if it is allowed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.distributed import ALONE, Ranks
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapt import borrowed
from pgolf_fast.evaluation.adapters import make_adapter
from pgolf_fast.evaluation.documents import document_chunks, document_starts
from pgolf_fast.evaluation.error_guided import learn_and_score
from pgolf_fast.evaluation.protocol import Chunk, Segment, score_and_adapt, target_chunks
from pgolf_fast.evaluation.resume import SavedState
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.evaluation.windows import BatchSize, Windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import fake_int6


@dataclass(frozen=True)
class TTTResult:
    """The score, what was adapted, and how often; `by_chunk` is the running score after each chunk."""

    score: Score
    trainable: int
    updates: int
    by_chunk: list[Score]
    scorer: Scorer
    """Holds the losses themselves."""


def legal_ttt(
    model: GPT,
    stream: Stream,
    windows: Windows,
    seq_len: int,
    batch: int | BatchSize,
    config: TTTConfig,
    *,
    grid: Transform = fake_int6,
    before_restore: Callable[[], object] | None = None,
    ranks: Ranks = ALONE,
    saved: SavedState | None = None,
    what: str = "sliding + TTT",
    compile: bool = False,
    cuda_graph: bool = False,
    allow_illegal: bool = False,
) -> TTTResult:
    """Score every window, adapting on each chunk after it is scored and never after the last.

    An adapter that breaks the rules (`TTTConfig.illegal`) does otherwise: it raises PgolfError, unless
    `allow_illegal`.

    `grid` is what `config.quantize_forward` rounds the banks to: the artifact's own grid, or int6 by
    default; the projections, which are not on it, are rounded to int6. The model's weights are what they were
    when this returns or raises; `before_restore` is called while it still has the adapted ones. Progress is
    shown as `what`; `compile` and `cuda_graph` are for GPUs.
    """
    need_legal(config, allow_illegal)
    size = batch if callable(batch) else lambda length: batch
    windows, chunks = adapting_chunks(windows, stream, config)
    scorer = Scorer(stream, windows, seq_len, size, ranks)
    with borrowed(model):
        adapter = make_adapter(model, config, seq_len, grid, compile=compile, cuda_graph=cuda_graph)
        by_chunk = protocol_of(config)(adapter, scorer, chunks, what, saved)
        if before_restore is not None:
            before_restore()
    return TTTResult(by_chunk[-1], adapter.trainable, adapter.updates, by_chunk, scorer)


def need_legal(config: TTTConfig, allow_illegal: bool) -> None:
    """Raise PgolfError if these settings break the rules, unless `allow_illegal`."""
    if config.illegal is not None and not allow_illegal:
        raise PgolfError(
            f"ttt.adapter {config.adapter} breaks the rules: {config.illegal}. "
            "Give --allow-illegal to score with it, for study only, or set another ttt.adapter"
        )


def protocol_of(config: TTTConfig) -> Callable[..., list[Score]]:
    """What scores all windows with the configured adapter, called as `score_and_adapt`."""
    return partial(learn_and_score, config.guided) if config.adapter == "error_guided" else score_and_adapt


def adapting_chunks(
    windows: Windows, stream: Stream, config: TTTConfig
) -> tuple[Windows, Sequence[Chunk | Segment]]:
    """The windows in the order in which the configured adapter has them scored, and its chunks of them."""
    if config.by_document:
        return document_chunks(windows, document_starts(stream.tokens.cpu().numpy()), config)
    if config.adapter == "error_guided":  # has learned all it learns before the first of them
        return windows, [Chunk(0, len(windows), 0, stream.num_targets)]
    return windows, target_chunks(windows, stream.num_targets, config.chunk_tokens)
