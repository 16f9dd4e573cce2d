"""Run the analyses, print their tables and write their files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgolf_fast import console
from pgolf_fast.cli.output import print_out
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes, write_text
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import DARK
from pgolf_fast.lab.analysis.registry import ANALYSES, lacking
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import unmeasured
from pgolf_fast.lab.report import html_page


@dataclass(frozen=True)
class _Done:
    """One analysis that ran."""

    name: str
    seconds: float
    findings: list[Finding]


def run_all(
    only: Sequence[str], subjects: Sequence[Subject], options: Options
) -> tuple[list[_Done], dict[str, str]]:
    """Run and print; also why some were left out, which is an error where they were asked for by name."""
    done: list[_Done] = []
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(only or ANALYSES):
        start = time.perf_counter()
        try:
            if (why := lacking(name, subjects)) is not None:
                raise PgolfError(why)
            findings = ANALYSES[name].run(subjects, options)
        except PgolfError as error:
            if only:
                raise
            left_out[name] = str(error)
            continue
        done.append(_Done(name, time.perf_counter() - start, findings))
        for finding in findings:
            print_out(_text(finding) + "\n")
    return done, left_out


def _text(finding: Finding) -> str:
    parts = [f"{finding.name} [{finding.form}]"]
    if finding.rows:
        parts.append(console.table(finding.rows, finding.header))
    return "\n".join([*parts, finding.shows])


def write(
    out: Path,
    subjects: Sequence[Subject],
    options: Options,
    done: Sequence[_Done],
    left_out: Mapping[str, str],
) -> None:
    """All files; the pictures of an earlier analysis in the same folder go."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (file for name in ANALYSES for file in out.glob(f"{name}_[0-9]*_*.png")):
        old.unlink()
    done = [replace(one, findings=[_portable(finding) for finding in one.findings]) for one in done]
    left_out = {name: html_page.portable(why) for name, why in left_out.items()}
    analyses: dict[str, Any] = {}
    for one in done:
        found = []
        for number, finding in enumerate(one.findings, start=1):
            files = {name: f"{one.name}_{number}_{name}.png" for name in finding.plots}
            for name, file in files.items():
                write_bytes(out / file, finding.plots[name])
            story = {"name": finding.name, "form": finding.form, "shows": finding.shows}
            table = {"header": finding.header, "rows": finding.rows}
            found.append({**story, **table, "values": finding.values, "plots": files})
        analyses[one.name] = {"seconds": one.seconds, "findings": found}
    settings = {
        key: _last(value) if isinstance(value, Path) else value if isinstance(value, int) else str(value)
        for key, value in vars(options).items()
        if value is not None
    }
    models = [{"name": s.name, "file": _last(s.path), "parameters": _parameters(s)} for s in subjects]
    tree = {"models": models, "options": settings, "analyses": analyses, "left_out": left_out}
    write_text(out / "analysis.json", json.dumps(_plain(tree), indent=1, allow_nan=False) + "\n")
    write_text(out / "report.html", _page(subjects, done, left_out))


def _portable(finding: Finding) -> Finding:
    """The same, without the folders of this machine where it says why something was not measured."""
    reason = finding.values.get("not_measured")
    return finding if reason is None else unmeasured(finding.name, html_page.portable(reason))


def _last(path: Path) -> str:
    """Of a path its last part: the rest is about this machine."""
    return path.resolve().name


def _parameters(subject: Subject) -> int:
    return sum(tensor.numel() for tensor in subject.state.values())


def _plain(value: Any) -> Any:
    """The same for JSON, which has no tuples and no numbers that are not finite: those are null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(subjects: Sequence[Subject], done: Sequence[_Done], left_out: Mapping[str, str]) -> str:
    rows = tuple((s.name, _last(s.path), f"{_parameters(s):,}") for s in subjects)
    models = html_page.Table(("model", "file or folder", "parameters"), rows)
    sections = [html_page.Section("Models", tables=(models,))]
    sections += [_section(finding) for one in done for finding in one.findings]
    if left_out:
        reasons = html_page.Table(("analysis", "why"), tuple(left_out.items()))
        sections.append(html_page.Section("Left out", tables=(reasons,)))
    names = ", ".join(subject.name for subject in subjects)
    note = (
        "Each analysis stands here as it was published and, where that does not answer its question, as it "
        "should be. `docs/analysis.md` says what every number means."
    )
    return html_page.page(f"Analysis of {names}", sections, note)


def _section(finding: Finding) -> html_page.Section:
    table = html_page.Table(finding.header, tuple(map(tuple, finding.rows)))
    figures = tuple(
        html_page.Figure(png, finding.plots.get(name + DARK), alt=f"{finding.name}: {name.replace('_', ' ')}")
        for name, png in finding.plots.items()
        if not name.endswith(DARK)
    )
    return html_page.Section(
        finding.name, finding.shows, (table,) if finding.rows else (), figures, finding.form
    )
