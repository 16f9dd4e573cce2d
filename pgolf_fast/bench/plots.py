"""Plots of a results file: the roofline, and each peer's time over ours (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path

from pgolf_fast.bench.drawing import Figure, png
from pgolf_fast.bench.store import Record, timed
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes


def _machine(records: Sequence[Record]) -> str:
    environment = records[-1]["environment"]
    return f"{environment.get('gpu') or environment.get('processor')}, torch {environment.get('torch')}"


def plot_roofline(records: Sequence[Record], path: Path) -> None:
    """Plot TFLOP/s against FLOP per byte for our ops, below the machine's limits."""
    ours = [r for r in timed(records) if r["peer"] == "ours"]
    if not ours:
        raise PgolfError("there is no time of our own ops to plot")

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        intensities = [r["flops"] / r["ideal_bytes"] for r in ours]
        low, high = min(intensities) / 2, max(intensities) * 2
        for flops, moved, source in {
            (r["roof_tflops"], r["roof_gbytes_per_second"], r["roof_source"]) for r in ours
        }:
            knee = 1e3 * flops / moved
            points = sorted({low, min(max(knee, low), high), high})
            limits = [min(flops, x * moved / 1e3) for x in points]
            axes.plot(points, limits, color="0.5", label=f"{flops:.3g} TFLOP/s, {moved:.4g} GB/s ({source})")
        for op in dict.fromkeys(r["op"] for r in ours):
            group = [r for r in ours if r["op"] == op]
            xs, ys = [r["flops"] / r["ideal_bytes"] for r in group], [r["tflops"] for r in group]
            axes.scatter(xs, ys, label=op, s=24)
        axes.set(xscale="log", yscale="log", title=_machine(records))
        axes.set(xlabel="FLOP per byte of ideal traffic", ylabel="TFLOP/s")
        axes.grid(alpha=0.3, which="both")
        axes.legend()

    write_bytes(path, png(paint, (8, 5.5)))


def plot_ratios(records: Sequence[Record], path: Path) -> None:
    """Plot the time of every peer over ours for each op, mode and size; above one, ours is faster."""
    groups: dict[str, dict[str, float]] = {}
    for record in timed(records):
        name = f"{record['op']}, {record['mode']}, {record['tokens']}"
        groups.setdefault(name, {})[record["peer"]] = record["median_ms"]
    groups = {name: times for name, times in groups.items() if "ours" in times and len(times) > 1}
    if not groups:
        raise PgolfError("there is no op with both our time and a peer's to plot")
    peers = list(dict.fromkeys(p for times in groups.values() for p in times if p != "ours"))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        thick = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            places = [row + i * thick for row, times in enumerate(groups.values()) if peer in times]
            ratios = [times[peer] / times["ours"] for times in groups.values() if peer in times]
            axes.barh(places, ratios, height=thick, label=peer)
        axes.axvline(1.0, color="0.5", linewidth=1)
        axes.set_yticks([row + 0.4 - thick / 2 for row in range(len(groups))], list(groups), fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="time of the peer / our time", title=_machine(records))
        axes.legend()

    height = 1.2 + 0.16 * sum(len(times) for times in groups.values())
    write_bytes(path, png(paint, (8, height)))
