"""The three figures that are always reported together, because each alone has misled people (PR 1501)."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pgolf_fast import report
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.evaluation.score import Score, Stream, frozen_losses, score_windows
from pgolf_fast.evaluation.ttt import TTTResult, legal_ttt
from pgolf_fast.evaluation.windows import plain_windows, sliding_windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import make_fake


@dataclass(frozen=True)
class ThreeScores:
    """Non-overlapping windows; sliding windows; sliding windows with legal test-time training."""

    plain: Score
    sliding: Score
    ttt: TTTResult
    seconds: dict[str, float]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, bpb, loss in nats per token, seconds) of each."""
        scores = {"non-overlapping": self.plain, "sliding": self.sliding, "sliding + TTT": self.ttt.score}
        return [
            (name, f"{s.bpb:.6f}", f"{s.loss:.6f}", f"{self.seconds[name]:.1f}") for name, s in scores.items()
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""

        def figures(score: Score) -> dict[str, float]:
            return {"bpb": score.bpb, "loss": score.loss, "tokens": score.tokens, "bytes": score.text_bytes}

        return {
            "non_overlapping": figures(self.plain),
            "sliding": figures(self.sliding),
            "sliding_ttt": figures(self.ttt.score),
            "ttt_updates": self.ttt.updates,
            "ttt_trainable_parameters": self.ttt.trainable,
            "ttt_bpb_by_chunk": [score.bpb for score in self.ttt.by_chunk],
            "seconds": self.seconds,
        }


def plain_score(model: GPT, stream: Stream, config: RunConfig, what: str | None = None) -> Score:
    """Bits per byte over non-overlapping windows."""
    length = config.eval_seq_len
    windows = plain_windows(stream.num_targets, length)
    return score_windows(frozen_losses(model), stream, windows, length, config.eval.batch_seqs, what)


def three_scores(model: GPT, stream: Stream, config: RunConfig, grid: Transform = None) -> ThreeScores:
    """All three figures for a model as it stands; its weights are unchanged afterwards.

    `grid` is what test-time training with quantised forward rounds the banks to: give the artifact's own, so
    that without an update the third figure is the second. None is the configured int6 grid.
    """
    length, batch = config.eval_seq_len, config.eval.batch_seqs
    seconds: dict[str, float] = {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        report.logger.info("%s: done in %s", name, report.duration(seconds[name]))
        return result

    plain = timed("non-overlapping", lambda: plain_score(model, stream, config, "non-overlapping"))
    windows = sliding_windows(
        stream.num_targets, length, config.eval.stride, repeat_tail=config.eval.repeat_tail
    )
    losses = frozen_losses(model)
    sliding = timed("sliding", lambda: score_windows(losses, stream, windows, length, batch, "sliding"))
    grid = grid or make_fake(config.quant.bits, config.quant.scale_floor)
    ttt = timed(
        "sliding + TTT",
        lambda: legal_ttt(model, stream, windows, length, batch, config.ttt, grid=grid),
    )
    return ThreeScores(plain, sliding, ttt, seconds)
