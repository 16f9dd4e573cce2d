"""Console output: log lines, metrics as JSON lines, progress bars, durations and tables."""

import contextlib
import json
import logging
import math
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from numbers import Real
from pathlib import Path
from typing import TypeVar

from pgolf_fast.io import cannot_write

Item = TypeVar("Item")
logger = logging.getLogger("pgolf_fast")
_PAUSE = 10.0  # seconds between lines about work in progress


def command(*words: object) -> str:
    """Return the `pgolf` command made of these words, quoted for a shell."""
    # A path that starts with - would be an option
    safe = (f"./{w}" if isinstance(w, Path) and str(w)[0] == "-" else str(w) for w in words)
    return shlex.join(("pgolf", *safe))


def setup_logging(log_file: Path | None = None, *, quiet: bool = False) -> None:
    """Send log lines to standard error and append them, with timestamps, to `log_file` if it is given."""
    close_logging()
    logger.setLevel(logging.INFO)
    logger.propagate = False  # handlers of the root logger would print every line twice
    # without any handler, Python prints warnings to standard error
    logger.addHandler(logging.NullHandler() if quiet else logging.StreamHandler(sys.stderr))
    if log_file is not None:
        handler = _LogFile(_Appender(log_file))
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def close_logging() -> None:
    """Detach and close every handler that `setup_logging` installed."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _Appender:
    """A file for appending text. It is unbuffered, because a buffer that failed would fail again at close."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, open(path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run

    def write(self, text: str) -> None:
        """Write `text`. Raises PgolfError naming the file if the disk is full."""
        data = text.encode(errors="backslashreplace")  # file names may not be UTF-8
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def close(self) -> None:
        self._file.close()


class _LogFile(logging.StreamHandler):
    """Handler that reports once that its file cannot be written, and is then removed."""

    def handleError(self, record: logging.LogRecord) -> None:
        logger.removeHandler(self)
        logger.warning("%s; log lines are no longer kept", sys.exc_info()[1])
        self.close()

    def close(self) -> None:
        self.stream.close()
        super().close()


class MetricsWriter:
    """Append JSON objects to a file, one per line; a crash loses at most the current line."""

    def __init__(self, path: Path | None):
        # a crash may have truncated the last line: start a new one instead of extending it
        truncated = path is not None and path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = None if path is None else _Appender(path)
        if self._file is not None and truncated:
            self._file.write("\n")

    def write(self, kind: str, **values: object) -> None:
        """Write a line. Raises PgolfError naming the file if the disk is full."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **values}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Return the JSON objects of a metrics file, skipping lines that a crash truncated or damaged."""
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # not UTF-8 is a ValueError too
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def _every(seconds: float, say: Callable[[], object]) -> Iterator[None]:
    """Call `say` from a thread every `seconds` during the block."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(Exception):  # a missing line is better than a traceback
                say()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def progress(
    items: Iterable[Item],
    what: str,
    *,
    total: int | None = None,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Iterate with a progress bar on a terminal, else a log line every 10 s; `note()` is appended to each."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(items, desc=what, total=total, unit=unit, leave=False) as bar, _every(1.0, bar.refresh):
            for item in bar:
                yield item
                if note is not None:
                    bar.set_postfix_str(note(), refresh=False)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = last = time.monotonic()
    done = 0

    def say(now: float) -> None:
        nonlocal last
        last, rate = now, done / (now - start)
        eta = f", ETA {duration((total - done) / rate)}" if total and done else ""
        of = f"/{total}" if total else ""
        more = f", {note()}" if note is not None and done else ""
        pace = f"{rate:.3g} {unit}/s" if done else duration(now - start)
        logger.info("%s: %d%s %s%s, %s%s", what, done, of, unit, more, pace, eta)

    with _every(_PAUSE, lambda: say(time.monotonic())):  # for an item that takes longer
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - last >= _PAUSE:
                say(now)


def duration(seconds: float) -> str:
    """Format a duration: `75.2` -> `1m15s`, `3.21` -> `3.2s`."""
    if not math.isfinite(seconds):
        return "?"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def number(value: object, form: str = ".4g") -> str:
    """Format a number; return `-` for None, NaN, infinity and anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return "-"
    return format(value, form)


# A sign, digits with thousands separators, an exponent, and a unit of at most 8 letters
_NUMBER = re.compile(r"[-+±~<>]?\s?(\d[\d,]*(\.\d+)?([eE][-+]?\d+)?|nan|inf)(\s?[a-zA-Zµ%/²]{1,8})?")


class Table:
    """A table of text cells; numeric columns are right-aligned.

    header: column names, or None for a table without a header line.
    rows: one sequence per row; cells are converted with `str`.
    caption: a title for reports; `text` omits it.

    Raises ValueError if a row's length differs from that of the header (or the first row).
    """

    def __init__(self, header: Sequence[str] | None, rows: Iterable[Sequence[object]], caption: str = ""):
        self.header = None if header is None else tuple(header)
        self.rows = tuple(tuple(str(cell) for cell in row) for row in rows)
        self.caption = caption
        width = len(self.header if self.header is not None else next(iter(self.rows), ()))
        if wrong := [row for row in self.rows if len(row) != width]:
            raise ValueError(f"table {caption!r}: row {wrong[0]} has {len(wrong[0])} cells, not {width}")

    def columns(self) -> list[tuple[str, ...]]:
        """Return the cells of each column."""
        return list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.header or ())

    def numeric(self) -> list[bool]:
        """Return True for each column that holds at least one number and otherwise only placeholders."""
        columns = (map(str.strip, column) for column in self.columns())
        known = ([cell for cell in column if cell not in ("", "-")] for column in columns)
        return [bool(cells) and all(map(_NUMBER.fullmatch, cells)) for cells in known]

    def text(self) -> str:
        """Render aligned columns for a terminal or a log."""
        lines = self.rows if self.header is None else (self.header, *self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = [str.rjust if right else str.ljust for right in self.numeric()]
        cells = ([f(cell, w) for f, cell, w in zip(align, line, widths, strict=True)] for line in lines)
        aligned = ["  ".join(line) for line in cells]
        if self.header is not None:
            aligned.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(line.rstrip() for line in aligned)

    __str__ = text
