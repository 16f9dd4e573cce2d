"""The analyses by name, and what each needs. A study's code is imported when it runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from pgolf_fast.analysis.finding import Finding
from pgolf_fast.analysis.options import Options
from pgolf_fast.analysis.subject import Subject
from pgolf_fast.analysis.validation import open_validation
from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Analysis:
    """One entry of `ANALYSES`."""

    what: str
    """What it looks at, in a few words."""
    place: str
    """MODULE:FUNCTION in this room: (subjects, options) -> findings."""
    models: int = 1
    """How many it needs at least."""
    data: bool = False
    """Whether it can say nothing without tokens."""

    def run(self, subjects: Sequence[Subject], options: Options) -> list[Finding]:
        """The findings. Raises PgolfError where models or data are not what it needs."""
        module, function = self.place.split(":")
        return getattr(import_module(f"pgolf_fast.analysis.{module}"), function)(subjects, options)


ANALYSES = {
    "deltas": Analysis("how far apart weights are", "deltas:delta_findings", models=2),
    "quant": Analysis("what rounding to 6 bits costs", "quant:quant_findings"),
    "spectra": Analysis("singular values", "spectra:spectrum_findings"),
    "overlap": Analysis("angles between leading subspaces", "overlap:overlap_findings", models=2),
    "connectivity": Analysis("the line between two models", "connectivity:connectivity_findings", models=2),
    "surface": Analysis("curvature of the loss", "surface:surface_findings"),
    "triangle": Analysis("distances among three models or more", "triangle:triangle_findings", models=3),
    "hash": Analysis("buckets of the hash table", "hash_table:hash_findings", data=True),
    "losses": Analysis("where the loss is", "losses:loss_findings", data=True),
}


def lacking(name: str, subjects: Sequence[Subject], options: Options) -> str | None:
    """What an analysis needs that is not there, in a line; None if it can run."""
    analysis = ANALYSES[name]
    if len(subjects) < analysis.models:
        return f"{name} needs {analysis.models} models, and was given {len(subjects)}: name more"
    if analysis.data:
        try:
            open_validation(subjects, options)
        except PgolfError as error:
            return f"{name} needs tokens: {error}"
    return None


def chosen(
    only: Sequence[str], subjects: Sequence[Subject], options: Options
) -> tuple[list[str], dict[str, str]]:
    """The analyses to run, and why others are left out.

    Without `only`, all that these models and data allow. Raises PgolfError for a name that does not exist, or
    one in `only` that cannot run.
    """
    for name in only:
        if name not in ANALYSES:
            near = difflib.get_close_matches(name, ANALYSES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(ANALYSES)}"
            raise PgolfError(f"unknown analysis {name!r}: {hint}")
    names = list(dict.fromkeys(only)) or list(ANALYSES)
    reasons = {name: why for name in names if (why := lacking(name, subjects, options)) is not None}
    if only and reasons:
        raise PgolfError(next(iter(reasons.values())))
    return [name for name in names if name not in reasons], reasons
