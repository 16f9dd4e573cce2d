"""The three figures that are always reported together, because each alone has misled people (PR 1501)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pgolf_fast import console
from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.console import Table, number
from pgolf_fast.distributed import ALONE, Ranks
from pgolf_fast.evaluation.adapt import Frozen
from pgolf_fast.evaluation.protocol import score_and_adapt, window_chunks
from pgolf_fast.evaluation.resume import Resume
from pgolf_fast.evaluation.score import Score, Scorer, Stream, batch_size, frozen_losses
from pgolf_fast.evaluation.ttt import TTTResult, legal_ttt, need_legal
from pgolf_fast.evaluation.windows import BatchSize, Windows, plain_windows, sliding_windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import make_fake

TTT = "sliding + TTT"


@dataclass(frozen=True)
class ThreeScores:
    """Non-overlapping windows; sliding windows; sliding windows with test-time training."""

    plain: Score
    sliding: Score
    ttt: TTTResult
    seconds: dict[str, float]
    scorers: dict[str, Scorer]
    """What holds the losses of each, by the name in `to_dict`."""
    illegal: str | None = None
    """Why the third breaks the rules, if it was allowed to."""

    def table(self, title: str = "windows") -> Table:
        """Return `score_table` of these scores, with seconds; `title` heads the first column."""
        return score_table(self.to_dict(), self.seconds, title)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, and nothing that differs when the same is scored again."""
        return {
            "non_overlapping": self.plain.to_dict(),
            "sliding": self.sliding.to_dict(),
            "sliding_ttt": self.ttt.score.to_dict(),
            "illegal": self.illegal,
            "ttt_updates": self.ttt.updates,
            "ttt_trainable_parameters": self.ttt.trainable,
            "ttt_bpb_by_chunk": [score.bpb for score in self.ttt.by_chunk],
        }


def mark(name: str, illegal: object) -> str:
    """What a table calls that score, or that adapter: with a word to it if it breaks the rules."""
    return f"{name} (ILLEGAL)" if illegal else name


def conditions(story: dict, score: str) -> list[object]:
    """What a score in a scores file depends on besides the weights.

    Whether test-time training rounds the banks belongs to the weights: float ones never do.
    """
    names = ("seq_len",) if score == "non_overlapping" else ("seq_len", "stride", "repeat_tail")
    ttt = {**story.get("ttt", {}), "quantize_forward": None} if score == "sliding_ttt" else None
    return [story[score]["tokens"], ttt, *(story.get("eval", {}).get(name) for name in names)]


def plain_score(model: GPT, stream: Stream, config: RunConfig, ranks: Ranks = ALONE) -> Score:
    """Bits per byte over non-overlapping windows, by all ranks together; every rank has the result."""
    windows = plain_windows(stream.num_targets, config.eval_seq_len)
    scorer = Scorer(stream, windows, config.eval_seq_len, window_batches(model, config, ranks), ranks)
    return scorer.score(frozen_losses(model), 0, len(windows))


def window_batches(model: GPT, config: RunConfig, ranks: Ranks = ALONE) -> BatchSize:
    """How many windows are scored at once."""
    device = model.qo_bank.device
    return batch_size(config.eval.batch_seqs, config.model, model.compute_dtype, device, ranks)


def compiles(model: GPT, config: RunConfig) -> tuple[bool, bool]:
    """Whether scoring and adapting are compiled, and whether updates are replayed from CUDA graphs."""
    cuda = model.qo_bank.device.type == "cuda"
    compile_ = cuda if config.eval.compile is None else config.eval.compile
    return compile_, cuda and config.eval.cuda_graph is not False


def three_scores(
    model: GPT,
    stream: Stream,
    config: RunConfig,
    grid: Transform = None,
    *,
    ranks: Ranks = ALONE,
    resume: Resume | None = None,
    allow_illegal: bool = False,
) -> ThreeScores:
    """All three figures for a model as it stands; its weights are unchanged afterwards.

    Raises PgolfError, before anything is scored, for test-time training that breaks the rules, unless
    `allow_illegal`.

    `grid` is what test-time training with quantised forward rounds the banks to: give the artifact's own, so
    that without an update the third figure is the second. None is the configured int6 grid. With several
    `ranks`, each scores its share of the windows. With `resume`, goes on from states that were left there.
    """
    need_legal(config.ttt, allow_illegal)
    length, size = config.eval_seq_len, window_batches(model, config, ranks)
    compile_, cuda_graph = compiles(model, config)
    seconds: dict[str, float] = {}

    def timed(name, function):
        start = time.perf_counter()
        saved = None if resume is None else resume.of(name.replace(" + ", "_"))
        result = function(saved)
        seconds[name] = time.perf_counter() - start + (0.0 if saved is None else saved.spent)
        console.logger.info("%s: done in %s", name, console.duration(seconds[name]))
        return result

    def frozen(name: str, windows: Windows) -> tuple[Score, Scorer]:
        scorer = Scorer(stream, windows, length, size, ranks)
        adapter, chunks = Frozen(model, compile=compile_), window_chunks(windows, size)
        return timed(name, lambda saved: score_and_adapt(adapter, scorer, chunks, name, saved)[-1]), scorer

    plain, plain_scorer = frozen("non-overlapping", plain_windows(stream.num_targets, length))
    windows = sliding_windows(
        stream.num_targets, length, config.eval.stride, repeat_tail=config.eval.repeat_tail
    )
    sliding, sliding_scorer = frozen("sliding", windows)
    ttt = timed(
        TTT,
        lambda saved: legal_ttt(
            model,
            stream,
            windows,
            length,
            shared_size(size, config),
            config.ttt,
            grid=grid or make_fake(config.quant.bits, config.quant.scale_floor),
            ranks=ranks,
            saved=saved,
            compile=compile_,
            cuda_graph=cuda_graph,
            allow_illegal=allow_illegal,
        ),
    )
    scorers = {"non_overlapping": plain_scorer, "sliding": sliding_scorer, "sliding_ttt": ttt.scorer}
    return ThreeScores(plain, sliding, ttt, seconds, scorers, config.ttt.illegal)


def shared_size(size: BatchSize, config: RunConfig) -> BatchSize:
    """Batches small enough that a chunk of test-time training has some for each of eight processes, but of
    four windows at least."""
    if config.eval.batch_seqs is not None:
        return size
    lora = config.ttt.lora
    tokens = lora.segment_tokens * lora.documents if config.ttt.by_document else config.ttt.chunk_tokens
    return lambda length: min(size(length), max(4, tokens // config.eval.stride // 8))


def score_table(
    scores: dict[str, Any], seconds: dict[str, float] | None = None, title: str = "windows"
) -> Table:
    """Tabulate the scores of a scores file or of `ThreeScores.to_dict`: bits per byte and nats per token.

    With `seconds`, by name, the last column is the time; otherwise it is the number of targets. A score that
    is missing or not finite has no row.
    """
    rows = []
    for key, name in SCORES.items():
        score = scores.get(key) or {}
        bpb, loss = (number(score.get(unit), ".6f") for unit in ("bpb", "loss"))
        if "-" not in (bpb, loss):
            last = f"{score['tokens']:,}" if seconds is None else f"{seconds[name]:.1f}"
            rows.append((mark(name, key == "sliding_ttt" and scores.get("illegal")), bpb, loss, last))
    return Table((title, "bpb", "nats/token", "targets" if seconds is None else "seconds"), rows)
