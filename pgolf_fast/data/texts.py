"""Documents from .txt, .jsonl, .jsonl.gz and .jsonl.xz files, and their validation split."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from pgolf_fast import console
from pgolf_fast.errors import PgolfError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz")
_HASHES = 1 << 64


def expand(inputs: Iterable[Path | str]) -> list[Path]:
    """Return the files of `inputs`, with a folder replaced by the text files directly in it.

    Raises `PgolfError` if there are no files, or one is missing or of another kind.
    """
    files: list[Path] = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
        elif not path.exists():
            raise PgolfError(f"{path} does not exist: give {', '.join(SUFFIXES)} files or folders of them")
        elif not path.name.endswith(SUFFIXES):
            raise PgolfError(
                f"{path} is not a kind of file that can be read: give {', '.join(SUFFIXES)} files"
            )
        else:
            files.append(path)
    if not files:
        raise PgolfError(f"no files to tokenize: give {', '.join(SUFFIXES)} files or folders that hold some")
    return files


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file that are not blank: a whole .txt, or the "text" of each line of a .jsonl.

    Raises `PgolfError` naming the file (and line) if it cannot be read.
    """
    try:
        if path.name.endswith(".txt"):
            text = path.read_text(encoding="utf-8")
            if text.strip():
                yield text
            return
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _text_of(line, path, number)
                    if text.strip():
                        yield text
    except UnicodeDecodeError as error:
        raise PgolfError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PgolfError(f"cannot read {path}: {error}; it is unreadable or damaged") from error


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.name.endswith(".xz"):
        return cast("IO[bytes]", lzma.open(path, "rb"))
    return open(path, "rb")


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PgolfError(
            f'{path} line {number} is not JSON ({error}): each line must be like {{"text": "..."}}'
        ) from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise PgolfError(
            f'{path} line {number} has no "text" string: each line must be like {{"text": "..."}}'
        )
    return text


@dataclass(frozen=True)
class Plan:
    """A split of documents: validation has those with a hash below `threshold`. A single document is cut."""

    documents: int
    threshold: int
    cut: float | None = None

    def parts(self, files: Sequence[Path], what: str) -> Iterator[tuple[Literal["train", "val"], str]]:
        """Yield (split, text) of each document in order, with a progress bar labeled `what`."""
        for text in console.progress(_all(files), what, total=self.documents, unit="doc"):
            if self.cut is not None:
                head, tail = _cut(text, self.cut)
                yield "train", head
                yield "val", tail
            else:
                yield ("val" if _hash(text) < self.threshold else "train"), text


def make_plan(files: Sequence[Path], val_fraction: float) -> Plan:
    """Read all documents and decide their split by the sha1 of their text.

    There is always a training document, and a validation document unless `val_fraction` is 0. Raises
    `PgolfError` if there is no text, or all documents are the same.
    """
    if not 0 <= val_fraction < 1:
        raise PgolfError(f"val_fraction is {val_fraction}; it must be at least 0 and less than 1")
    threshold, count, below = int(val_fraction * _HASHES), 0, 0
    lowest, highest, last = _HASHES, -1, ""
    for last in console.progress(_all(files), "reading", unit="doc"):
        value = _hash(last)
        count, below = count + 1, below + (value < threshold)
        lowest, highest = min(lowest, value), max(highest, value)
    if count == 0:
        raise PgolfError(f"empty corpus: no text in {_names(files)}; give files with text in them")
    if val_fraction == 0:
        return Plan(count, 0)
    if count == 1:
        if not all(part.strip() for part in _cut(last, 1 - val_fraction)):
            raise PgolfError(
                f"the only document in {_names(files)} is too short to use {val_fraction:.0%} of it "
                "for validation: give more text, or val_fraction 0"
            )
        return Plan(count, 0, cut=1 - val_fraction)
    if lowest == highest:
        raise PgolfError(
            f"all {count} documents in {_names(files)} are the same: nothing is left for validation"
        )
    if below == 0:
        threshold = lowest + 1
    elif below == count:
        threshold = highest
    return Plan(count, threshold)


def _all(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        yield from read_documents(path)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha1(text.encode("utf-8", "replace")).digest()[:8], "big")


def _cut(text: str, at: float) -> tuple[str, str]:
    """Cut `text` in two at about `at` of its length, at white space if there is any."""
    middle = int(len(text) * at)
    space = max(text.rfind(" ", 0, middle), text.rfind("\n", 0, middle))
    middle = space if space > 0 else middle
    return text[:middle], text[middle:]


def _names(files: Sequence[Path]) -> str:
    shown = ", ".join(str(path) for path in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more files"
