"""Registry of the analyses: run them by name and write the results."""

import difflib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pgolf_fast import console
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes, write_text
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.summary import DARK, Options, Summary, unmeasured
from pgolf_fast.lab.report.html_page import Figure, Section, portable, render

ANALYSES = {  # name: module, its function of models and options, and the least number of models
    "deltas": ("geometry", "analyze_deltas", 2),  # distances between weights
    "quant": ("quant", "analyze", 1),  # errors of rounding to 6 bits
    "spectra": ("geometry", "analyze_spectra", 1),  # singular values
    "overlap": ("geometry", "analyze_overlap", 2),  # angles between leading subspaces
    "connectivity": ("surface", "analyze_connectivity", 2),  # loss on the line between two models
    "surface": ("surface", "analyze_surface", 1),  # curvature of the loss
    "triangle": ("geometry", "analyze_triangle", 3),  # distances among three models or more
    "hash": ("hash_table", "analyze", 1),  # buckets of the hash table
    "losses": ("losses", "analyze", 1),  # distribution of the loss, calibration
}

Show = Callable[[Summary], None]


def check_names(only: Sequence[str]) -> None:
    """Raise PgolfError, naming the closest match, for an unknown analysis."""
    for name in only:
        if name not in ANALYSES:
            close = difflib.get_close_matches(name, ANALYSES, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(ANALYSES)}"
            raise PgolfError(f"unknown analysis {name!r}: {hint}")


def need_models(name: str, count: int) -> None:
    """Raise PgolfError if an analysis needs more than `count` models."""
    if count < (least := ANALYSES[name][2]):
        raise PgolfError(f"{name} needs at least {least} models, not {count}: give another")


@dataclass(frozen=True)
class Results:
    """Summaries and seconds of the analyses that ran, and why others were skipped."""

    models: Sequence[LoadedModel]
    options: Options
    summaries: dict[str, list[Summary]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def time_table(self) -> Table:
        """Tabulate the seconds of each analysis and the total."""
        rows = {**self.seconds, "all": sum(self.seconds.values())}.items()
        return Table(("analysis", "seconds"), [(name, f"{value:.1f}") for name, value in rows])


def run_analyses(
    only: Sequence[str], models: Sequence[LoadedModel], options: Options, show: Show = lambda summary: None
) -> Results:
    """Run the analyses named in `only`, or every one that the models and their data allow.

    `show` is called with each summary. Raises PgolfError if an analysis named in `only` cannot run.
    """
    for name in only:  # before the first one takes its time
        need_models(name, len(models))
    results = Results(models, options)
    for name in console.progress(dict.fromkeys(only or ANALYSES), "analyses", unit="analysis"):
        console.logger.info("analysis %s", name)
        start = time.perf_counter()
        try:
            need_models(name, len(models))
            # Imported when it runs, so that one analysis does not load the code of all
            module, function, _ = ANALYSES[name]
            analyze = getattr(import_module(f"pgolf_fast.lab.analysis.{module}"), function)
            results.summaries[name] = analyze(models, options)
        except PgolfError as error:
            if only:
                raise
            results.skipped[name] = str(error)
            continue
        results.seconds[name] = time.perf_counter() - start
        for summary in results.summaries[name]:
            show(summary)
    return results


def write_results(out: Path, results: Results) -> None:
    """Write analysis.json, report.html and the plots, replacing the plots of an earlier analysis.

    No path of this machine is written, so that the folder can be shared.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The number in the pattern keeps files of the user, such as surface.png
    for old in (file for name in ANALYSES for file in out.glob(f"{name}_[0-9]*_*.png")):
        old.unlink()
    skipped = {name: portable(why) for name, why in results.skipped.items()}
    analyses: dict[str, Any] = {}
    sections: list[Section] = []
    for analysis, summaries in results.summaries.items():
        entries = []
        for number, summary in enumerate(summaries, start=1):
            if reason := summary.values.get("not_measured"):
                summary = unmeasured(summary.name, portable(reason))
            plots = summary.plots
            files = {name: f"{analysis}_{number}_{name}.png" for name in plots}
            for name, file in files.items():
                write_bytes(out / file, plots[name])
            table = {"header": summary.table.header, "rows": summary.table.rows}
            entries.append({**vars(summary), "table": table, "plots": files})
            light = (name for name in files if not name.endswith(DARK))
            alts = {name: f"{summary.name}: {name.replace('_', ' ')}" for name in light}
            figures = [Figure(plots[name], plots.get(name + DARK), alt=alt) for name, alt in alts.items()]
            sections.append(Section(summary.name, summary.shows, [summary.table], figures, summary.form))
        analyses[analysis] = {"seconds": results.seconds[analysis], "summaries": entries}
    models = [
        {"name": m.name, "file": _plain(m.path), "parameters": sum(t.numel() for t in m.state.values())}
        for m in results.models
    ]
    settings = {key: value for key, value in vars(results.options).items() if value is not None}
    tree = {"models": models, "options": settings, "analyses": analyses, "skipped": skipped}
    write_text(out / "analysis.json", json.dumps(_plain(tree), indent=1, allow_nan=False) + "\n")
    rows = [(m["name"], m["file"], f"{m['parameters']:,}") for m in models]
    sections.insert(0, Section("Models", tables=(Table(("model", "file or folder", "parameters"), rows),)))
    if skipped:
        sections.append(Section("Skipped", tables=(Table(("analysis", "reason"), skipped.items()),)))
    title = f"Analysis of {', '.join(model.name for model in results.models)}"
    write_text(out / "report.html", render("analysis", title, sections))


def _plain(value: Any) -> Any:
    """Convert to JSON values: paths to their last component, and numbers that are not finite to null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.resolve().name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
