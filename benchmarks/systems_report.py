"""What `study_systems.py` found, as text and as a picture."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from inner_step import HEADER, Kept

from pgolf_fast import console
from pgolf_fast.bench import drawing
from pgolf_fast.io import write_bytes
from pgolf_fast.lab.compare.ablation.plan import BASELINE
from pgolf_fast.lab.compare.ablation.statistics import Interval, over_documents, over_seeds
from pgolf_fast.lab.compare.ablation.table import Row, Run, commits, print_table, show_interval

# Of exp101: 7,020 steps of 786,432 tokens, 26,960,991 parameters; 4 epochs on 62 M validation tokens
TOKENS_A_PARAMETER, META_STEPS, ADAPTED = 205, 1140, 0.045


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
    steps: int
    """Of the variant, in the time of the baseline's run."""


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
    kept: Sequence[tuple[int, Kept]],
    runs: Sequence[Run],
) -> str:
    """The tables and what they say."""
    seeds = ", ".join(map(str, settings["seeds"]))
    compared = dict.fromkeys(row.variant for row in rows if row.difference is not None)
    model = f"small ({settings['parameters']:,} parameters)"
    parts = [
        f"Preset {', '.join(filter(None, (model, settings['base'])))}, {settings['steps']:,} steps of "
        f"{settings['batch_tokens']:,} tokens of {settings['data']}, seeds {seeds}.\n"
        f"Scores are of the int6 artifacts on {settings['val_tokens']:,} validation tokens.\n"
        f"Command: {settings['command']}",
        "AT EQUAL STEPS\n" + print_table(rows, timed=False),
        "\n".join(f"{row}: {settings['questions'][row]}" for row in compared),
    ]
    if timing is not None:
        told = _timing(timing, settings)
        parts.append("AT EQUAL TIME\n" + told + "\n\n" + print_table(timing.rows, timed=False))
    if kept:
        lines = console.table([(f"seed {seed}", *step.row()) for seed, step in kept], HEADER)
        parts.append("THE INNER STEP OF FOMAML (benchmarks/inner_step.py), on the final weights\n" + lines)
    if gains:
        parts.append("(d) TEST-TIME TRAINING AND THE SLIDING WINDOW\n" + _gains(gains))
    every = [*rows, *(timing.rows if timing is not None else [])]
    parts.append(_statement(settings, every, gains, runs))
    return "\n\n".join(parts) + "\n"


def _timing(timing: Timing, settings: dict[str, Any]) -> str:
    low, high = timing.quartiles
    return (
        f"A step with FOMAML takes the time of {timing.plain_steps:.3f} without (quartiles {low:.3f} to "
        f"{high:.3f}); the baseline has {settings['meta_steps']} of them.\nThe variant makes as many more "
        f"steps as that leaves time for: {timing.steps} instead of {settings['steps']}. The baseline's runs "
        "are those above."
    )


def _gains(gains: dict[str, Gain]) -> str:
    rows = []
    for name, gain in gains.items():
        by_seed = "; ".join(f"{i.mean:+.4f} ({i.low:+.4f} to {i.high:+.4f})" for i in gain.by_seed.values())
        rows.append((name, *show_interval(gain.over_seeds), by_seed))
    header = ("difference in bpb", "mean", "95 % over seeds", "by seed (95 % over documents)")
    lines = [console.table(rows, header)]
    if {"sliding window", "both, as published"} <= gains.keys():
        window, both = (gains[name].by_seed for name in ("sliding window", "both, as published"))
        shares = [window[seed].mean / both[seed].mean for seed in both if seed in window]
        by_seed = ", ".join(f"{share:.1%}" for share in shares)
        told = (
            f"The sliding window alone is {statistics.fmean(shares):.1%} of the gain of TTT as published (by "
            f"seed {by_seed}): SGD with sliding windows against windows that do not overlap, without it."
        )
        lines += ["", textwrap.fill(told, 110)]
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
    says = [
        f"{settings['questions'][row.variant]}, equal {row.budget}: {verdict(row.difference)}."
        for row in rows
        if row.difference is not None and row.score == "sliding"
    ]
    says += [f"{name}: {verdict(g.over_seeds)}." for name, g in gains.items() if g.over_seeds is not None]
    trained = settings["steps"] * settings["batch_tokens"]
    cannot = [
        f"These models saw {trained / settings['parameters']:.2f} tokens for each parameter, the originals "
        f"{TOKENS_A_PARAMETER}. What a hash table or a meta step is worth may change with size and training.",
        "Seeds are of the initial weights. All runs read the same text in the same order and are scored on "
        "one text. Intervals over seeds do not cover other text; those over documents, not other seeds.",
        f"With {len(settings['seeds'])} seeds intervals are wide: what they do not show may be there. Of the "
        f"{len(says)} intervals of this page one in twenty misses by chance.",
    ]
    if settings["meta_every"]:
        cannot.append(
            f"FOMAML acts in {settings['meta_steps']} of {settings['steps']:,} steps here, once in "
            f"{settings['meta_every']} while the learning rate is high, with the stated weight of 0.5; there "
            f"in {META_STEPS:,} of 7,020, once in 4, with an eighth of it. The inner rate is the original's: "
            "what a step of it does to a model of that size and training is not known."
        )
    if "both, as published" in gains:
        cannot.append(
            f"SGD learns from {settings['adapted_tokens'] / trained:.0%} as many tokens as training did, "
            f"epochs counted; there from {ADAPTED:.1%}. What it gains here may be training that was not "
            "finished."
        )
    if gains:
        cannot.append(
            "Windows are of 256 tokens here, of 2,048 there: what sliding them gains depends on that."
        )
    if len(made_by := commits(runs)) > 1:
        cannot.append(f"The runs were made by commits {', '.join(made_by)}.")
    told = {"WHAT THESE SIZES SAY": says, "WHAT THEY CANNOT SAY": cannot}
    return "\n".join(line for title, items in told.items() for line in (title, *map(_item, items)))


def _item(words: str) -> str:
    return textwrap.fill(words, 110, initial_indent="- ", subsequent_indent="  ")


def write_plot(rows: Sequence[Row], gains: dict[str, Gain], runs: Sequence[Run], path: Path) -> None:
    """Variants beside the baseline, and passes beside each other: means, intervals over seeds, seeds."""
    bpb = {(r.job.budget, r.job.variant, r.job.seed): r.bpb("sliding") for r in runs if r.result["scores"]}
    compared = [row for row in rows if row.difference is not None and row.score == "sliding"]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for y, row in enumerate(compared):
            shared = [seed for seed in row.seeds if ("steps", BASELINE, seed) in bpb]
            points = [bpb[row.budget, row.variant, s] - bpb["steps", BASELINE, s] for s in shared]
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
            axes.locator_params(axis="x", nbins=6)

    write_bytes(path, drawing.png(paint, (13, 4.8)))


def _interval(axes: Any, y: int, points: list[float], interval: Interval | None) -> None:
    if interval is not None:
        ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
        axes.errorbar(interval.mean, y, xerr=ends, fmt="D", color="#2c6fbb", capsize=4)
    axes.plot(points, [y] * len(points), "o", color="0.55", markersize=4)
