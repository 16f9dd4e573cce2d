"""What a check is and what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pgolf_fast import console
from pgolf_fast.console import Table


@dataclass(frozen=True)
class Finding:
    """Whether a property holds, and what shows it; `passed` is None where it cannot be asked here."""

    passed: bool | None
    evidence: str


@dataclass(frozen=True)
class Check:
    """A property by its number in the challenge's rules (C1 to C17), and what finds out whether it holds."""

    id: str
    title: str
    run: Callable[[], Finding]


@dataclass(frozen=True)
class Result:
    """What a check found, and how long it took."""

    id: str
    title: str
    passed: bool | None
    evidence: str
    seconds: float

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: "n.a."}[self.passed]


def run_checks(checks: Iterable[Check]) -> list[Result]:
    """Every check in turn. One that raises has failed: what it audits could not be followed to the end."""
    results = []
    for check in console.progress(list(checks), "audit", unit="check"):
        start = time.perf_counter()
        try:
            finding = check.run()
        except Exception as error:  # noqa: BLE001 - whatever the audited code raises is evidence against it
            finding = Finding(False, f"stopped by {type(error).__name__}: {error}")
        seconds = time.perf_counter() - start
        results.append(Result(check.id, check.title, finding.passed, finding.evidence, seconds))
    return results


def broken(results: Iterable[Result]) -> list[str]:
    """Numbers of the properties that do not hold."""
    return [result.id for result in results if result.passed is False]


def findings_table(findings: Iterable[Mapping[str, Any]]) -> Table:
    """Tabulate the `findings` of audit.json."""
    rows = [(f["id"], f["title"], f["verdict"], f"{f['seconds']:.1f}", f["evidence"]) for f in findings]
    return Table(("id", "property", "verdict", "seconds", "evidence"), rows)
