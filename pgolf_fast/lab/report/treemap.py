"""Treemap of an artifact: one rectangle per tensor, with areas in proportion to the stored bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf_fast.bench import drawing
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes
from pgolf_fast.lab.analysis.artifact_bytes import ArtifactTable, TensorBytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (13.0, 8.0)  # inches
# The light scheme of P. Tol, "Colour Schemes" (SRON 2021): distinct to color-blind readers, black text on it
COLORS = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00", "#DDDDDD")
LABELED = 0.004  # of the artifact; a smaller rectangle has no room for a label
_SLOT = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+)\.weight")
_SLOT_NAMES = {
    "attn.c_q": "attention Q",
    "attn.proj": "attention out",
    "attn.c_k": "attention K",
    "attn.c_v": "attention V",
    "mlp.fc": "MLP up",
    "mlp.proj": "MLP down",
}


def plot_treemap(table: ArtifactTable, path: Path) -> None:
    """Write the treemap as a PNG. Raises PgolfError if matplotlib or squarify is not installed."""
    write_bytes(path, drawing.png(lambda figure: paint_treemap(figure, table), SIZE))


def paint_treemap(figure: Figure, table: ArtifactTable) -> None:
    """Draw the tensors in one color per group (bank matrices by kind, tables, scales, ...).

    Raises PgolfError if squarify is not installed.
    """
    try:
        import squarify
    except ImportError as error:
        raise PgolfError("the treemap needs squarify: pip install 'pgolf-fast[plot]'") from error
    from matplotlib.patches import Patch

    total = table.total_bytes
    groups: dict[str, list[tuple[str, float]]] = {}
    for tensor in sorted(table.tensors, key=lambda tensor: -tensor.stored_bytes):
        group, label = _group_and_label(tensor)
        groups.setdefault(group, []).append((label, tensor.stored_bytes))
    groups["header"] = [("header", table.header_bytes)]
    colors = {name: COLORS[min(i, len(COLORS) - 1)] for i, name in enumerate(groups)}
    tiles = [(name, label, size) for name, group in groups.items() for label, size in group]
    axes = figure.subplots()
    squarify.plot(
        [max(size, 1e-3) for _, _, size in tiles],
        norm_x=100 * SIZE[0] / SIZE[1],  # rectangles are squarified in the shape of the figure
        color=[colors[name] for name, _, _ in tiles],
        label=[f"{label}\n{_short(size)}" if size > LABELED * total else "" for _, label, size in tiles],
        ax=axes,
        bar_kwargs={"edgecolor": axes.get_facecolor(), "linewidth": 0.8},
        text_kwargs={"fontsize": 7, "color": "black"},
    )
    axes.set(xlim=(0, 100 * SIZE[0] / SIZE[1]), ylim=(0, 100))
    axes.axis("off")
    axes.set_title(f"{table.path.name}: {total:,} bytes", fontsize=13, fontweight="bold")
    sums = {name: sum(size for _, size in group) for name, group in groups.items()}
    handles = [
        Patch(color=colors[name], label=f"{name}  {_short(size)}  {size / total:.1%}")
        for name, size in sums.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def _group_and_label(tensor: TensorBytes) -> tuple[str, str]:
    slot = _SLOT.match(tensor.name)
    if tensor.section == "codes" and slot:
        return _SLOT_NAMES.get(slot[2], slot[2]), f"layer {slot[1]}"
    name = tensor.name.removesuffix(".q").removesuffix(".scale").removesuffix(".weight")
    return {"embeddings": "tables", "small": "small tensors"}.get(tensor.section, tensor.section), name


def _short(size: float) -> str:
    """Format bytes: `123456` -> `123 kB`."""
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
