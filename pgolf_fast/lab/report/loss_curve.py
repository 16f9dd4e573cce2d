"""The picture of a run: training loss, validation and learning rate over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast import console
from pgolf_fast.bench.drawing import label, write_png
from pgolf_fast.config.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CEILING = 0.99  # quantile of the losses that the picture has room for, besides the first: spikes are cut off


def draw_loss_curve(folder: RunFolder) -> Path | None:
    """Write loss.png beside the metrics; None, with a line saying why, without matplotlib."""
    rows = folder.history()
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    if not steps:
        console.logger.warning("no loss curve: %s holds no steps", folder.metrics_file)
        return None

    def paint(figure: Figure) -> None:
        paint_training(figure, steps, [row for row in rows if row["kind"] == "val"])
        figure.suptitle(label(folder.path.resolve().name))

    return write_png(folder.path / "loss.png", paint, (8, 4.5), "loss curve")


def paint_training(
    figure: Figure, steps: Mapping[int, Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> None:
    """Loss and, below it, learning-rate multiplier, on an empty figure; of rows as metrics.jsonl holds them.

    Losses that are not finite leave a gap, and a cross below.
    """
    x = sorted(steps)
    losses = [number(steps[s].get("loss")) for s in x]
    smoothed = _smooth(losses)
    axes, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot(x, losses, color="0.6", alpha=0.6, linewidth=0.7, label="batch")
    axes.plot(x, smoothed, color="C0", label="smoothed")
    checked = [(row["step"], loss) for row in validations if math.isfinite(loss := number(row.get("loss")))]
    if checked:
        axes.plot(*zip(*checked, strict=True), "o", color="C1", markersize=5, label="validation")
    broken = [s for s, loss in zip(x, losses, strict=True) if not math.isfinite(loss)]
    if broken:
        at_bottom = axes.get_xaxis_transform()
        axes.plot(broken, [0.02] * len(broken), "x", color="C3", transform=at_bottom, label="not finite")
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        usual = sorted(finite)[int(CEILING * (len(finite) - 1))]
        low, high = min(finite), max(usual, finite[0], *(loss for _, loss in checked))
        room = max(high - low, 0.1)
        axes.set_ylim(low - 0.05 * room, high + 0.1 * room)
    qat = next((s for s in x if steps[s].get("qat")), None)
    if qat is not None:
        axes.axvline(qat, color="C2", linewidth=0.8, linestyle="--", label="int6 from here")
    axes.set(ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    rate.plot(x, [number(steps[s].get("multiplier")) for s in x], color="C2", linewidth=1.2)
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.05))
    rate.grid(alpha=0.3)


def number(value: object) -> float:
    """A number from a log; NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential average without start-up bias, over the values that are finite; NaN for the others."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight if math.isfinite(value) else math.nan)
    return smoothed
