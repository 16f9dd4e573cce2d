"""Compare groups of runs that differ only in their seed.

The challenge accepts a record that is better by at least 0.005 nats per token at p < 0.01.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError

MARGIN = 0.005


@dataclass(frozen=True)
class SeedGroup:
    """Mean and sample standard deviation of one score over runs, in bits per byte and in nats per token."""

    runs: int
    bpb: float
    bpb_deviation: float
    loss: float
    loss_deviation: float


def check_comparable(paths: Sequence[Path], scores: Sequence[dict]) -> None:
    """Raise PgolfError if a file is named twice, or if two runs were scored on different text."""
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise PgolfError(f"{path.parent} is named twice: a run counts once")
        seen.add(path.resolve())
    for path, run in zip(paths, scores, strict=True):
        for name in SCORES:
            ours, first = ((s[name]["tokens"], s[name]["bytes"]) for s in (run, scores[0]))
            if ours != first:
                raise PgolfError(
                    f"{path} scored {ours[0]:,} targets of {ours[1]:,} bytes, {paths[0]} {first[0]:,} of "
                    f"{first[1]:,}: compare runs on the same text"
                )


def group(scores: Sequence[dict], score: str) -> SeedGroup:
    """Summarize one score, a key of `SCORES`, over two or more runs."""
    columns = ([run[score][unit] for run in scores] for unit in ("bpb", "loss"))
    (bpb, bpb_deviation), (loss, loss_deviation) = (
        (statistics.fmean(values), statistics.stdev(values)) for values in columns
    )
    return SeedGroup(len(scores), bpb, bpb_deviation, loss, loss_deviation)


def group_table(groups: Mapping[str, Sequence[dict]]) -> Table:
    """Tabulate mean and deviation of every score; `groups` maps a label ("" for none) to scores files."""
    from pgolf_fast.evaluation.scores import labeled  # late: importing MARGIN must not load torch

    rows = []
    for label, scores in groups.items():
        for score, name in SCORES.items():
            one = group(scores, score)
            what = labeled(f"{name}, {label}" if label else name, _illegal(scores, score))
            units = (one.bpb, one.bpb_deviation, one.loss, one.loss_deviation)
            rows.append((what, one.runs, *(f"{value:.6f}" for value in units)))
    return Table(("score", "runs", "bpb", "deviation", "nats/token", "deviation"), rows)


def welch_table(ours: Sequence[dict], theirs: Sequence[dict], margin: float) -> Table:
    """Tabulate Welch's t-test of every score: `ours` better than `theirs` by more than `margin` nats."""
    from pgolf_fast.evaluation.scores import labeled
    from pgolf_fast.lab.compare.statistics import welch_test

    rows = []
    for score, name in SCORES.items():
        a, b = ([run[score]["loss"] for run in runs] for runs in (ours, theirs))
        test, gain = welch_test(a, b, margin), statistics.fmean(b) - statistics.fmean(a)
        title = labeled(name, _illegal([*ours, *theirs], score))
        rows.append((title, f"{gain:+.6f}", f"{test.t:.3f}", f"{test.degrees:.2f}", f"{test.p:.3g}"))
    return Table(("score", "nats gained", "t", "degrees", f"p of more than {margin:g}"), rows)


def _illegal(scores: Sequence[dict], score: str) -> bool:
    return score == "sliding_ttt" and any(run.get("illegal") for run in scores)
