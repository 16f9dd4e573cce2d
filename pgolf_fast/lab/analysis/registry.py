"""The analyses by name, and what each needs. A study's code is imported when it runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.subject import Subject


@dataclass(frozen=True)
class Analysis:
    """One entry of `ANALYSES`."""

    what: str
    """What it looks at, in a few words."""
    place: str
    """MODULE:FUNCTION in this room: (subjects, options) -> findings."""
    models: int = 1
    """How many it needs at least."""

    def run(self, subjects: Sequence[Subject], options: Options) -> list[Finding]:
        """The findings. Raises PgolfError where models or data are not what it needs."""
        module, function = self.place.split(":")
        return getattr(import_module(f"pgolf_fast.lab.analysis.{module}"), function)(subjects, options)


ANALYSES = {
    "deltas": Analysis("how far apart weights are", "deltas:delta_findings", models=2),
    "quant": Analysis("what rounding to 6 bits costs", "quant:quant_findings"),
    "spectra": Analysis("singular values", "spectra:spectrum_findings"),
    "overlap": Analysis("angles between leading subspaces", "overlap:overlap_findings", models=2),
    "connectivity": Analysis("the line between two models", "connectivity:connectivity_findings", models=2),
    "surface": Analysis("curvature of the loss", "surface:surface_findings"),
    "triangle": Analysis("distances among three models or more", "triangle:triangle_findings", models=3),
    "hash": Analysis("buckets of the hash table", "hash_table:hash_findings"),
    "losses": Analysis("where the loss is", "losses:loss_findings"),
}


def check_names(only: Sequence[str]) -> None:
    """Raise PgolfError, with the nearest name, for one that is no analysis."""
    for name in only:
        if name not in ANALYSES:
            near = difflib.get_close_matches(name, ANALYSES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(ANALYSES)}"
            raise PgolfError(f"unknown analysis {name!r}: {hint}")


def lacking(name: str, subjects: Sequence[Subject]) -> str | None:
    """How many models an analysis needs, where there are fewer, in a line."""
    least = ANALYSES[name].models
    if len(subjects) >= least:
        return None
    return f"{name} needs {least} models or more, not {len(subjects)}: name another"
