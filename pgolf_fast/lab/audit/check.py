"""Audit checks: what a check is, what it finds, and running a list of them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pgolf_fast import console


@dataclass(frozen=True)
class AuditFinding:
    """Verdict on a property, with evidence; `passed` is None if it cannot be decided here."""

    passed: bool | None
    evidence: str


holds, fails, undecided = (partial(AuditFinding, verdict) for verdict in (True, False, None))


@dataclass(frozen=True)
class AuditCheck:
    """A property by its number in the challenge's rules (C1 to C18), and the function that checks it."""

    id: str
    title: str
    run: Callable[[], AuditFinding]


@dataclass(frozen=True)
class AuditResult:
    """The finding of a check, and how long it took."""

    id: str
    title: str
    passed: bool | None
    evidence: str
    seconds: float

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: "n.a."}[self.passed]


def run_checks(checks: Iterable[AuditCheck]) -> list[AuditResult]:
    """Run every check in turn. A check that raises has failed."""
    results = []
    for check in console.progress(list(checks), "audit", unit="check"):
        start = time.perf_counter()
        try:
            finding = check.run()
        except Exception as error:  # noqa: BLE001 - any error of the audited code is evidence against it
            finding = fails(f"stopped by {type(error).__name__}: {error}")
        seconds = time.perf_counter() - start
        results.append(AuditResult(check.id, check.title, finding.passed, finding.evidence, seconds))
        took = console.duration(seconds)
        console.logger.info("%s %s (%s): %s", check.id, results[-1].verdict, took, check.title)
    return results


def broken(results: Iterable[AuditResult]) -> list[str]:
    """Return the ids of the properties that do not hold."""
    return [result.id for result in results if result.passed is False]


def findings_table(findings: Sequence[Mapping[str, Any]]) -> console.Table:
    """Tabulate the `findings` of audit.json."""
    rows = [(f["id"], f["title"], f["verdict"], f"{f['seconds']:.1f}", f["evidence"]) for f in findings]
    return console.Table(("id", "property", "verdict", "seconds", "evidence"), rows)
