"""Plot of a scores file: bits by class, context, document length and chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf_fast.bench.drawing import write_png
from pgolf_fast.evaluation.scores import TTT, labeled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_scores(scores: dict, path: Path) -> Path | None:
    """Plot the JSON of `pgolf eval` as a PNG; without matplotlib, log why and return None."""

    def paint(figure: Figure) -> None:
        (by_class, by_context), (by_document, course) = figure.subplots(2, 2)
        paint_parts((by_class, by_context, by_document), scores)
        paint_course(course, scores)

    return write_png(path, paint, (11, 7), "plot of the scores")


def paint_parts(panels: Sequence[Axes], scores: dict) -> None:
    """Draw three panels: shares by class, bits by context, and bits by document length.

    Scores without test-time training have one curve fewer.
    """
    by_class, by_context, by_document = panels
    figures = scores["figures"]
    sliding, ttt = figures["sliding"], figures.get("sliding_ttt")
    _classes(by_class, sliding["by_class"])
    _bits(by_context, {"non-overlapping": figures["non_overlapping"]["by_context"]})
    by_context.set(xlabel="tokens of context", title="by context")
    curves = {"sliding": sliding["by_document_tokens"]}
    if ttt is not None:
        curves[labeled(TTT, scores.get("illegal"))] = ttt["by_document_tokens"]
    _bits(by_document, curves)
    by_document.set(xlabel="tokens of the document", title="by document length")


def _classes(axes: Axes, parts: dict) -> None:
    total = {unit: sum(p[unit] for p in parts.values()) for unit in ("tokens", "bytes")}
    nats = {name: p["tokens"] * (p["loss"] or 0.0) for name, p in parts.items()}
    shares = {
        "targets": [p["tokens"] / total["tokens"] for p in parts.values()],
        "bytes": [p["bytes"] / max(total["bytes"], 1) for p in parts.values()],
        "loss": [n / sum(nats.values()) for n in nats.values()],
    }
    for i, (label, values) in enumerate(shares.items()):
        axes.bar([x + 0.27 * (i - 1) for x in range(len(parts))], values, 0.27, label=label)
    _name_ticks(axes, parts)
    axes.set(ylabel="share", title="sliding, by class of target")
    axes.legend()


def _bits(axes: Axes, curves: dict[str, dict]) -> None:
    for label, parts in curves.items():
        bpb = [math.nan if p["bpb"] is None else p["bpb"] for p in parts.values()]
        axes.plot(range(len(parts)), bpb, "o-", label=label)
        _name_ticks(axes, parts)
    axes.set(ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()


def _name_ticks(axes: Axes, parts: dict) -> None:
    axes.set_xticks(range(len(parts)), list(parts), rotation=30, horizontalalignment="right")


def paint_course(axes: Axes, scores: dict) -> None:
    """Draw the running bits per byte by chunk of test-time training, and the sliding score without it."""
    course = scores["ttt_bpb_by_chunk"]
    label = f"{labeled(TTT, scores.get('illegal'))}, so far"
    axes.plot(range(1, len(course) + 1), course, "o-" if len(course) == 1 else "-", label=label)
    axes.axhline(scores["sliding"]["bpb"], color="0.5", linestyle=":", label="sliding, whole stream")
    axes.set(xlabel="chunk", ylabel="bits per byte", title="test-time training")
    axes.grid(alpha=0.3)
    axes.legend()
