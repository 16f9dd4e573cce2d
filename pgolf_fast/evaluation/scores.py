"""The three scores that are always reported together, because each alone has been misleading (PR 1501)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pgolf_fast import console
from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.console import Table, number
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.adapters.frozen import Frozen
from pgolf_fast.evaluation.adapters.registry import need_legal
from pgolf_fast.evaluation.evaluator import Evaluator, Pass
from pgolf_fast.evaluation.resume import Resume
from pgolf_fast.evaluation.score import Score, Scorer, Stream
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT

PLAIN, SLIDING, TTT = "non-overlapping", "sliding", "sliding + TTT"


@dataclass(frozen=True)
class ThreeScores:
    """Non-overlapping windows; sliding windows; sliding windows with test-time training."""

    plain: Score
    sliding: Score
    ttt: Pass
    seconds: dict[str, float]
    scorers: dict[str, Scorer]
    """Holders of each score's losses, by the names in `to_dict`."""
    illegal: str | None = None
    """Why the third breaks the rules, if it was allowed to."""

    def table(self, title: str = "windows") -> Table:
        """Return `score_table` of these scores, with seconds; `title` heads the first column."""
        return score_table(self.to_dict(), self.seconds, title)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, the same ones when the same is scored again."""
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
    """Return a score's or adapter's name for a table; appends (ILLEGAL) if it breaks the rules."""
    return f"{name} (ILLEGAL)" if illegal else name


def conditions(scores: dict, name: str) -> list[object]:
    """Return what score `name` in a scores file depends on besides the weights.

    Rounding of the banks during test-time training counts as part of the weights: float ones never do it.
    """
    fields = ("seq_len",) if name == "non_overlapping" else ("seq_len", "stride", "repeat_tail")
    ttt = {**scores.get("ttt", {}), "quantize_forward": None} if name == "sliding_ttt" else None
    return [scores[name]["tokens"], ttt, *(scores.get("eval", {}).get(field) for field in fields)]


def plain_score(model: GPT, stream: Stream, config: RunConfig, world: World = SINGLE) -> Score:
    """Return bits per byte over non-overlapping windows, computed by all ranks together, on every rank."""
    evaluator = Evaluator(model, stream, config, world=world)
    windows = evaluator.plain_windows()
    return evaluator.scorer(windows).score(Frozen(model).score, 0, len(windows))


def three_scores(
    model: GPT,
    stream: Stream,
    config: RunConfig,
    grid: Transform = None,
    *,
    world: World = SINGLE,
    resume: Resume | None = None,
    allow_illegal: bool = False,
) -> ThreeScores:
    """Return all three scores of a model, whose weights are unchanged afterwards; `grid` as in `Evaluator`.

    Raises PgolfError, before anything is scored, for test-time training that breaks the rules, unless
    `allow_illegal`. With `resume`, resumes from the states saved there.
    """
    need_legal(config.ttt, allow_illegal)
    evaluator = Evaluator(model, stream, config, grid, world)
    plain, sliding = evaluator.plain_windows(), evaluator.sliding_windows()
    runs: dict[str, Callable[..., Pass]] = {
        PLAIN: partial(evaluator.frozen, plain, PLAIN),
        SLIDING: partial(evaluator.frozen, sliding, SLIDING),
        TTT: partial(evaluator.adapted, sliding, config.ttt, TTT, allow_illegal=allow_illegal),
    }
    passes: dict[str, Pass] = {}
    seconds: dict[str, float] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        saved = None if resume is None else resume.of(name.replace(" + ", "_"))
        passes[name] = run(saved=saved)
        seconds[name] = time.perf_counter() - start + (0.0 if saved is None else saved.spent)
        console.logger.info("%s: done in %s", name, console.duration(seconds[name]))
    keys = ("non_overlapping", "sliding", "sliding_ttt")
    scorers = {key: result.scorer for key, result in zip(keys, passes.values(), strict=True)}
    return ThreeScores(
        passes[PLAIN].score, passes[SLIDING].score, passes[TTT], seconds, scorers, config.ttt.illegal
    )


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
