"""Helpers for the tests of `pgolf_fast.data`: the folder of real data, and small synthetic shards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pgolf_fast.data.shards import BOS_ID, Shard, write_shard


def real_data() -> Path:
    """The folder of real data; skips the test where it is missing."""
    folder = Path(os.environ.get("PGOLF_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set PGOLF_DATA")
    return folder


def counting_shards(folder: Path, *sizes: int) -> list[Shard]:
    """Training shards whose tokens count 0, 1, 2, ... across their borders."""
    shards, start = [], 0
    for index, size in enumerate(sizes):
        tokens = np.arange(start, start + size, dtype=np.uint16)
        shards.append(write_shard(folder / f"count_train_{index:06d}.bin", tokens))
        start += size
    return shards


def document_shards(folder: Path, lengths: list[int], *borders: int) -> list[Shard]:
    """Training shards of documents: BOS, then 100 * number + position; cut at `borders`."""
    flat = np.concatenate(
        [
            np.array([BOS_ID, *(100 * (number + 1) + np.arange(length - 1))], dtype=np.uint16)
            for number, length in enumerate(lengths)
        ]
    )
    parts = np.split(flat, borders)
    return [write_shard(folder / f"docs_train_{i:06d}.bin", part) for i, part in enumerate(parts)]


def die(*_: object) -> None:
    """End this process at once, as the system does when memory runs out."""
    os._exit(9)
