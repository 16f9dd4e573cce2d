"""What a person sees while work goes on: log lines, metrics as JSON lines, progress and tables."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
logger = logging.getLogger("pgolf_fast")


def setup_logging(log_file: Path | None = None, *, quiet: bool = False) -> None:
    """Send log lines to standard error and, if given, append them to `log_file`."""
    close_logging()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [] if quiet else [logging.StreamHandler(sys.stderr)]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def close_logging() -> None:
    """Detach and close every handler that `setup_logging` installed."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class MetricsWriter:
    """Appends one JSON object a line; every line is complete on disk before the next is written."""

    def __init__(self, path: Path | None):
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut = _ends_inside_a_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
            if cut:  # by a crash: the next line must not be glued to the half one
                self._file.write("\n")

    def write(self, kind: str, **values: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict]:
    """All complete lines of a metrics file, which are objects; lines cut by a crash are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def progress(
    items: Iterable[Item],
    what: str,
    *,
    total: int | None = None,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Iterate with a progress bar on a terminal; a log line every 10 s with rate and ETA elsewhere.

    `note` is asked after each item for what else there is to say.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(items, desc=what, total=total, unit=unit, leave=False) as bar:
            for item in bar:
                yield item
                if note is not None:
                    bar.set_postfix_str(note(), refresh=False)
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= 10.0:
            last = now
            rate = done / (now - start)
            eta = f", ETA {duration((total - done) / rate)}" if total else ""
            of = f"/{total}" if total else ""
            more = f", {note()}" if note is not None else ""
            logger.info("%s: %d%s %s%s, %.3g %s/s%s", what, done, of, unit, more, rate, unit, eta)


def duration(seconds: float) -> str:
    """`75.2` -> `1m15s`; `3.21` -> `3.2s`."""
    if not math.isfinite(seconds):
        return "?"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Rows as text in aligned columns; columns whose cells are all numbers are right-aligned."""
    cells = [[str(c) for c in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    if header is not None:
        cells = [list(header), *cells]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for index, row in enumerate(cells):
        padded = [
            c.rjust(w) if i < len(numeric) and numeric[i] else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
        if header is not None and index == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    if text == "-":  # stands for one that there is not
        return True
    try:
        float(text.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True
