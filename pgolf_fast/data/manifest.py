"""The manifest of a shard folder: its tokenizer, split and counts, checked whenever the folder is opened."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_fast.config.checks import need
from pgolf_fast.data.shards import Split, open_shard, shard_paths, side_file
from pgolf_fast.data.tokenizer import Tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import read_json, write_json

_FILE, _FORMAT = "manifest.json", "pgolf shards 1"
_LARGEST = 1 << 22  # bytes; a folder of 1,000 shards needs 1% of it
_SPLITS: tuple[Split, ...] = ("train", "val")


def write_manifest(folder: Path, tokenizer: Tokenizer, split: str, counts: Mapping[str, object]) -> None:
    """Describe the shards in `folder`: `split` is the rule that chose validation; `counts` are per split."""
    value = {"format": _FORMAT, "tokenizer_sha256": _digest(tokenizer), "vocab_size": tokenizer.vocab_size}
    write_json(folder / _FILE, {**value, "split": split, **counts, **_files(folder)})


def check_manifest(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the folder's manifest, if any. Raises `PgolfError` if it, the tokenizer or a shard differs."""
    path = folder / _FILE
    if path.is_dir() or not os.path.lexists(path):  # a link to nowhere is no missing file
        return None
    if (size := path.stat().st_size) > _LARGEST:
        raise PgolfError(f"{path} has {size:,} bytes, too many for a manifest: remove it")
    manifest = read_json(path)
    if manifest.get("format") != _FORMAT:
        return None
    made_with, split, before = (manifest.get(name) for name in ("tokenizer_sha256", "split", "shards"))
    why = f"{path} has no tokenizer_sha256, split or shards: it was changed; restore or remove it"
    need(isinstance(made_with, str) and isinstance(split, str) and isinstance(before, dict), why)
    given, hint = _digest(tokenizer), "give the one they were made with by --data.tokenizer"
    why = f"tokenizer {tokenizer.path} (sha256 {given[:12]}) is not that of the shards in {folder}"
    need(given == made_with, f"{why} (sha256 {made_with[:12]} in {_FILE}): {hint}")
    now = _files(folder)
    for kind in ("shards", "side_files"):
        before = manifest.get(kind)
        if not isinstance(before, dict):  # side files have been listed since CaseOps
            continue
        found = now.get(kind, {})
        for name in sorted(before.keys() | found.keys()):
            had, has = (
                f"{c:,} tokens" if isinstance(c := d.get(name), int) else "none" for d in (before, found)
            )
            hint = f"restore the {kind.replace('_', ' ')}, or remove {_FILE} if they were changed on purpose"
            need(had == has, f"{folder / name} has {has}, but {_FILE} says {had}: {hint}")
    return manifest


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def _files(folder: Path) -> dict[str, dict[str, int]]:
    """Return the token counts of all shards and, if there are any, of their side files."""
    shards = [path for split in _SPLITS for path in shard_paths(folder, split)]
    sides = [path for path in map(side_file, shards) if path.is_file()]
    named = {"shards": shards, "side_files": sides} if sides else {"shards": shards}
    return {kind: {p.name: open_shard(p).num_tokens for p in paths} for kind, paths in named.items()}
