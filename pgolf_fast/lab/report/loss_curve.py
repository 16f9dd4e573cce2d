"""Plot of a run: training loss, validation loss and learning rate by step."""

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

CEILING = 0.99  # quantile of the losses at which the axis ends, so that a spike does not flatten the curve


def draw_loss_curve(folder: RunFolder) -> Path | None:
    """Write loss.png to the run folder; without matplotlib or steps, log why and return None."""
    rows = folder.history()
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    if not steps:
        console.logger.warning("no loss curve: %s has no steps", folder.metrics_file)
        return None

    def paint(figure: Figure) -> None:
        paint_training(figure, steps, [row for row in rows if row["kind"] == "val"])
        figure.suptitle(label(folder.path.resolve().name))

    return write_png(folder.path / "loss.png", paint, (8, 4.5), "loss curve")


def paint_training(
    figure: Figure, steps: Mapping[int, Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> None:
    """Draw the loss and, below it, the learning-rate multiplier; rows are those of metrics.jsonl.

    A loss that is not finite leaves a gap in the curve and a cross at the bottom.
    """
    x = sorted(steps)
    losses = [as_float(steps[s].get("loss")) for s in x]
    axes, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot(x, losses, color="0.6", alpha=0.6, linewidth=0.7, label="batch")
    axes.plot(x, _smooth(losses), color="C0", label="smoothed")
    validated = [(row["step"], v) for row in validations if math.isfinite(v := as_float(row.get("loss")))]
    if validated:
        axes.plot(*zip(*validated, strict=True), "o", color="C1", markersize=5, label="validation")
    broken = [s for s, loss in zip(x, losses, strict=True) if not math.isfinite(loss)]
    if broken:
        at_bottom = axes.get_xaxis_transform()
        axes.plot(broken, [0.02] * len(broken), "x", color="C3", transform=at_bottom, label="not finite")
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        usual = sorted(finite)[int(CEILING * (len(finite) - 1))]
        low, high = min(finite), max(usual, finite[0], *(loss for _, loss in validated))
        margin = max(high - low, 0.1)
        axes.set_ylim(low - 0.05 * margin, high + 0.1 * margin)
    qat = next((s for s in x if steps[s].get("qat")), None)
    if qat is not None:
        axes.axvline(qat, color="C2", linewidth=0.8, linestyle="--", label="int6 from here")
    axes.set(ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    rate.plot(x, [as_float(steps[s].get("multiplier")) for s in x], color="C2", linewidth=1.2)
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.05))
    rate.grid(alpha=0.3)


def as_float(value: object) -> float:
    """Return a number from a log as a float, and NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Average exponentially, without start-up bias, over the finite values; NaN where a value is not."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight if math.isfinite(value) else math.nan)
    return smoothed
