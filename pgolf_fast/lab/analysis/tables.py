"""Numbers as cells of a table, and what stands where nothing could be measured."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pgolf_fast.lab.analysis.finding import Finding

NONE = "-"


def number(value: float | None, form: str = ".4g") -> str:
    """A number by that format; `-` for one that there is not."""
    return NONE if value is None or not math.isfinite(value) else format(value, form)


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None where the whole is zero."""
    return part / whole if whole else None


def mean(values: Iterable[float | None]) -> float | None:
    """Of the numbers that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread(values: Iterable[float | None], form: str = ".4g") -> str:
    """Mean ± standard deviation of the numbers that there are."""
    known = [value for value in values if value is not None]
    middle = mean(known)
    if middle is None:
        return NONE
    deviation = math.sqrt(sum((value - middle) ** 2 for value in known) / len(known))
    return f"{number(middle, form)} ± {deviation:.2g}"


def unmeasured(name: str, reason: str) -> Finding:
    """The finding that there is none, and what to do about it."""
    return Finding(name, "corrected", f"Not measured: {reason}.", (), [], {"not_measured": reason})
