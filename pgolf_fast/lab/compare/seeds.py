"""What several runs of one recipe say together: mean, deviation, and whether they beat another recipe's.

The challenge takes a record that is better by 0.005 nats a token or more at p < 0.01.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.scores import mark

MARGIN = 0.005


@dataclass(frozen=True)
class Group:
    """Mean and sample standard deviation of one score over runs, in bits per byte and in nats per token."""

    runs: int
    bpb: float
    bpb_deviation: float
    loss: float
    loss_deviation: float


@dataclass(frozen=True)
class Welch:
    """Welch's t-test of "the mean of b exceeds that of a by more than a margin", one-sided."""

    t: float
    degrees: float
    p: float


def check_comparable(paths: Sequence[Path], stories: Sequence[dict]) -> None:
    """Raises PgolfError where a file is named twice, or two runs were scored on different text."""
    if len({path.resolve() for path in paths}) < len(paths):
        twice = next(p for i, p in enumerate(paths) if p.resolve() in {q.resolve() for q in paths[:i]})
        raise PgolfError(f"{twice.parent} is named twice: a run counts once")
    for path, story in zip(paths, stories, strict=True):
        for name in SCORES:
            ours, first = ((s[name]["tokens"], s[name]["bytes"]) for s in (story, stories[0]))
            if ours != first:
                raise PgolfError(
                    f"{path} scored {ours[0]:,} targets of {ours[1]:,} bytes, {paths[0]} {first[0]:,} of "
                    f"{first[1]:,}: compare runs on the same text"
                )


def group(stories: Sequence[dict], score: str) -> Group:
    """One score, a key of `SCORES`, over two or more runs."""
    columns = ([story[score][unit] for story in stories] for unit in ("bpb", "loss"))
    (bpb, bpb_deviation), (loss, loss_deviation) = (
        (statistics.fmean(values), statistics.stdev(values)) for values in columns
    )
    return Group(len(stories), bpb, bpb_deviation, loss, loss_deviation)


def welch(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> Welch:
    """The chance p of such a difference or a greater one if b were greater than a by `margin` only.

    The two may have different variances and numbers of runs (Welch 1947). Raises PgolfError for fewer than
    two runs in a group, or where neither group's runs differ.
    """
    if min(len(a), len(b)) < 2:
        raise PgolfError("a deviation needs at least 2 runs in each group")
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    variance = sum(parts)
    if variance == 0:
        raise PgolfError("all runs of a group have the same score: are they of different seeds?")
    t = (statistics.fmean(b) - statistics.fmean(a) - margin) / math.sqrt(variance)
    by_group = zip(parts, (a, b), strict=True)
    degrees = variance**2 / sum(part**2 / (len(values) - 1) for part, values in by_group)
    return Welch(t, degrees, student_tail(t, degrees))


def student_tail(t: float, degrees: float) -> float:
    """The chance that Student's t with so many degrees of freedom exceeds `t`."""
    half = 0.5 * incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return half if t >= 0 else 1 - half


def student_quantile(p: float, degrees: float) -> float:
    """The t that Student's t with so many degrees of freedom stays below with chance `p`, 0.5 <= p < 1."""
    low, high = 0.0, 1.0
    while student_tail(high, degrees) > 1 - p:
        low, high = high, 2 * high
    for _ in range(60):  # halvings: to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, degrees) > 1 - p else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = 1.0
    for m in range(200, 0, -1):  # from the inside out
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    return math.exp(front) / (a * fraction)


def group_table(groups: Mapping[str, Sequence[dict]]) -> Table:
    """Tabulate mean and deviation of every score, for groups of runs by name ("" is the recipe itself)."""
    rows = []
    for name, scores in groups.items():
        for score, title in SCORES.items():
            one = group(scores, score)
            illegal = score == "sliding_ttt" and any(run.get("illegal") for run in scores)
            what = mark(f"{title}, {name}" if name else title, illegal)
            units = (one.bpb, one.bpb_deviation, one.loss, one.loss_deviation)
            rows.append((what, str(one.runs), *(f"{value:.6f}" for value in units)))
    return Table(("score", "runs", "bpb", "deviation", "nats/token", "deviation"), rows)


def welch_table(ours: Sequence[dict], theirs: Sequence[dict], margin: float) -> Table:
    """Tabulate Welch's test of a gain of more than `margin` nats per token, for every score."""
    rows = []
    for score, name in SCORES.items():
        title = mark(name, score == "sliding_ttt" and any(run.get("illegal") for run in (*ours, *theirs)))
        a, b = ([run[score]["loss"] for run in runs] for runs in (ours, theirs))
        test = welch(a, b, margin)
        gain = statistics.fmean(b) - statistics.fmean(a)
        rows.append((title, f"{gain:+.6f}", f"{test.t:.3f}", f"{test.degrees:.2f}", f"{test.p:.3g}"))
    return Table(("score", "nats gained", "t", "degrees", f"p of more than {margin:g}"), rows)
