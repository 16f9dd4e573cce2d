"""What `study_systems.py` found, as text and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_fast import drawing, report
from pgolf_fast.ablation.statistics import Interval, over_documents, over_seeds
from pgolf_fast.ablation.table import Row, Run, commits, print_table, show_interval
from pgolf_fast.files import write_bytes

TOKENS_A_PARAMETER = 205  # of exp101: 7,020 steps of 786,432 tokens, 26,960,991 parameters


@dataclass(frozen=True)
class Gain:
    """A difference between two passes over the same text: for each seed over documents, and over seeds."""

    by_seed: dict[int, Interval]
    over_seeds: Interval | None

    @property
    def mean(self) -> float:
        return sum(interval.mean for interval in self.by_seed.values()) / len(self.by_seed)


@dataclass(frozen=True)
class Timing:
    """The comparison at equal time, and the measured costs behind it."""

    rows: list[Row]
    plain_steps: float
    """That a step with FOMAML takes the time of."""
    quartiles: tuple[float, ...]
    meta_steps: int
    """How often FOMAML acts in a run."""


def make_gain(pairs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Gain:
    """From (nats before, nats after, text bytes) by document, for each seed."""
    by_seed = {seed: over_documents(*pair) for seed, pair in pairs.items()}
    if len(pairs) < 2:
        return Gain(by_seed, None)
    before, after = (
        [pair[which].sum() / (math.log(2) * pair[2].sum()) for pair in pairs.values()] for which in (0, 1)
    )
    return Gain(by_seed, over_seeds(before, after))


def text(
    settings: dict[str, Any],
    rows: Sequence[Row],
    timing: Timing | None,
    gains: dict[str, Gain],
    runs: Sequence[Run],
) -> str:
    """The tables and what they say."""
    seeds = ", ".join(map(str, settings["seeds"]))
    parts = [
        f"Preset small ({settings['parameters']:,} parameters), {settings['steps']:,} steps of "
        f"{settings['batch_tokens']:,} tokens of {settings['data']}, seeds {seeds}.\n"
        f"Scores are of the int6 artifacts on {settings['val_tokens']:,} validation tokens.",
        "AT EQUAL STEPS\n" + print_table(rows),
        "\n".join(f"{name}: {question}" for name, question in settings["questions"].items()),
    ]
    if timing is not None:
        parts.append("AT EQUAL TIME\n" + _timing(timing) + "\n\n" + print_table(timing.rows))
    if gains:
        parts.append("(d) TEST-TIME TRAINING AND THE SLIDING WINDOW\n" + _gains(gains))
    every = [*rows, *(timing.rows if timing is not None else [])]
    parts.append(_statement(settings, every, gains, runs))
    return "\n\n".join(parts) + "\n"


def _timing(timing: Timing) -> str:
    low, high = timing.quartiles
    return (
        f"A step with FOMAML takes the time of {timing.plain_steps:.3f} without (quartiles {low:.3f} to "
        f"{high:.3f}); the baseline has {timing.meta_steps} of them.\nThe variant makes as many more "
        "steps as that leaves time for. The baseline's runs are those above."
    )


def _gains(gains: dict[str, Gain]) -> str:
    rows = []
    for name, gain in gains.items():
        by_seed = "; ".join(f"{i.mean:+.4f} ({i.low:+.4f} to {i.high:+.4f})" for i in gain.by_seed.values())
        rows.append((name, *show_interval(gain.over_seeds), by_seed))
    header = ("difference in bpb", "mean", "95 % over seeds", "by seed (95 % over documents)")
    lines = [report.table(rows, header)]
    if {"sliding window", "both, as published"} <= gains.keys():
        share = gains["sliding window"].mean / gains["both, as published"].mean
        lines.append(
            f"\nThe sliding window alone is {share:.1%} of the gain of TTT as published: SGD with sliding "
            "windows against windows that do not overlap, without it."
        )
    return "\n".join(lines)


def verdict(interval: Interval) -> str:
    """What an interval of a difference says, in words."""
    mean, shown = f"{abs(interval.mean):.5f} bpb", " ".join(show_interval(interval)[1:])
    if interval.low > 0:
        return f"worse by {mean} ({shown})"
    if interval.high < 0:
        return f"better by {mean} ({shown})"
    largest = max(abs(interval.low), abs(interval.high))
    return f"no difference shown ({shown}); one above {largest:.4f} bpb either way is unlikely"


def _statement(
    settings: dict[str, Any], rows: Sequence[Row], gains: dict[str, Gain], runs: Sequence[Run]
) -> str:
    lines = ["WHAT THESE SIZES SAY"]
    for row in rows:
        if row.difference is not None and row.score == "sliding":
            question = settings["questions"][row.variant]
            lines.append(f"- {question}, equal {row.budget}: {verdict(row.difference)}.")
    for name, gain in gains.items():
        if gain.over_seeds is not None:
            lines.append(f"- {name}: {verdict(gain.over_seeds)}.")
    tokens = settings["steps"] * settings["batch_tokens"] / settings["parameters"]
    lines += [
        "WHAT THEY CANNOT SAY",
        f"- These models saw {tokens:.1f} tokens for each parameter, the originals {TOKENS_A_PARAMETER}.",
        "- What a hash table or a meta step is worth may change with size and with training.",
        "- Seeds are of the initial weights. All runs read the same text in the same order and are scored on",
        "  one text. Intervals over seeds do not cover other text; those over documents, not other seeds.",
        f"- With {len(settings['seeds'])} seeds intervals are wide: what they do not show may be there.",
        "- FOMAML has the share of the work that it had: every 32nd step here, every 4th on one of 8",
        "  micro-batches there. That is 8 times fewer meta steps, each of 8 times the weight.",
        "- Windows are of 256 tokens here and of 2,048 there: what sliding them gains depends on that.",
    ]
    if len(made_by := commits(runs)) > 1:
        lines.append(f"The runs were made by commits {', '.join(made_by)}.")
    return "\n".join(lines)


def write_plot(rows: Sequence[Row], gains: dict[str, Gain], runs: Sequence[Run], path: Path) -> None:
    """Variants beside the baseline, and passes beside each other: means, intervals over seeds, seeds."""
    bpb = {(r.job.budget, r.job.variant, r.job.seed): r.bpb("sliding") for r in runs if r.result["scores"]}
    compared = [row for row in rows if row.difference is not None and row.score == "sliding"]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for y, row in enumerate(compared):
            base = {seed: bpb["steps", "baseline", seed] for seed in row.seeds}
            points = [bpb[row.budget, row.variant, seed] - base[seed] for seed in row.seeds]
            _interval(left, y, points, row.difference)
        left.set_yticks(range(len(compared)), [f"{row.variant}\nequal {row.budget}" for row in compared])
        left.set(title="variants, sliding windows", xlabel="bpb above the baseline (left is better)")
        for y, gain in enumerate(gains.values()):
            _interval(right, y, [interval.mean for interval in gain.by_seed.values()], gain.over_seeds)
        right.set_yticks(range(len(gains)), list(gains))
        right.set(
            title="test-time training and the sliding window", xlabel="difference in bpb (left is better)"
        )
        for axes in (left, right):
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.grid(alpha=0.3, axis="x")
            axes.invert_yaxis()

    write_bytes(path, drawing.png(paint, (13, 4.8)))


def _interval(axes: Any, y: int, points: list[float], interval: Interval | None) -> None:
    if interval is not None:
        ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
        axes.errorbar(interval.mean, y, xerr=ends, fmt="D", color="#2c6fbb", capsize=4)
    axes.plot(points, [y] * len(points), "o", color="0.55", markersize=4)
