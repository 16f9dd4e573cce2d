"""PNG pictures of findings, each for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from pgolf_fast import console
from pgolf_fast.bench.drawing import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK = "_dark"
"""Ending of the name of a picture that is another one's version for dark pages."""


def drawn(
    name: str,
    paint: Callable[[list[Axes]], None],
    panels: int = 1,
    *,
    width: float = 7.0,
    height: float = 3.4,
) -> dict[str, bytes]:
    """PNGs `name` and `name_dark` of what `paint` draws on so many axes beside each other; inches.

    Without matplotlib there are none, and one line says so.
    """
    if not _matplotlib():
        return {}

    def painted(figure: Figure) -> None:
        paint(list(figure.subplots(1, panels, squeeze=False)[0]))

    size = width, height
    return {name: png(painted, size), name + DARK: png(painted, size, dark=True)}


@cache
def _matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401 - asked whether it is there
    except ImportError:
        console.logger.warning("no pictures: matplotlib is missing (pip install 'pgolf-fast[plot]')")
        return False
    return True
