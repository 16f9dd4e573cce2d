"""Tokenization of text files to shards."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import numpy as np

from pgolf_fast.data.shards import BOS_ID, write_shard
from pgolf_fast.data.texts import expand, make_plan
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer, byte_table, scored_bytes, train_tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import available_cores, write_bytes

Split = Literal["train", "val"]
Part = tuple[Split, str]

_CHUNK_CHARS = 500_000
_CHUNK_DOCUMENTS = 500
_ALONE_BYTES = 16_000_000
"""Input size in bytes below which starting worker processes would take longer than it saves."""

_tokenizer: Tokenizer | None = None
"""The tokenizer of a worker process."""


def tokenize_files(
    files: Iterable[Path | str],
    *,
    out: Path | str,
    vocab_size: int,
    tokenizer: Path | str | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
) -> dict[str, object]:
    """Write the documents of `files` as shards and a tokenizer to `out`, and return counts.

    A .txt file is one document; .jsonl, .jsonl.gz and .jsonl.xz hold one in the "text" of each line.
    Validation documents are chosen by the hash of their text, or are the end of a single document. Without
    `tokenizer`, one of `vocab_size` pieces is trained on the training documents. Raises `PgolfError` for bad
    input, and writes no shards then.
    """
    start = time.monotonic()
    if shard_tokens < 1:
        raise PgolfError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    if workers is not None and workers < 1:
        raise PgolfError(f"workers is {workers}; it must be at least 1")
    if not 1 <= vocab_size <= 1 << 16:
        raise PgolfError(f"vocab_size is {vocab_size}; shards hold ids of 16 bits, so it must be 1 to 65536")
    paths, folder = expand(files), Path(out)
    given = None if tokenizer is None else _given_tokenizer(tokenizer, vocab_size)
    _check_folder(folder)
    plan = make_plan(paths, val_fraction)
    if workers is None:
        small = sum(path.stat().st_size for path in paths) < _ALONE_BYTES
        workers = 1 if small else available_cores()
    with tempfile.TemporaryDirectory(prefix=".tokenize-", dir=folder) as temporary:
        building = Path(temporary)
        if given is None:
            texts = (text for split, text in plan.parts(paths, "training tokenizer") if split == "train")
            given = Tokenizer.load(train_tokenizer(texts, vocab_size, building / "tokenizer"))
        else:
            write_bytes(building / "tokenizer.model", given.path.read_bytes())
        writer = _Writer(building, shard_tokens, byte_table(given))
        for split, ids in _encode(plan.parts(paths, "tokenizing"), building / "tokenizer.model", workers):
            writer.add(split, ids)
        counts = writer.finish()
        for path in sorted(building.iterdir()):
            os.replace(path, folder / path.name)
    return {"out": str(folder), "files": len(paths), **counts, "seconds": round(time.monotonic() - start, 3)}


def _given_tokenizer(path: Path | str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise PgolfError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces but vocab_size is {vocab_size}: "
            f"give vocab_size {tokenizer.vocab_size}, or leave the tokenizer out to train one"
        )
    if tokenizer.bos_id != BOS_ID:
        raise PgolfError(
            f"tokenizer {path} has BOS id {tokenizer.bos_id}; shards need id {BOS_ID} to open each document: "
            "use another tokenizer or leave it out to train one"
        )
    return tokenizer


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PgolfError(f"cannot make the folder {folder}: {error.strerror}; choose another") from error
    old = sorted(folder.glob("*_train_*.bin")) + sorted(folder.glob("*_val_*.bin"))
    if old:
        raise PgolfError(
            f"{folder} already holds shards ({old[0].name}): remove them or choose another folder"
        )
    if not os.access(folder, os.W_OK):
        raise PgolfError(f"cannot write to {folder}: make it writable or choose another folder")


class _Writer:
    """Collects the tokens of each split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, shard_tokens: int, table: ByteTable):
        self._folder, self._size, self._table = folder, shard_tokens, table
        self._waiting: dict[Split, list[np.ndarray]] = {"train": [], "val": []}
        self._waiting_tokens: dict[Split, int] = {"train": 0, "val": 0}
        self._shards: dict[Split, int] = {"train": 0, "val": 0}
        self._counts: dict[str, int] = {}

    def add(self, split: Split, ids: np.ndarray) -> None:
        """Add a document. Its first token is BOS, so bytes can be counted per document."""
        self._waiting[split].append(ids)
        self._waiting_tokens[split] += len(ids)
        for name, amount in (
            ("documents", 1),
            ("tokens", len(ids)),
            ("bytes", scored_bytes(self._table, ids)),
        ):
            for key in (name, f"{split}_{name}"):
                self._counts[key] = self._counts.get(key, 0) + amount
        while self._waiting_tokens[split] >= self._size:
            self._flush(split)

    def _flush(self, split: Split) -> None:
        tokens = np.concatenate(self._waiting[split])
        write_shard(self._folder / f"text_{split}_{self._shards[split]:06d}.bin", tokens[: self._size])
        self._shards[split] += 1
        rest = tokens[self._size :]
        self._waiting[split] = [rest.copy()] if len(rest) else []
        self._waiting_tokens[split] = len(rest)

    def finish(self) -> dict[str, object]:
        """Write the remaining tokens; return the counts of documents, tokens, bytes and shards."""
        for split in self._waiting:
            if self._waiting_tokens[split]:
                self._flush(split)
            self._counts[f"{split}_shards"] = self._shards[split]
        counts = self._counts
        return {
            **counts,
            "bytes_per_token": round(counts.get("bytes", 0) / max(counts.get("tokens", 0), 1), 4),
        }


def _encode(parts: Iterator[Part], model: Path, workers: int) -> Iterator[tuple[Split, np.ndarray]]:
    """Yield documents as tokens, in order."""
    if workers == 1:
        tokenizer = Tokenizer.load(model)
        for split, text in parts:
            yield split, _ids(tokenizer, text)
        return
    waiting: deque[tuple[list[Split], Future[list[np.ndarray]]]] = deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(model,))
    try:
        for chunk in _chunks(parts):
            waiting.append(
                ([split for split, _ in chunk], pool.submit(_encode_chunk, [text for _, text in chunk]))
            )
            if len(waiting) > 3 * workers:  # enough to keep workers busy, without reading all text ahead
                splits, future = waiting.popleft()
                yield from zip(splits, future.result(), strict=True)
        for splits, future in waiting:
            yield from zip(splits, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise PgolfError(
            f"a tokenizing process died, perhaps for lack of memory: try again with fewer workers than "
            f"{workers}"
        ) from error
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


def _start_worker(model: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(model)


def _encode_chunk(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return [_ids(_tokenizer, text) for text in texts]


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode_document(text), dtype=np.uint16)
