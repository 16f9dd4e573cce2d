"""Token shards: a 1024-byte header, then little-endian uint16 token ids."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pgolf_fast.config.checks import need
from pgolf_fast.console import logger
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC = 20240520
VERSION = 1
BOS_ID = 1
"""The first token of every document; there is no end marker."""

Split = Literal["train", "val"]
_NAME = re.compile(r"(?!\.).+_(train|val)_(bytes_)?\d+\.bin")
_CHECK_BLOCK = 1 << 22  # 8 MB of a memory-mapped file at a time


@dataclass(frozen=True)
class Shard:
    """A file of tokens whose header and size have been checked."""

    path: Path
    num_tokens: int

    @property
    def tokens(self) -> np.memmap:
        """The token ids, uint16 of shape (num_tokens,), memory-mapped."""
        return np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.num_tokens,))

    def document_starts(self) -> np.ndarray:
        """Return the positions of the BOS ids, int64 of shape (documents,)."""
        tokens, blocks = self.tokens, range(0, self.num_tokens, _CHECK_BLOCK)
        found = [at + np.flatnonzero(tokens[at : at + _CHECK_BLOCK] == BOS_ID) for at in blocks]
        return np.concatenate(found)


def open_shard(path: Path | str) -> Shard:
    """Open a shard. Raises `PgolfError` if it is missing, empty, truncated or another kind of file."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = np.frombuffer(handle.read(HEADER_BYTES), dtype=np.uint8)
    except OSError as error:
        why = f"cannot read shard {path}: {error.strerror}; give the path of a .bin token file"
        raise PgolfError(why) from error
    hint = "it is truncated or not a shard; download or tokenize it again"
    why = f"{path} has {size} bytes, less than the {HEADER_BYTES}-byte header of a shard: {hint}"
    need(size >= HEADER_BYTES, why)
    magic, version, count = (int(v) for v in header.view("<i4")[:3])
    hint = f"a shard has {MAGIC}; make shards with `pgolf data tokenize` or `pgolf data download`"
    need(magic == MAGIC, f"{path} is not a token shard: its first word is {magic}, {hint}")
    need(version == VERSION, f"{path} is a shard of version {version}; only version {VERSION} can be read")
    need(count > 0, f"{path} holds {count} tokens; a shard needs at least one: remove it or make it again")
    expected = HEADER_BYTES + 2 * count
    hint = "the file is damaged or was cut short; download or tokenize it again"
    why = f"{path} has {size} bytes, but its header says {count} tokens, which takes {expected} bytes: {hint}"
    need(size == expected, why)
    return Shard(path, count)


def check_tokens(shard: Shard, vocab_size: int, *, limit: int | None = None) -> None:
    """Raise `PgolfError` if one of the first `limit` ids is not below `vocab_size`."""
    tokens = shard.tokens[:limit]
    for start in range(0, len(tokens), _CHECK_BLOCK):
        block = tokens[start : start + _CHECK_BLOCK]
        if int(block.max()) >= vocab_size:
            raise_bad_token(shard, start, block, vocab_size)


def raise_bad_token(shard: Shard, start: int, block: np.ndarray, vocab_size: int) -> None:
    """Raise `PgolfError` for the first id in `block` that is too large; `block` starts at token `start`."""
    at = int(np.argmax(block >= vocab_size))
    why = f"{shard.path} has token id {int(block[at])} at position {start + at}"
    hint = "use shards made with this tokenizer, or set model.vocab_size to that of the shards"
    raise PgolfError(f"{why}, but model.vocab_size is {vocab_size}: {hint}")


def write_shard(path: Path | str, tokens: np.ndarray) -> Shard:
    """Write ids, integers of shape (n,) from 0 to 65535, as a shard, atomically."""
    tokens = np.asarray(tokens)
    why = f"cannot write {path}: got an array of shape {tokens.shape}; give at least one token, in one row"
    need(tokens.ndim == 1 and tokens.size != 0, why)
    need(tokens.dtype.kind in "iu", f"cannot write {path}: got {tokens.dtype} values; token ids are integers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 0xFFFF:
        raise PgolfError(f"cannot write {path}: token ids run from {low} to {high}; a shard holds 0 to 65535")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write(header.tobytes())
        handle.write(np.ascontiguousarray(tokens, dtype="<u2").data)
    return Shard(Path(path), int(tokens.size))


def data_folder(folder: Path | str) -> Path:
    """Return `folder` as a path. Raises `PgolfError` if it is not a folder."""
    folder = Path(folder)
    why = "is not a folder" if folder.exists() else "does not exist"
    name_one = "name one of *_train_*.bin and *_val_*.bin shards with --data.path"
    hint = f"{name_one}; without it, a new run takes the built-in corpus"
    need(folder.is_dir(), f"data folder {folder} {why}: {hint}")
    return folder


def shard_paths(folder: Path, split: Split) -> list[Path]:
    """Return the files NAME_{split}_NUMBER.bin of `folder` in reading order, sorted by name."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*.bin"))
    return sorted(path for name, path in named if name and name.group(1, 2) == (split, None))


def side_file(path: Path) -> Path:
    """Return the path of a shard's byte side file: x_val_bytes_000000.bin for x_val_000000.bin."""
    return path.with_name("_bytes_".join(path.name.rsplit("_", 1)))


def warn_of_others(folder: Path) -> None:
    """Warn of .bin files in `folder` that are neither shards nor side files, so they are not read."""
    shards = [*shard_paths(folder, "train"), *shard_paths(folder, "val")]
    if others := sorted({*folder.glob("[!.]*.bin")}.difference(shards, map(side_file, shards))):
        names = ", ".join(path.name for path in others[:5]) + ", ..." * (len(others) > 5)
        logger.warning("%s: ignored, because shards are not named like this: %s", folder, names)


def find_shards(folder: Path | str, split: Split) -> list[Shard]:
    """Open the shards of a split. Raises `PgolfError` if there is none or one is bad."""
    folder = data_folder(folder)
    paths = shard_paths(folder, split)
    make = "make some with `pgolf data tokenize` or `pgolf data download`"
    hint = f"{make}, or set data.path to the folder that holds them"
    need(paths, f"no *_{split}_*.bin shard in {folder}: {hint}")
    return [open_shard(path) for path in paths]


def load_validation(
    folder: Path | str, seq_len: int, *, vocab_size: int, max_tokens: int | None = None
) -> np.ndarray:
    """Return the validation tokens of whole sequences and one more: uint16 of shape (k * seq_len + 1,).

    `max_tokens` limits the number of targets. Raises `PgolfError` if not one sequence fits.
    """
    shards = find_shards(folder, "val")
    for shard in shards:
        check_tokens(shard, vocab_size)
    available = sum(shard.num_tokens for shard in shards)
    why = f"{folder} has {available} validation tokens, but one sequence of {seq_len} needs {seq_len + 1}"
    hint = "use a shorter train.seq_len (and eval.seq_len) or more text"
    need(available > seq_len, f"sequence longer than data: {why}; {hint}")
    wanted = available if max_tokens is None else min(available, max_tokens + 1)
    hint = f"less than one sequence of {seq_len} tokens: set it to {seq_len} or more, or leave it out"
    need(wanted >= seq_len + 1, f"data.val_tokens is {max_tokens}, {hint}")
    keep = (wanted - 1) // seq_len * seq_len + 1
    parts: list[np.ndarray] = []
    for shard in shards:
        parts.append(shard.tokens[: keep - sum(len(part) for part in parts)])
    return np.concatenate(parts)


def random_windows(shards: Sequence[Shard], count: int, length: int, *, seed: int) -> np.ndarray:
    """Return `count` different windows of `length` inputs and one more token, int64 (count, length + 1).

    Each shard is cut from a random position below `length` on; windows come in random order (PR 1394).
    Raises PgolfError if there are fewer.
    """
    generator = np.random.default_rng(seed)
    phases = generator.integers(length, size=len(shards))
    sizes = [max(0, s.num_tokens - 1 - int(p)) // length for s, p in zip(shards, phases, strict=True)]
    first = np.cumsum([0, *sizes])
    problem = f"{len(shards)} training shards have {first[-1]} windows of {length} tokens, not {count}"
    need(first[-1] >= count, f"{problem}: lower quant.calibration_sequences or quant.calibration_length")
    windows = np.empty((count, length + 1), np.int64)
    for row, window in zip(windows, generator.choice(first[-1], count, replace=False), strict=True):
        index = int(np.searchsorted(first, window, side="right")) - 1
        begin = int(phases[index]) + int(window - first[index]) * length
        row[:] = shards[index].tokens[begin : begin + length + 1]
    return windows
