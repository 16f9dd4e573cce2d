"""The picture of a run: training loss, validation and learning rate over tokens or steps."""

from __future__ import annotations

from pathlib import Path

from pgolf_fast import report
from pgolf_fast.files import atomic_path
from pgolf_fast.train.run_folder import RunFolder


def draw_loss_curve(folder: RunFolder) -> Path | None:
    """Write loss.png beside the metrics; None, with a line saying why, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        report.logger.warning("no loss curve: matplotlib is missing (pip install 'pgolf-fast[plot]')")
        return None
    rows = report.read_metrics(folder.metrics_file)
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    if not steps:
        report.logger.warning("no loss curve: %s holds no steps", folder.metrics_file)
        return None
    x = sorted(steps)
    losses = [steps[s]["loss"] for s in x]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(x, losses, color="0.75", linewidth=0.8, label="batch")
    axes.plot(x, _smooth(losses), color="C0", label="smoothed")
    values = [row for row in rows if row["kind"] == "val"]
    if values:
        axes.plot(
            [row["step"] for row in values],
            [row["loss"] for row in values],
            "o",
            color="C3",
            label="validation",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.path.name)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(x, [steps[s]["multiplier"] for s in x], color="C2", linestyle=":", linewidth=1)
    rate.set(ylabel="learning-rate multiplier", ylim=(0, 1.05))
    qat = next((s for s in x if steps[s]["qat"]), None)
    if qat is not None:
        axes.axvline(qat, color="C4", linewidth=0.8, label="int6 from here")
    axes.legend()
    path = folder.path / "loss.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential average without start-up bias."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
