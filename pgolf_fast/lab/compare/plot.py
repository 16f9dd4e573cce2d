"""Plot an ablation: every seed's difference from the baseline, and the intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf_fast.bench.drawing import write_png
from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.lab.compare.plan import BASELINE
from pgolf_fast.lab.compare.table import FinishedRun, VariantScore

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_ablation(rows: Sequence[VariantScore], runs: Sequence[FinishedRun], path: Path) -> Path | None:
    """Write a PNG with one panel per budget and score.

    Returns None if nothing is compared or matplotlib is missing (with a warning).
    """
    compared = [row for row in rows if row.difference is not None]
    if not compared:
        return None
    budgets, scores, names = (
        list(dict.fromkeys(getattr(row, field) for row in compared))
        for field in ("budget", "score", "variant")
    )
    size = (2 + 3.6 * len(scores), len(budgets) * (1.4 + 0.45 * len(names)))
    return write_png(
        path, lambda figure: _paint(figure, compared, runs, budgets, scores, names), size, "picture"
    )


def _paint(
    figure: Figure,
    compared: Sequence[VariantScore],
    runs: Sequence[FinishedRun],
    budgets: list[str],
    scores: list[str],
    names: list[str],
) -> None:
    """Draw one row of panels per budget, one column per score, one line per variant."""
    grid = figure.subplots(len(budgets), len(scores), sharex=True, sharey=True, squeeze=False)
    for row in compared:
        axes = grid[budgets.index(row.budget)][scores.index(row.score)]
        y, d = names.index(row.variant), row.difference
        assert d is not None
        points = seed_differences(row, runs)
        axes.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="D", color="C0", capsize=4)
        axes.plot(points, [y] * len(points), "o", color="0.55", markersize=4, zorder=3)
    grid[0][0].invert_yaxis()  # the axes are shared, so this puts every panel in the order of the table
    for i, budget in enumerate(budgets):
        for j, score in enumerate(scores):
            axes = grid[i][j]
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.set(title=f"{SCORES[score]}, equal {budget}")
            axes.set_yticks(range(len(names)), names)
            axes.margins(y=0.3)
            axes.grid(alpha=0.3, axis="x")
    figure.supxlabel("bits per byte above the baseline (left is better); bars: 95 % intervals, dots: seeds")


def seed_differences(row: VariantScore, runs: Sequence[FinishedRun]) -> list[float]:
    """Return variant - baseline for each seed that both have."""
    bpb = {
        (run.job.variant, run.job.seed): run.bpb(row.score)
        for run in runs
        if run.job.budget == row.budget and row.score in run.result["scores"]
    }
    shared = [seed for seed in row.seeds if (BASELINE, seed) in bpb]
    return [bpb[row.variant, seed] - bpb[BASELINE, seed] for seed in shared]
