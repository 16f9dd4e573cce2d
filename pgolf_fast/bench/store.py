"""Benchmark records as JSON lines, their summary, and the comparison of two files."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf_fast import console
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.runtime import environment

Record = dict[str, Any]
_KEY = ("preset", "op", "peer", "mode", "tokens", "dtype", "device")


def commit() -> str:
    """Return the checked-out commit, with "-dirty" if files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def provenance() -> Record:
    """Return the commit, versions and machine, which every record carries."""
    return {"commit": commit(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "environment": environment()}


class Store:
    """Append records to a JSONL file, each flushed before the next, and keep them in memory."""

    def __init__(self, path: Path | None):
        self.path, self.records = path, list[Record]()
        self._writer = console.MetricsWriter(path)
        self._provenance = provenance()

    def add(self, record: Record) -> None:
        whole = {**record, **self._provenance}
        self.records.append(whole)
        self._writer.write("bench", **whole)

    def close(self) -> None:
        self._writer.close()


def read_records(path: Path) -> list[Record]:
    """Return all records of a file. Raises PgolfError if it holds none."""
    if not path.is_file():
        raise PgolfError(f"no file {path}: give one that `pgolf bench --out FILE` wrote")
    records = [row for row in console.read_metrics(path) if row.get("kind") == "bench"]
    if not records:
        raise PgolfError(f"{path} holds no benchmark records: give a file that `pgolf bench --out` wrote")
    return records


def _timed_by_key(records: Sequence[Record]) -> dict[tuple[Any, ...], Record]:
    last = {tuple(record.get(k) for k in _KEY): record for record in records}
    return {key: record for key, record in last.items() if "median_ms" in record}


def timed(records: Sequence[Record]) -> list[Record]:
    """Return the last record for each key that holds a time, not an error."""
    return list(_timed_by_key(records).values())


def summary(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return one row per op, mode and size: our median, the fastest peer, its median, and peer / ours."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in timed(records):
        groups.setdefault((record["op"], record["mode"], record["tokens"]), []).append(record)
    rows: list[tuple[str, ...]] = []
    for (op, mode, tokens), group in groups.items():
        ours = next((r for r in group if r["peer"] == "ours"), None)
        if ours is None:
            continue
        against = ["-", "-", "-"]
        if peers := [r for r in group if not r["peer"].startswith("ours")]:
            best = min(peers, key=lambda r: r["median_ms"])
            ratio = best["median_ms"] / ours["median_ms"]
            against = [best["peer"], f"{best['median_ms']:.4f}", f"{ratio:.2f}"]
        roof = f"{ours['roofline_percent']:.0f}%"
        rows.append((op, mode, f"{tokens}", f"{ours['median_ms']:.4f}", roof, *against))
    return rows


SUMMARY_HEADER = ("op", "mode", "tokens", "ours ms", "of roofline", "best peer", "its ms", "peer / ours")


def describe(records: list[Record]) -> str:
    """Return the summary table, and what was not measured with the reason."""
    parts = []
    if rows := summary(records):
        parts.append(console.Table(SUMMARY_HEADER, rows).text())
    missing = [(r["op"], r["mode"], str(r["tokens"]), r["peer"], r["error"]) for r in records if "error" in r]
    if missing:
        parts.append(console.Table(("op", "mode", "tokens", "peer", "not measured because"), missing).text())
    return "\n\n".join(parts) or "nothing was measured"


def compare_files(before: Path, after: Path, threshold: float) -> tuple[str, bool]:
    """Return a table of medians from two results files, and whether one of our ops is slower or missing.

    Raises PgolfError if the files have no measurement in common.
    """
    files = read_records(before), read_records(after)
    first, second = map(_timed_by_key, files)
    rows, slower = list[tuple[str, ...]](), list[str]()
    for key, old in first.items():
        name, ms = f"{old['op']} {old['mode']} {old['tokens']} {old['peer']}", old["median_ms"]
        if key not in second:
            rows.append((name, f"{ms:.4f}", "-", "missing"))
            slower += [f"{name} is missing"] if old["peer"] == "ours" else []
            continue
        ratio = second[key]["median_ms"] / ms
        rows.append((name, f"{ms:.4f}", f"{second[key]['median_ms']:.4f}", f"{ratio:.3f}"))
        if old["peer"] == "ours" and ratio > threshold:
            slower.append(f"{name}: {ratio:.3f} times as long")
    if not first.keys() & second.keys():
        raise PgolfError("the two files have no measurement in common: same preset, dtype and device?")
    gpus = {r["environment"].get("gpu") or r["environment"].get("processor") for file in files for r in file}
    if len(gpus) > 1:
        names = ", ".join(map(str, sorted(gpus)))
        console.logger.warning("the files come from different machines: %s", names)
    text = console.Table(("op, mode, tokens, peer", before.name, after.name, "ratio"), rows).text()
    if slower:
        text += "\n\nslower than allowed:\n" + "\n".join(slower)
    return text, bool(slower)
