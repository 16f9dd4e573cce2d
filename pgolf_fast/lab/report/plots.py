"""Plots of a run: training, speed, scores, and the bytes of its artifact."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_fast import console
from pgolf_fast.bench.drawing import Axes, Figure, label, png, write_png
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.figures import shares
from pgolf_fast.evaluation.scores import TTT, labeled
from pgolf_fast.io import write_bytes
from pgolf_fast.lab.analysis.artifact_bytes import ArtifactTable, TensorBytes
from pgolf_fast.lab.analysis.summary import paint_bars

Steps = Mapping[int, Mapping[str, Any]]  # lines of metrics.jsonl by step
CEILING = 0.99  # quantile of the losses at which the axis ends, so that a spike does not flatten the curve
PACE_POINTS = 120  # at most
TREEMAP_SIZE = (13.0, 8.0)  # inches
# The light scheme of P. Tol, "Colour Schemes" (SRON 2021): distinct to color-blind readers, black text on it
COLORS = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00", "#DDDDDD")
LABELED = 0.004  # of the artifact; a smaller rectangle is too small for a label
_SLOT = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+)\.weight")
_SLOT_NAMES = {"attn.c_q": "attention Q", "attn.c_k": "attention K", "attn.c_v": "attention V"}
_SLOT_NAMES |= {"attn.proj": "attention out", "mlp.fc": "MLP up", "mlp.proj": "MLP down"}


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


def paint_training(figure: Figure, steps: Steps, validations: Sequence[Mapping[str, Any]]) -> None:
    """Draw the loss and, below it, the learning-rate multiplier.

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
    axes.legend()
    rate.plot(x, [as_float(steps[s].get("multiplier")) for s in x], color="C2", linewidth=1.2)
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.05))


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


def step_seconds(steps: Steps) -> dict[int, float]:
    """Return the seconds of each step whose predecessor was recorded too."""
    clock = {step: as_float(steps[step].get("elapsed")) for step in sorted(steps)}
    seconds = {step: end - clock[step - 1] for step, end in clock.items() if step - 1 in clock}
    return {step: elapsed for step, elapsed in seconds.items() if math.isfinite(elapsed) and elapsed > 0}


def pace_table(steps: Steps) -> Table:
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


def paint_pace(axes: Axes, steps: Steps) -> None:
    """Draw tokens per second by step, as medians over groups of adjacent steps."""
    rates = [(step, steps[step]["tokens"] / seconds) for step, seconds in step_seconds(steps).items()]
    groups = np.array_split(np.array(rates), min(PACE_POINTS, len(rates)))
    x, y = np.array([(group[:, 0].mean(), np.median(group[:, 1])) for group in groups]).T
    axes.plot(x, y, "-" if len(x) > 1 else "o")
    axes.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))


def draw_scores(scores: dict, path: Path) -> Path | None:
    """Plot the JSON of `pgolf eval` as a PNG; without matplotlib, log why and return None."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(2, 2).flatten()
        paint_parts(panels[:3], scores)
        paint_course(panels[3], scores)

    return write_png(path, paint, (11, 7), "plot of the scores")


def paint_parts(panels: Sequence[Axes], scores: dict) -> None:
    """Draw three panels: shares by class, bits by context, and bits by document length.

    Scores without test-time training have one curve fewer.
    """
    by_class, by_context, by_document = panels
    figures = scores["figures"]
    sliding, ttt = figures["sliding"], figures.get("sliding_ttt")
    own = shares(sliding["by_class"]).values()
    heights = {unit: [share[unit] for share in own] for unit in ("targets", "bytes", "loss")}
    labels = {"ylabel": "share", "title": "sliding, by class of target"}
    paint_bars(by_class, list(sliding["by_class"]), heights, None, **labels)
    _bits(by_context, {"non-overlapping": figures["non_overlapping"]["by_context"]})
    by_context.set(xlabel="tokens of context", title="by context")
    curves = {"sliding": sliding["by_document_tokens"]}
    if ttt is not None:
        curves[labeled(TTT, scores.get("illegal"))] = ttt["by_document_tokens"]
    _bits(by_document, curves)
    by_document.set(xlabel="tokens of the document", title="by document length")
    for axes in panels:
        axes.tick_params(axis="x", labelrotation=30)


def _bits(axes: Axes, curves: dict[str, dict]) -> None:
    for name, parts in curves.items():
        bpb = [math.nan if p["bpb"] is None else p["bpb"] for p in parts.values()]
        axes.plot(list(parts), bpb, "o-", label=name)
    axes.set(ylabel="bits per byte")
    axes.legend()


def paint_course(axes: Axes, scores: dict) -> None:
    """Draw the running bits per byte by chunk of test-time training, and the sliding score without it."""
    course = scores["ttt_bpb_by_chunk"]
    name = f"{labeled(TTT, scores.get('illegal'))}, so far"
    axes.plot(range(1, len(course) + 1), course, "o-" if len(course) == 1 else "-", label=name)
    axes.axhline(scores["sliding"]["bpb"], color="0.5", linestyle=":", label="sliding, whole stream")
    axes.set(xlabel="chunk", ylabel="bits per byte", title="test-time training")
    axes.legend()


def plot_treemap(table: ArtifactTable, path: Path) -> None:
    """Write the treemap as a PNG. Raises PgolfError if matplotlib or squarify is not installed."""
    write_bytes(path, png(lambda figure: paint_treemap(figure, table), TREEMAP_SIZE))


def paint_treemap(figure: Figure, table: ArtifactTable) -> None:
    """Draw one rectangle per tensor, in proportion to its stored bytes and in one color per group.

    Groups are bank matrices by kind, tables, scales, ... Raises PgolfError if squarify is not installed.
    """
    try:
        import squarify
    except ImportError as error:
        raise PgolfError("the treemap needs squarify: pip install 'pgolf-fast[plot]'") from error
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter

    short = EngFormatter("B", places=1)  # 123456 -> 123.5 kB
    total = table.total_bytes
    groups: dict[str, list[tuple[str, float]]] = {}
    for tensor in sorted(table.tensors, key=lambda tensor: -tensor.stored_bytes):
        group, name = _group_and_label(tensor)
        groups.setdefault(group, []).append((name, tensor.stored_bytes))
    groups["header"] = [("header", table.header_bytes)]
    colors = {name: COLORS[min(i, len(COLORS) - 1)] for i, name in enumerate(groups)}
    tiles = [(group, name, size) for group, members in groups.items() for name, size in members]
    axes = figure.subplots()
    width = 100 * TREEMAP_SIZE[0] / TREEMAP_SIZE[1]  # rectangles are squarified in the shape of the figure
    areas, shades = [max(size, 1e-3) for _, _, size in tiles], [colors[group] for group, _, _ in tiles]
    labels = [f"{name}\n{short(size)}" if size > LABELED * total else "" for _, name, size in tiles]
    bars, texts = {"edgecolor": axes.get_facecolor(), "linewidth": 0.8}, {"fontsize": 7, "color": "black"}
    kinds = {"bar_kwargs": bars, "text_kwargs": texts}
    squarify.plot(areas, norm_x=width, color=shades, label=labels, ax=axes, **kinds)
    axes.set(xlim=(0, width), ylim=(0, 100))
    axes.axis("off")
    axes.set_title(f"{table.path.name}: {total:,} bytes", fontsize=13, fontweight="bold")
    handles = []
    for group, members in groups.items():
        size = sum(size for _, size in members)
        handles.append(Patch(color=colors[group], label=f"{group}  {short(size)}  {size / total:.1%}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def _group_and_label(tensor: TensorBytes) -> tuple[str, str]:
    slot = _SLOT.match(tensor.name)
    if tensor.section == "codes" and slot:
        return _SLOT_NAMES.get(slot[2], slot[2]), f"layer {slot[1]}"
    name = tensor.name.removesuffix(".q").removesuffix(".scale").removesuffix(".weight")
    return {"embeddings": "tables", "small": "small tensors"}.get(tensor.section, tensor.section), name
