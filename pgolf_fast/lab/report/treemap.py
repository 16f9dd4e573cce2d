"""Treemap of an artifact: one rectangle per tensor, with areas in proportion to the stored bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf_fast.bench import drawing
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes
from pgolf_fast.lab.analysis.artifact_bytes import ArtifactTable, TensorBytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = WIDTH, HEIGHT = 13.0, 8.0  # inches
# The light scheme of P. Tol, "Colour Schemes" (SRON 2021): distinct to color-blind readers, black text on it
COLORS = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00")
REST, REST_COLOR = "the rest", "#DDDDDD"
SMALL = 0.02  # of the artifact; smaller groups become single rectangles of the group `REST`
HEADING = 0.26  # inches above the rectangles of a group
_SLOT = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+)\.weight")
_SLOT_NAMES = {
    "attn.c_q": "attention Q",
    "attn.proj": "attention out",
    "attn.c_k": "attention K",
    "attn.c_v": "attention V",
    "mlp.fc": "MLP up",
    "mlp.proj": "MLP down",
}
Tile = tuple[str, float]  # name and bytes
Box = tuple[float, float, float, float]  # left, bottom, width and height in inches


def plot_treemap(table: ArtifactTable, path: Path) -> None:
    """Write the treemap as a PNG. Raises PgolfError if matplotlib or squarify is not installed."""
    write_bytes(path, drawing.png(lambda figure: paint_treemap(figure, table), SIZE))


def paint_treemap(figure: Figure, table: ArtifactTable) -> None:
    """Draw groups (bank matrices by kind, tables, scales, ...) of tensors on a figure of `SIZE` inches.

    Raises PgolfError if squarify is not installed.
    """
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    title = f"{table.path.name}: {table.total_bytes:,} bytes"
    axes.text(0.12, HEIGHT - 0.28, title, fontsize=13, fontweight="bold", va="center")
    groups = _groups(table)
    sums = [sum(size for _, size in tiles) for tiles in groups.values()]
    boxes = _boxes(sums, (0.08, 0.08, WIDTH - 0.16, HEIGHT - 0.58))
    for index, ((name, tiles), total, (x, y, w, h)) in enumerate(
        zip(groups.items(), sums, boxes, strict=True)
    ):
        heading = f"{name}  {_short(total)}  {total / table.total_bytes:.1%}"
        if points := _font_size(heading, w, HEADING, 10):
            y_text = y + h - HEADING / 2
            axes.text(x + 0.06, y_text, heading, fontsize=points, va="center", fontweight="bold")
            h -= HEADING
        color = REST_COLOR if name == REST else COLORS[index % len(COLORS)]
        inner = (x + 0.02, y + 0.02, max(w - 0.04, 0.01), max(h - 0.04, 0.01))
        for tile, place in zip(tiles, _boxes([size for _, size in tiles], inner), strict=True):
            _draw_tile(axes, tile, place, color)


def _draw_tile(axes: Axes, tile: Tile, box: Box, color: str) -> None:
    from matplotlib.patches import Rectangle

    (name, size), (x, y, width, height) = tile, box
    edge = axes.get_figure().get_facecolor()
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=0.8))
    for lines in ((name, _short(size)), (*name.split("."), _short(size)), (name,)):
        if points := _font_size(max(lines, key=len), width, height / len(lines), 9):
            style = {"fontsize": points, "ha": "center", "va": "center", "color": "black"}
            axes.text(x + width / 2, y + height / 2, "\n".join(lines), **style)
            break


def _groups(table: ArtifactTable) -> dict[str, list[Tile]]:
    """Group tensors, the largest group first; layers stay in order, other tensors are sorted by size."""
    groups: dict[str, list[Tile]] = {"header": [("", table.header_bytes)]}
    for tensor in table.tensors:
        group, label = _group_and_label(tensor)
        groups.setdefault(group, []).append((label, tensor.stored_bytes))
    sums = {name: sum(size for _, size in tiles) for name, tiles in groups.items()}
    small = {name: size for name, size in sums.items() if size < SMALL * table.total_bytes}
    large = {name: tiles for name, tiles in groups.items() if name not in small}
    if small:
        large[REST], sums[REST] = list(small.items()), sum(small.values())
    for name, tiles in large.items():
        if name not in _SLOT_NAMES.values():
            tiles.sort(key=lambda tile: -tile[1])
    return dict(sorted(large.items(), key=lambda group: -sums[group[0]]))


def _group_and_label(tensor: TensorBytes) -> tuple[str, str]:
    slot = _SLOT.match(tensor.name)
    if tensor.section == "codes" and slot:
        return _SLOT_NAMES.get(slot[2], slot[2]), f"layer {slot[1]}"
    name = tensor.name.removesuffix(".q").removesuffix(".scale").removesuffix(".weight")
    return {"embeddings": "tables", "small": "small tensors"}.get(tensor.section, tensor.section), name


def _boxes(sizes: Sequence[float], box: Box) -> Iterator[Box]:
    """Divide `box` into boxes of these sizes (M. Bruls et al., "Squarified treemaps", 2000)."""
    try:
        import squarify
    except ImportError as error:
        raise PgolfError("the treemap needs squarify: pip install 'pgolf-fast[plot]'") from error
    x, y, width, height = box
    areas = squarify.normalize_sizes([max(size, 1e-3) for size in sizes], width, height)
    for part in squarify.squarify(areas, x, y, width, height):
        yield part["x"], part["y"], part["dx"], part["dy"]


def _font_size(text: str, width: float, height: float, largest: float) -> float:
    """Return the points at which a line fits a box of inches, or 0 if that is too small to read."""
    points = min(largest, 72 * (width - 0.08) / (0.62 * max(len(text), 1)), 72 * height / 1.4)
    return points if points >= 4.5 else 0.0


def _short(size: float) -> str:
    """Format bytes: `123456` -> `123 kB`."""
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
