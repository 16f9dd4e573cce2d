"""Training speed from the times of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pgolf_fast.console import Table
from pgolf_fast.lab.report.loss_curve import as_float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 120  # at most, in the plot


def step_seconds(steps: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """Return the seconds of each step whose predecessor was recorded too."""
    seconds = {}
    for step in sorted(steps):
        if step - 1 in steps:
            elapsed = as_float(steps[step].get("elapsed")) - as_float(steps[step - 1].get("elapsed"))
            if math.isfinite(elapsed) and elapsed > 0:
                seconds[step] = elapsed
    return seconds


def pace_table(steps: Mapping[int, Mapping[str, Any]]) -> Table:
    """Tabulate milliseconds and tokens/s by kind of step; without times, the table has no rows."""
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
            times = np.array([seconds[step] for step in chosen])
            low, middle, high = (f"{1e3 * q:,.1f}" for q in np.quantile(times, (0.1, 0.5, 0.9)))
            rate = sum(steps[step]["tokens"] for step in chosen) / times.sum()
            rows.append((kind, f"{len(chosen):,}", middle, low, high, f"{rate:,.0f}"))
    return Table(("steps", "count", "median ms", "10 %", "90 %", "tokens/s"), rows)


def paint_pace(figure: Figure, steps: Mapping[int, Mapping[str, Any]]) -> None:
    """Draw tokens per second by step, as medians over groups of adjacent steps."""
    seconds = step_seconds(steps)
    groups = np.array_split(np.array(list(seconds)), min(POINTS, len(seconds)))
    x = [float(group.mean()) for group in groups]
    rates = {step: steps[step]["tokens"] / seconds[step] for step in seconds}
    y = [float(np.median([rates[int(step)] for step in group])) for group in groups]
    axes = figure.subplots()
    axes.plot(x, y, "-" if len(x) > 1 else "o")
    axes.set(xlabel="step", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
