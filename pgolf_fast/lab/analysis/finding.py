"""What an analysis returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One table of an analysis, in the form that was published or in the one that answers the question."""

    name: str
    form: Literal["published", "corrected"]
    shows: str
    """One sentence: what it can and cannot show."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    values: dict[str, Any]
    """The table's numbers and those behind it, for JSON."""
    plots: dict[str, bytes] = field(default_factory=dict)
    """PNG by name."""
