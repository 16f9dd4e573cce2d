"""Settings and results of analyses: tables with a sentence on what they show, values for JSON, and plots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from pgolf_fast.bench.drawing import Axes, Figure, has_matplotlib, label, png
from pgolf_fast.config.checks import need
from pgolf_fast.console import Table, number

DARK = "_dark"  # suffix of the name of a plot for dark pages
Format = str | Callable[[Any], object]  # for a number, or a function that returns the cell
Column = tuple[str, str, Format]  # header, key of the value, format
Bars = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of all analyses; each reads those that it needs."""

    data: Path | None = None  # folder of validation shards; default: that of the first model's run
    tokenizer: Path | None = None  # of those shards; default: the one that belongs to them
    tokens: int = 16_384  # validation targets for losses, from the beginning of the validation data
    device: str = "cpu"
    hash_rows: tuple[int, ...] = ()  # sizes of additional hash tables whose buckets are counted
    calibration_tokens: int = 4096  # validation tokens whose inputs weight the rounding errors
    points: int = 7  # on the line between two models, including the ends, where the loss is measured
    curvature_tokens: int = 512  # validation targets, at least one window, of the loss with the Hessian
    probes: int = 6  # random vectors for the trace of the Hessian
    lanczos_steps: int = 8  # Hessian-vector products for the extreme eigenvalues
    seed: int = 0  # of all random vectors

    def __post_init__(self) -> None:
        least = {"points": 3, "probes": 2, "lanczos_steps": 2}
        for name in ("tokens", "calibration_tokens", "curvature_tokens", *least):
            value, lowest = getattr(self, name), least.get(name, 1)
            need(value >= lowest, f"--{name.replace('_', '-')} is {value}; it must be at least {lowest}")
        for rows in self.hash_rows:
            need(rows >= 4, f"--hash-rows is {rows}; it must be at least 4")


@dataclass(frozen=True)
class Summary:
    """One table of an analysis, in its published form or in the form that answers the question."""

    name: str
    shows: str  # one sentence on what it can and cannot show
    table: Table
    values: dict[str, Any]  # numbers of the table and those behind it, for JSON
    plots: dict[str, bytes] = field(default_factory=dict)  # PNGs by name
    form: Literal["published", "corrected"] = "corrected"

    def text(self) -> str:
        """Render the heading, the table and the sentence for a terminal."""
        return "\n".join(filter(None, [f"{self.name} [{self.form}]", self.table.text(), self.shows]))

    @classmethod
    def published(cls, name: str, shows: str, table: Table, values: dict[str, Any]) -> "Summary":
        return cls(name, shows, table, values, form="published")


def unmeasured(name: str, reason: str) -> Summary:
    """Return a summary without a table that says why there is none and what to do about it."""
    return Summary(name, f"Not measured: {reason}.", Table(None, ()), {"not_measured": reason})


def columns(form: Format, **headers: str) -> list[Column]:
    """Return columns of one format from key="header"."""
    return [(header, key, form) for key, header in headers.items()]


def tabulate(
    keys: Sequence[str], shown: Sequence[Column], values: dict[str, Any], more: Iterable[Sequence[str]] = ()
) -> tuple[Table, dict[str, Any]]:
    """Tabulate nested mappings, one row per innermost mapping, and append the rows in `more`.

    Returns the table and `values`, which are the next parts of a summary.

    keys: headers of the key columns, one for each level of `values`; lists may be the last level.
    shown: the columns after those, from the innermost mappings.
    """
    leaves: list[tuple[tuple[str, ...], Any]] = [((), values)]
    for _ in keys:
        leaves = [((*path, key), part) for path, tree in leaves for key, part in tree.items()]
    leaves = [(path, part) for path, own in leaves for part in (own if isinstance(own, list) else [own])]
    rows = [(*path, *(_cell(leaf[key], form) for _, key, form in shown)) for path, leaf in leaves]
    return Table((*keys, *(header for header, _, _ in shown)), (*rows, *more)), values


def _cell(value: Any, form: Format) -> object:
    return number(value, form) if isinstance(form, str) else form(value)


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole, or None if the whole is zero."""
    return part / whole if whole else None


_can_draw = cache(has_matplotlib)  # logs once that it is missing


def draw(
    name: str, paint: Callable[[list[Axes]], None], panels: int = 1, *, width: float = 7, height: float = 3.4
) -> dict[str, bytes]:
    """Draw `panels` axes in a row of `width` x `height` inches; return the PNGs `name` and `name_dark`.

    Without matplotlib, log that once and return {}.
    """

    def paint_figure(figure: Figure) -> None:
        paint(list(figure.subplots(1, panels, squeeze=False)[0]))

    draw_one = partial(png, paint_figure, (width, height))
    return {name: draw_one(), name + DARK: draw_one(dark=True)} if _can_draw("plots") else {}


def paint_bars(
    axes: Axes, ticks: Sequence[str], heights: Bars, errors: Bars | None = None, **labels: str
) -> None:
    """Draw bars in groups at the `ticks`, one bar of each group for every key of `heights`.

    `labels` are those of `Axes.set`.
    """
    width = 0.8 / len(heights)
    for i, (name, values) in enumerate(heights.items()):
        places = [tick + width * i for tick in range(len(ticks))]
        axes.bar(places, values, width, yerr=None if errors is None else errors[name], label=label(name))
    axes.set_xticks([tick + 0.4 - width / 2 for tick in range(len(ticks))], list(ticks))
    axes.legend()
    axes.set(**labels)


def draw_bars(name: str, *bars: Any, **labels: Any) -> dict[str, bytes]:
    """Draw `paint_bars(axes, *bars, **labels)` on one panel."""
    return draw(name, lambda axes: paint_bars(axes[0], *bars, **labels))
