"""How fast a run trained, from the times of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pgolf_fast.lab.report.loss_curve import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 120  # of the picture at most


def step_seconds(steps: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """Seconds of each step whose predecessor is on record too."""
    found = {}
    for step in sorted(steps):
        if step - 1 in steps:
            took = number(steps[step].get("elapsed")) - number(steps[step - 1].get("elapsed"))
            if math.isfinite(took) and took > 0:
                found[step] = took
    return found


def tokens_of(row: Mapping[str, Any], batch_tokens: int) -> int:
    """Of one step; runs of earlier versions do not say, and have batches of one size."""
    return int(row.get("tokens") or batch_tokens)


def pace_rows(steps: Mapping[int, Mapping[str, Any]], batch_tokens: int) -> tuple[tuple[str, ...], ...]:
    """(kind of step, count, median ms, 10 % and 90 % points, tokens/s of them all); empty without times."""
    seconds = step_seconds(steps)
    meta = {step for step in seconds if steps[step].get("meta_loss") is not None}
    reptile = {step for step in seconds if steps[step].get("reptile")}
    kinds = {"all": set(seconds)}
    if meta or reptile:
        plain = set(seconds) - meta - reptile
        kinds |= {"plain": plain, "with a meta step": meta, "Reptile, outer": reptile}
    rows = []
    for kind, chosen in kinds.items():
        if chosen:
            taken = np.array([seconds[step] for step in chosen])
            low, middle, high = (float(q) for q in np.quantile(taken, (0.1, 0.5, 0.9)))
            times = (f"{1e3 * t:,.1f}" for t in (middle, low, high))
            rate = sum(tokens_of(steps[step], batch_tokens) for step in chosen) / float(taken.sum())
            rows.append((kind, f"{len(chosen):,}", *times, f"{rate:,.0f}"))
    return tuple(rows)


def paint_pace(figure: Figure, steps: Mapping[int, Mapping[str, Any]], batch_tokens: int) -> None:
    """Tokens per second by step: medians of as many neighbors as leave POINTS points."""
    seconds = step_seconds(steps)
    groups = np.array_split(np.array(list(seconds)), min(POINTS, len(seconds)))
    x = [float(group.mean()) for group in groups]
    rates = {step: tokens_of(steps[step], batch_tokens) / seconds[step] for step in seconds}
    y = [float(np.median([rates[int(step)] for step in group])) for group in groups]
    axes = figure.subplots()
    axes.plot(x, y, "-" if len(x) > 1 else "o")
    axes.set(xlabel="step", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
