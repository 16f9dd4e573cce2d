"""Counts of the shards in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast import console
from pgolf_fast.data.shards import BOS_ID, Shard, Split, check_tokens, data_folder, open_shard
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer, byte_table, scored_bytes
from pgolf_fast.errors import PgolfError

_BLOCK = 1 << 24


@dataclass(frozen=True)
class ShardInfo:
    """Counts of a shard."""

    file: str
    split: Split
    tokens: int
    documents: int
    """Documents that start in this shard, counted by BOS ids."""
    scored_bytes: int
    """Bytes of this shard's targets, the denominator of bits per byte."""
    bytes_per_token: float
    """scored_bytes per target."""


def describe(folder: Path | str, tokenizer: Tokenizer) -> list[ShardInfo]:
    """Return one row per training and validation shard of `folder`, in reading order.

    Raises `PgolfError` if there is no shard, one is bad, or it has ids the tokenizer does not know.
    """
    folder = data_folder(folder)
    splits: tuple[Split, ...] = ("train", "val")
    paths = [
        (path, split)
        for split in splits
        for path in sorted(folder.glob(f"*_{split}_*.bin"), key=lambda p: p.name)
    ]
    if not paths:
        raise PgolfError(
            f"no *_train_*.bin or *_val_*.bin shard in {folder}: make some with `pgolf data tokenize` "
            "or `pgolf data download`"
        )
    table = byte_table(tokenizer)
    return [
        _describe(open_shard(path), split, table)
        for path, split in console.progress(paths, "reading", unit="shard")
    ]


def _describe(shard: Shard, split: Split, table: ByteTable) -> ShardInfo:
    check_tokens(shard, len(table.base_bytes))
    tokens = shard.tokens
    documents = sum(
        int(np.count_nonzero(tokens[at : at + _BLOCK] == BOS_ID)) for at in range(0, len(tokens), _BLOCK)
    )
    count = scored_bytes(table, tokens)
    per_token = count / max(shard.num_tokens - 1, 1)
    return ShardInfo(shard.path.name, split, shard.num_tokens, documents, count, per_token)
