"""Plots as PNG bytes, drawn with matplotlib on a light or a dark background."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast import console
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib need not be installed

Paint = Callable[[Figure], None]
DPI = 144  # twice the resolution at which a page shows it
# The bright scheme of P. Tol, "Colour Schemes" (SRON 2021), and its light scheme on dark backgrounds
_LIGHT_CYCLE = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#66CCEE", "#CCBB44", "#BBBBBB")
_DARK_CYCLE = ("#77AADD", "#FFAABB", "#44BB99", "#EE8866", "#99DDFF", "#EEDD88", "#DDDDDD")
_LIGHT = {"background": "#ffffff", "text": "#1c1e21", "line": "#9aa0a8"}
_DARK = {"background": "#16181c", "text": "#e4e6e9", "line": "#666c75"}  # those of the HTML pages


def png(paint: Paint, size: tuple[float, float], *, dark: bool = False) -> bytes:
    """Call `paint` on an empty figure of `size` inches and return the PNG.

    Raises PgolfError without matplotlib.
    """
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise PgolfError("plots need matplotlib: pip install 'pgolf-fast[plot]'") from error
    with matplotlib.rc_context(_style(dark)):
        # Not pyplot, which registers every figure globally and may try to open a display
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def has_matplotlib(what: str) -> bool:
    """Return whether matplotlib is installed; if not, log that `what` is not drawn."""
    try:
        import matplotlib.figure  # noqa: F401 - checks that it is installed
    except ImportError:
        console.logger.warning("no %s: matplotlib is missing (pip install 'pgolf-fast[plot]')", what)
        return False
    return True


def write_png(path: Path, paint: Paint, size: tuple[float, float], what: str) -> Path | None:
    """Write `png` to a file and return its path; without matplotlib, log it and return None."""
    if not has_matplotlib(what):
        return None
    write_bytes(path, png(paint, size))
    return path


def label(name: str) -> str:
    """Escape a user's name for matplotlib: no $math$, and not hidden from legends by a leading _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _style(dark: bool) -> dict[str, object]:
    from matplotlib.rcsetup import cycler

    colors = _DARK if dark else _LIGHT
    backgrounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    texts = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color", "legend.edgecolor")
    return {
        **dict.fromkeys(backgrounds, colors["background"]),
        **dict.fromkeys(texts, colors["text"]),
        **dict.fromkeys(lines, colors["line"]),
        "axes.prop_cycle": cycler(color=_DARK_CYCLE if dark else _LIGHT_CYCLE),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **{"font.size": 9, "legend.fontsize": 8, "axes.titlesize": 10, "axes.titlelocation": "left"},
        **{"grid.alpha": 0.35, "grid.linewidth": 0.6, "legend.framealpha": 0.8},
    }
