"""Result of an analysis: a table with a sentence on what it shows, values for JSON, and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from pgolf_fast import console
from pgolf_fast.bench.drawing import label, png
from pgolf_fast.console import Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK = "_dark"
"""Suffix of the name of a plot for dark pages."""
Column = tuple[str, str, str | Callable[[Any], str]]
"""Header, key of the value, and format of a number or function that returns the cell."""


@dataclass(frozen=True)
class Summary:
    """One table of an analysis, in its published form or in the form that answers the question."""

    name: str
    form: Literal["published", "corrected"]
    shows: str
    """One sentence on what it can and cannot show."""
    table: Table
    values: dict[str, Any]
    """Numbers of the table and those behind it, for JSON."""
    plots: dict[str, bytes] = field(default_factory=dict)
    """PNGs by name."""

    def text(self) -> str:
        """Render the heading, the table and the sentence for a terminal."""
        heading = f"{self.name} [{self.form}]"
        return "\n".join(filter(None, [heading, self.table.text() if self.table.rows else "", self.shows]))


def unmeasured(name: str, reason: str) -> Summary:
    """Return a summary without a table that says why there is none and what to do about it."""
    empty = Table((), ())
    return Summary(name, "corrected", f"Not measured: {reason}.", empty, {"not_measured": reason})


def tabulate(keys: Sequence[str], columns: Sequence[Column], values: Mapping[str, Any]) -> Table:
    """Tabulate nested mappings, one row per innermost mapping.

    keys: headers of the key columns, one for each level of `values`.
    columns: the columns after those, from the innermost mappings.
    """
    rows = [
        (*path, *(_cell(leaf[key], form) for _, key, form in columns))
        for path, leaf in _leaves(values, len(keys))
    ]
    return Table((*keys, *(header for header, _, _ in columns)), rows)


def _leaves(values: Mapping[str, Any], depth: int) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if depth == 0:
        yield (), values
        return
    for key, part in values.items():
        for path, leaf in _leaves(part, depth - 1):
            yield (key, *path), leaf


def _cell(value: Any, form: str | Callable[[Any], str]) -> str:
    return number(value, form) if isinstance(form, str) else form(value)


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole, or None if the whole is zero."""
    return part / whole if whole else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def mean_and_deviation(values: Iterable[float | None]) -> str:
    """Format the mean ± standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known or not math.isfinite(fmean(known)):
        return "-"
    return f"{fmean(known):.4g} ± {pstdev(known):.2g}"


def draw(
    name: str,
    paint: Callable[[list[Axes]], None],
    panels: int = 1,
    *,
    width: float = 7.0,
    height: float = 3.4,
) -> dict[str, bytes]:
    """Draw `panels` axes in a row of `width` x `height` inches; return the PNGs `name` and `name_dark`.

    Without matplotlib, log that once and return {}.
    """
    if not _has_matplotlib():
        return {}

    def paint_figure(figure: Figure) -> None:
        paint(list(figure.subplots(1, panels, squeeze=False)[0]))

    size = width, height
    return {name: png(paint_figure, size), name + DARK: png(paint_figure, size, dark=True)}


@cache
def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401 - checks that it is installed
    except ImportError:
        console.logger.warning("no plots: matplotlib is missing (pip install 'pgolf-fast[plot]')")
        return False
    return True


def paint_bars(
    axes: Axes,
    ticks: Sequence[str],
    heights: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw bars in groups at the `ticks`, one bar of each group for every key of `heights`."""
    width = 0.8 / len(heights)
    for i, (name, values) in enumerate(heights.items()):
        places = [tick + width * i for tick in range(len(ticks))]
        axes.bar(places, values, width, yerr=None if errors is None else errors[name], label=label(name))
    axes.set_xticks([tick + 0.4 - width / 2 for tick in range(len(ticks))], list(ticks))
    axes.legend(fontsize=8)
