"""A picture of an artifact: a rectangle for every tensor; within a group, areas are as the bytes stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast.bench import drawing
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes
from pgolf_fast.lab.analysis.artifact_bytes import ArtifactTable, TensorBytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 13.0, 8.0  # inches
# The light scheme of P. Tol, "Colour Schemes" (SRON 2021): apart for colour-blind eyes, black text stands out
COLOURS = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00")
REST, REST_COLOUR = "all else", "#DDDDDD"
SMALL = 0.02  # of the artifact; groups below become single rectangles
_SLOT = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+)\.weight")
_SLOT_NAMES = {
    "attn.c_q": "attention Q",
    "attn.proj": "attention out",
    "attn.c_k": "attention K",
    "attn.c_v": "attention V",
    "mlp.fc": "MLP up",
    "mlp.proj": "MLP down",
}


@dataclass(frozen=True)
class _Tile:
    label: str
    bytes: float


@dataclass(frozen=True)
class _Box:
    """A rectangle in inches, from the lower left."""

    x: float
    y: float
    width: float
    height: float

    def inside(self, margin: float, head: float) -> _Box:
        return _Box(
            self.x + margin,
            self.y + margin,
            max(self.width - 2 * margin, 0.01),
            max(self.height - 2 * margin - head, 0.01),
        )


def plot_treemap(table: ArtifactTable, path: Path) -> None:
    """Write a PNG with a group for each kind of bank matrix, the tables, the scales, and the small tensors.

    Raises PgolfError when matplotlib or squarify is not installed.
    """
    write_bytes(path, drawing.png(lambda figure: paint_treemap(figure, table), (WIDTH, HEIGHT)))


def paint_treemap(figure: Figure, table: ArtifactTable) -> None:
    """The same on an empty figure of WIDTH x HEIGHT inches, headings in its text colour.

    Raises PgolfError when squarify is not installed.
    """
    groups = _groups(table)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    title = f"{table.path.name}: {table.total_bytes:,} bytes"
    axes.text(0.12, HEIGHT - 0.28, title, fontsize=13, fontweight="bold", va="center")
    whole = _Box(0.08, 0.08, WIDTH - 0.16, HEIGHT - 0.58)
    boxes = _squares([sum(t.bytes for t in tiles) for _, tiles in groups], whole)
    for index, ((name, tiles), box) in enumerate(zip(groups, boxes, strict=True)):
        colour = REST_COLOUR if name == REST else COLOURS[index % len(COLOURS)]
        _draw_group(axes, name, tiles, box, colour, table.total_bytes)


def _groups(table: ArtifactTable) -> list[tuple[str, list[_Tile]]]:
    """Name and tiles of every group, the largest first; layers in their order, other tensors by size."""
    groups: dict[str, list[_Tile]] = {"header": [_Tile("", table.header_bytes)]}
    for tensor in table.tensors:
        group, label = _place(tensor)
        groups.setdefault(group, []).append(_Tile(label, tensor.stored_bytes))
    sums = {name: sum(tile.bytes for tile in tiles) for name, tiles in groups.items()}
    small = [name for name, size in sums.items() if size < SMALL * table.total_bytes]
    found = {name: tiles for name, tiles in groups.items() if name not in small}
    found[REST] = [_Tile(name, sums[name]) for name in small]
    sums[REST] = sum(sums[name] for name in small)
    for name, tiles in found.items():
        if name not in _SLOT_NAMES.values():
            tiles.sort(key=lambda tile: -tile.bytes)
    return sorted(found.items(), key=lambda group: -sums[group[0]])


def _place(tensor: TensorBytes) -> tuple[str, str]:
    """The group and the label of a tensor."""
    slot = _SLOT.match(tensor.name)
    if tensor.section == "codes" and slot:
        return _SLOT_NAMES.get(slot[2], slot[2]), f"layer {slot[1]}"
    name = tensor.name.removesuffix(".q").removesuffix(".scale").removesuffix(".weight")
    return {"embeddings": "tables", "small": "small tensors"}.get(tensor.section, tensor.section), name


def _squares(sizes: Sequence[float], box: _Box) -> Iterator[_Box]:
    """Boxes of these sizes, largest first, that fill `box` (M. Bruls et al., "Squarified treemaps", 2000)."""
    try:
        import squarify
    except ImportError as error:
        raise PgolfError("the treemap needs squarify: pip install pgolf-fast[plot]") from error
    shares = squarify.normalize_sizes([max(size, 1e-3) for size in sizes], box.width, box.height)
    for found in squarify.squarify(shares, box.x, box.y, box.width, box.height):
        yield _Box(found["x"], found["y"], found["dx"], found["dy"])


def _draw_group(
    axes: Any, name: str, tiles: Sequence[_Tile], box: _Box, colour: str, total_bytes: int
) -> None:
    size = sum(tile.bytes for tile in tiles)
    heading = f"{name}  {_short(size)}  {size / total_bytes:.1%}"
    font = _font(heading, box.width, 0.24, 10)
    inner = box.inside(0.02, 0.24 if font else 0.0)
    if font:
        axes.text(
            box.x + 0.06, box.y + box.height - 0.13, heading, fontsize=font, va="center", fontweight="bold"
        )
    for tile, place in zip(tiles, _squares([tile.bytes for tile in tiles], inner), strict=True):
        _draw_tile(axes, tile, place, colour)


def _draw_tile(axes: Any, tile: _Tile, box: _Box, colour: str) -> None:
    from matplotlib.patches import Rectangle

    ground = axes.get_figure().get_facecolor()
    axes.add_patch(
        Rectangle((box.x, box.y), box.width, box.height, facecolor=colour, edgecolor=ground, linewidth=0.8)
    )
    size = _short(tile.bytes)
    for lines in ([tile.label, size], [*tile.label.split("."), size], [tile.label]):
        font = _font(max(lines, key=len), box.width, box.height / len(lines), 9)
        if font:
            middle = (box.x + box.width / 2, box.y + box.height / 2)
            axes.text(*middle, "\n".join(lines), fontsize=font, ha="center", va="center", color="black")
            break


def _font(text: str, width: float, height: float, largest: float) -> float:
    """Points in which a line fits into a box of inches; 0 where it could not be read."""
    points = min(largest, 72 * (width - 0.08) / (0.62 * max(len(text), 1)), 72 * height / 1.4)
    return points if points >= 4.5 else 0.0


def _short(size: float) -> str:
    """`123456` -> `123 kB`."""
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
