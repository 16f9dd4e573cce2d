from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pgolf_fast.config.schema import DataConfig
from pgolf_fast.data.manifest import check_manifest, write_manifest
from pgolf_fast.data.shards import write_shard
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_fast.errors import PgolfError

IDS = np.arange(100) % 50 + 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    texts = [f"some words of document {i} that make a text of their own" for i in range(40)]
    train_tokenizer(texts, 300, folder / "tokenizer")
    for number in range(2):
        write_shard(folder / f"text_train_{number:06d}.bin", IDS)
    write_shard(folder / "text_val_000000.bin", IDS)
    write_manifest(folder, Tokenizer.load(folder / "tokenizer.model"), "first 2 documents", {"documents": 9})
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "data")


def opened(folder: Path, tokenizer: Path | None = None) -> object:
    return open_source(DataConfig(path=str(folder), tokenizer=tokenizer and str(tokenizer)), 300)


def test_a_folder_as_it_was_made_is_opened(folder: Path) -> None:
    manifest = check_manifest(folder, Tokenizer.load(folder / "tokenizer.model"))
    assert manifest is not None
    assert (manifest["split"], manifest["documents"], manifest["vocab_size"]) == ("first 2 documents", 9, 300)
    assert manifest["shards"] == dict.fromkeys(
        ["text_train_000000.bin", "text_train_000001.bin", "text_val_000000.bin"], 100
    )
    opened(folder)


def test_other_folders_are_opened_as_before(folder: Path) -> None:
    (folder / "text_train_000001.bin").unlink()
    for other in ({}, {"format": "of another program", "shards": 3}):
        (folder / "manifest.json").write_text(json.dumps(other))
        opened(folder)
    (folder / "manifest.json").unlink()
    opened(folder)
    (folder / "manifest.json").mkdir()
    opened(folder)


def test_a_tokenizer_of_the_same_size_and_other_text_is_refused(folder: Path, tmp_path: Path) -> None:
    """A check of the vocabulary size alone would accept it and count other bytes."""
    other = train_tokenizer(
        [f"quite another text with number {i} in it" for i in range(50)], 300, tmp_path / "o"
    )
    with pytest.raises(
        PgolfError, match=r"tokenizer .*o.model \(sha256 \w{12}\) is not that of the shards in"
    ):
        opened(folder, other)
    shutil.copy(other, folder / "tokenizer.model")
    with pytest.raises(
        PgolfError, match=r"in manifest.json\): give the one they were made with by --data.tok"
    ):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: write_shard(f / "text_val_000000.bin", IDS[:-1]),
            "text_val_000000.bin has 99 tokens, but manifest.json says 100 tokens: restore the shards",
        ),
        (
            lambda f: (f / "text_train_000001.bin").unlink(),
            "text_train_000001.bin has none, but manifest.json says 100 tokens",
        ),
        (
            lambda f: write_shard(f / "text_val_000001.bin", IDS),
            "text_val_000001.bin has 100 tokens, but manifest.json says none",
        ),
        (
            lambda f: (f / "text_train_000001.bin").rename(f / "text_train_000002.bin"),
            "text_train_000001.bin has none",
        ),
        (
            lambda f: (f / "text_val_000000.bin").write_bytes((f / "text_val_000000.bin").read_bytes()[:-2]),
            "text_val_000000.bin has 1222 bytes, but its header says 100 tokens",
        ),
    ],
)
def test_shards_that_changed_are_named(folder: Path, change, message: str) -> None:
    change(folder)
    with pytest.raises(PgolfError, match=message):
        opened(folder)


FORMAT = b'{"format": "pgolf shards 1", '


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\0", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "holds a JSON list, not a dict"),
        (b"[" * 99_999, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b" " * ((1 << 22) + 1), "has 4,194,305 bytes, too many for a manifest: remove it"),
        (FORMAT + b'"shards": []}', "has no tokenizer_sha256, split or shards"),
        (
            FORMAT + b'"shards": {}, "split": null, "tokenizer_sha256": "a"}',
            "has no tokenizer_sha256, split or",
        ),
        (FORMAT + b'"shards": {}, "split": "x", "tokenizer_sha256": 3}', "has no tokenizer_sha256, split or"),
    ],
)
def test_a_manifest_that_was_changed_is_one_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(PgolfError, match=message) as caught:
        opened(folder)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", ["null", '"100"', "{}", "1e99", "-1", "true"])
def test_counts_of_other_kinds_agree_with_no_shard(folder: Path, count: str) -> None:
    text = (folder / "manifest.json").read_text().replace(": 100,", f": {count},", 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(PgolfError, match=r"text_train_000000.bin has 100 tokens, but manifest.json says"):
        opened(folder)
