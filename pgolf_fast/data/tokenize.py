"""Tokenization of .txt, .jsonl, .jsonl.gz and .jsonl.xz files to shards, with a validation split."""

import functools
import gzip
import hashlib
import lzma
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_fast import console
from pgolf_fast.config.checks import need
from pgolf_fast.cores import available_cores
from pgolf_fast.data.manifest import write_manifest
from pgolf_fast.data.shards import BOS_ID, Split, shard_paths, side_file, write_shard
from pgolf_fast.data.tokenizer import Tokenizer, byte_table, scored_bytes, train_tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import locked, parse_json, write_bytes

Part = tuple[Split, str]
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz")

_CHUNK_CHARS = 500_000
_CHUNK_DOCUMENTS = 500
_HASHES = 1 << 64
_LINES = 'each line must be like {"text": "..."}'
_QUIET_SECONDS = 10.0
_ALONE_BYTES = 16_000_000  # of input; with less, starting worker processes takes longer than it saves


def tokenize_files(
    files: Iterable[Path | str],
    *,
    out: Path | str,
    vocab_size: int,
    tokenizer: Path | str | None = None,
    caseops: bool = False,
    val_fraction: float | None = None,
    val_docs: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
) -> dict[str, object]:
    """Write the documents of `files` as shards and a tokenizer to `out`, and return counts.

    A .txt file is one document; .jsonl, .jsonl.gz and .jsonl.xz hold one in the "text" of each line.
    Validation gets the first `val_docs` documents, or a share `val_fraction` (default: 0.05) chosen by a hash
    of their text; a single document is split. Without `tokenizer`, one with `vocab_size` pieces is trained
    on the training documents, with `caseops` on text encoded by CaseOps; a given one that has its operators
    is for such text. Validation shards then get side files of the bytes of text of each token. Raises
    `PgolfError` for bad input, without writing shards.
    """
    start = time.monotonic()
    need(shard_tokens >= 1, f"shard_tokens is {shard_tokens}; it must be at least 1")
    need(workers is None or workers >= 1, f"workers is {workers}; it must be at least 1")
    if not 1 <= vocab_size <= 1 << 16:
        raise PgolfError(f"vocab_size is {vocab_size}; shards hold ids of 16 bits, so it must be 1 to 65536")
    paths, folder = expand(files), Path(out)
    given = None if tokenizer is None else _given_tokenizer(tokenizer, vocab_size, caseops)
    _check_folder(folder, given)
    plan = make_plan(paths, val_fraction, val_docs)
    if workers is None:
        small = sum(path.stat().st_size for path in paths) < _ALONE_BYTES
        workers = 1 if small else available_cores()
    with locked(folder / ".lock", f"{folder} is in use"):
        _check_folder(folder, given)  # another process may have been faster
        for left in folder.glob(".tokenize-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        # inside `out`: a rename is atomic within one file system
        with tempfile.TemporaryDirectory(prefix=".tokenize-", dir=folder) as temporary:
            building = Path(temporary)
            if given is None:
                given = _trained(plan, paths, vocab_size, building / "tokenizer", caseops)
            else:
                write_bytes(building / "tokenizer.model", given.path.read_bytes())
            writer = _Writer(building, shard_tokens, given)
            for split, rows in _encode(
                plan.parts(paths, "tokenizing"), building / "tokenizer.model", workers
            ):
                writer.add(split, rows)
            counts = writer.finish()
            write_manifest(building, given, plan.rule, counts)
            for path in sorted(building.iterdir()):
                os.replace(path, folder / path.name)
    return {"out": str(folder), "files": len(paths), **counts, "seconds": round(time.monotonic() - start, 3)}


def _trained(plan: "Plan", files: Sequence[Path], vocab_size: int, prefix: Path, caseops: bool) -> Tokenizer:
    why = f"all {plan.documents:,} documents are for validation and none is left to train a tokenizer on"
    hint = "give a tokenizer, or a smaller val_docs or val_fraction"
    need(plan.first != plan.documents and plan.threshold != _HASHES, f"{why}: {hint}")
    texts = (text for split, text in plan.parts(files, "training tokenizer") if split == "train")
    trained, start = Future[Path](), time.monotonic()

    def train() -> None:
        try:
            trained.set_result(train_tokenizer(texts, vocab_size, prefix, caseops))
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            trained.set_exception(error)

    # SentencePiece prints nothing and blocks Ctrl-C
    threading.Thread(target=train, daemon=True).start()
    while not wait([trained], _QUIET_SECONDS).done:
        console.logger.info("training tokenizer: %s so far", console.duration(time.monotonic() - start))
    return Tokenizer.load(trained.result())


def _given_tokenizer(path: Path | str, vocab_size: int, caseops: bool) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    hint = f"give vocab_size {tokenizer.vocab_size}, or leave the tokenizer out to train one"
    why = f"tokenizer {path} has {tokenizer.vocab_size} pieces but vocab_size is {vocab_size}: {hint}"
    need(tokenizer.vocab_size == vocab_size, why)
    why = f"tokenizer {path} has BOS id {tokenizer.bos_id}; shards need id {BOS_ID} to open each document"
    need(tokenizer.bos_id == BOS_ID, f"{why}: use another tokenizer or leave it out to train one")
    why = f"tokenizer {path} lacks the operators of CaseOps (U+E001 to U+E004)"
    need(tokenizer.has_caseops or not caseops, f"{why}: leave it out to train one, or leave out --caseops")
    return tokenizer


def _check_folder(folder: Path, given: Tokenizer | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PgolfError(f"cannot make the folder {folder}: {error.strerror}; choose another") from error
    if old := shard_paths(folder, "train") + shard_paths(folder, "val"):
        why = f"{folder} already holds shards ({old[0].name}): remove them or choose another folder"
        raise PgolfError(why)
    manifest, model = folder / "manifest.json", folder / "tokenizer.model"
    if not (manifest.is_file() and b"pgolf shards" in manifest.read_bytes()):  # not made here
        same = given is not None and model.is_file() and model.read_bytes() == given.path.read_bytes()
        for path in (manifest,) if same else (manifest, model):
            why = f"{path} would be replaced: move it away or choose another folder"
            need(not os.path.lexists(path), why)
    need(os.access(folder, os.W_OK), f"cannot write to {folder}: make it writable or choose another folder")


class _Writer:
    def __init__(self, folder: Path, shard_tokens: int, tokenizer: Tokenizer):
        self._folder, self._size, self._table = folder, shard_tokens, byte_table(tokenizer)
        self._name = "fineweb" if tokenizer.has_caseops else "text"  # that programs of the field look for
        self._waiting: dict[Split, list[np.ndarray]] = {"train": [], "val": []}
        self._waiting_tokens: dict[Split, int] = {"train": 0, "val": 0}
        self._counts: Counter[str] = Counter()
        self._shards: Counter[Split] = Counter()

    def add(self, split: Split, rows: np.ndarray) -> None:
        """Add a document: its ids and, for side files, the bytes of each, uint16 of shape (1 or 2, n).

        Its first token is BOS, so bytes can be counted per document.
        """
        self._waiting[split].append(rows)
        self._waiting_tokens[split] += rows.shape[1]
        size = int(rows[1].sum(dtype=np.int64)) if len(rows) == 2 else scored_bytes(self._table, rows[0])
        counts = {"documents": 1, "tokens": rows.shape[1], "bytes": size}
        for name, amount in counts.items():
            self._counts[name] += amount
            self._counts[f"{split}_{name}"] += amount
        while self._waiting_tokens[split] >= self._size:
            self._flush(split)

    def _flush(self, split: Split) -> None:
        rows = np.concatenate(self._waiting[split], axis=1)
        path = self._folder / f"{self._name}_{split}_{self._shards[split]:06d}.bin"
        for file, row in zip((path, side_file(path)), rows, strict=False):
            write_shard(file, row[: self._size])
        self._shards[split] += 1
        rest = rows[:, self._size :].copy()
        self._waiting[split], self._waiting_tokens[split] = [rest], rest.shape[1]

    def finish(self) -> dict[str, object]:
        """Write the remaining tokens; return the counts of documents, tokens, bytes and shards."""
        for split, tokens in self._waiting_tokens.items():
            if tokens:
                self._flush(split)
            self._counts[f"{split}_shards"] = self._shards[split]
        per_token = round(self._counts["bytes"] / max(self._counts["tokens"], 1), 4)
        return {**self._counts, "bytes_per_token": per_token}


def _encode(parts: Iterator[Part], model: Path, workers: int) -> Iterator[tuple[Split, np.ndarray]]:
    if workers == 1:
        for part in parts:
            yield from _encode_chunk(model, [part])
        return
    waiting: deque[Future[list[tuple[Split, np.ndarray]]]] = deque()
    # fork is not safe with threads
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for chunk in _chunks(parts):
            waiting.append(pool.submit(_encode_chunk, model, chunk))
            if len(waiting) > 3 * workers:  # enough to keep workers busy, without reading all text ahead
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()
    except BrokenProcessPool as error:
        hint = f"try again with fewer workers than {workers}"
        raise PgolfError(f"a tokenizing process died, perhaps for lack of memory: {hint}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(parts: Iterator[Part]) -> Iterator[list[Part]]:
    chunk: list[Part] = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part[1])
        if size >= _CHUNK_CHARS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(model: Path, chunk: list[Part]) -> list[tuple[Split, np.ndarray]]:
    tokenizer = _loaded(model)
    return [(split, _rows(tokenizer, split, text)) for split, text in chunk]


def _rows(tokenizer: Tokenizer, split: Split, text: str) -> np.ndarray:
    if split == "train" or not tokenizer.has_caseops:
        return np.array([tokenizer.encode_document(text)], dtype=np.uint16)
    ids, counts = tokenizer.encode_document_with_bytes(text)
    why = f"a token of the document {text[:40]!r} has {counts.max():,} bytes, more than a side file holds"
    need(int(counts.max()) <= 0xFFFF, f"{why}: shorten its longest run of white space")
    return np.stack((ids, counts)).astype(np.uint16)


_loaded = functools.lru_cache(maxsize=1)(Tokenizer.load)  # once per process


def expand(inputs: Iterable[Path | str]) -> list[Path]:
    """Return `inputs` with folders as their text files. Raises `PgolfError` for none or an unusable one."""
    files: list[Path] = []
    kinds = f"{', '.join(SUFFIXES)} files"
    for path in (paths := [Path(item) for item in inputs]):
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file()]
            files += sorted(p for p in inside if not p.name.startswith("."))  # macOS writes ._NAME
        elif not path.exists():
            link = f", a link to {os.readlink(path)}," if path.is_symlink() else ""
            raise PgolfError(f"{path}{link} does not exist: give {kinds} or folders of them")
        elif not (path.name.endswith(SUFFIXES) and path.is_file()):
            raise PgolfError(f"{path} is not a kind of file that can be read: give {kinds}")
        else:
            files.append(path)
    if not files:
        where = f" in {_names(paths)}" if paths else ""
        raise PgolfError(f"no files to tokenize{where}: give {kinds} or folders that hold some")
    seen: dict[Path, Path] = {}
    for path in files:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise PgolfError(f"{other} and {path} are the same file: give one of them")
    return files


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file that are not blank: a whole .txt, or the "text" of each line of a .jsonl.

    Raises `PgolfError` naming the file (and line) if it cannot be read.
    """
    try:
        if path.name.endswith(".txt"):
            text = path.read_text(encoding="utf-8-sig")
            if text.strip():
                yield text
            return
        opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _text_of(line, path, number)
                    if text.strip():
                        yield text
    except UnicodeDecodeError as error:
        why = f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first"
        raise PgolfError(why) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PgolfError(f"cannot read {path}: {error}; it is unreadable or damaged") from error


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        row = parse_json(line.strip(), f"{path} line {number}")
    except PgolfError as error:
        raise PgolfError(f"{str(error).replace(' (line 1)', '')}; {_LINES}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise PgolfError(f'{path} line {number} has no "text" string: {_LINES}')
    return text


@dataclass(frozen=True)
class Plan:
    """A split: validation gets the first documents, those with a low hash, or the end of a single one."""

    documents: int
    rule: str
    first: int = 0
    threshold: int = 0
    cut: float | None = None

    def parts(self, files: Sequence[Path], what: str) -> Iterator[tuple[Split, str]]:
        """Yield (split, text) of each document in order, with a progress bar labeled `what`."""
        texts = chain.from_iterable(map(read_documents, files))
        for number, text in enumerate(console.progress(texts, what, total=self.documents, unit="doc")):
            if self.cut is not None:
                head, tail = _cut(text, self.cut)
                yield "train", head
                yield "val", tail
            else:
                yield ("val" if number < self.first or _hash(text) < self.threshold else "train"), text


def make_plan(files: Sequence[Path], val_fraction: float | None, val_docs: int | None = None) -> Plan:
    """Read all documents and choose validation: the first `val_docs`, or a share by the sha1 of their text.

    Each split gets a document unless the share is 0 or 1. Raises `PgolfError` if both are given, or there is
    not enough text.
    """
    if None not in (val_docs, val_fraction):
        raise PgolfError(f"val_docs {val_docs} and val_fraction {val_fraction} are two splits: give one")
    share = 0.05 if val_fraction is None else val_fraction
    need(0 <= share <= 1, f"val_fraction is {share}; it must be from 0 to 1")
    count, lowest, highest, last = 0, _HASHES, -1, ""
    for last in console.progress(chain.from_iterable(map(read_documents, files)), "reading", unit="doc"):
        value = _hash(last)
        count, lowest, highest = count + 1, min(lowest, value), max(highest, value)
    need(count != 0, f"empty corpus: no text in {_names(files)}; give files with text in them")
    if val_docs is not None:
        hint = f"but {_names(files)} hold {count:,} documents: give more text, or 0 to {count:,}"
        need(0 <= val_docs <= count, f"val_docs is {val_docs:,}, {hint}")
        return Plan(count, f"first {val_docs:,} documents", first=val_docs)
    threshold, rule = int(share * _HASHES), f"{share:g} of the documents, by the hash of their text"
    if share in (0, 1):
        return Plan(count, rule, threshold=threshold)
    if count == 1:
        both = all(part.strip() for part in _cut(last, 1 - share))
        why = f"the only document in {_names(files)} is too short to use {share:.0%} of it for validation"
        need(both, f"{why}: give more text, or val_fraction 0")
        return Plan(count, f"last {share:g} of the only document", cut=1 - share)
    why = f"all {count} documents in {_names(files)} are the same: nothing is left for validation"
    need(lowest != highest, why)
    return Plan(count, rule, threshold=min(max(threshold, lowest + 1), highest))


def _hash(text: str) -> int:
    # of the text only: the split depends neither on the order nor on the names of the files
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
