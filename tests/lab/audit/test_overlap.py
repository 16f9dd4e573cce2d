from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from pgolf_fast.data.shards import BOS_ID, write_shard
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.audit import overlap
from pgolf_fast.lab.audit.overlap import Overlap, find_overlap


def documents(count: int, seed: int, length: int = 60) -> list[np.ndarray]:
    pick = np.random.default_rng(seed)
    return [pick.integers(4, 1000, length + i) for i in range(count)]


def write(folder: Path, split: str, docs: list[np.ndarray], *borders: int) -> None:
    flat = np.concatenate([np.append(BOS_ID, doc) for doc in docs])
    for number, part in enumerate(np.split(flat, borders)):
        write_shard(folder / f"text_{split}_{number:06d}.bin", part)


def found(folder: Path, val: list[np.ndarray], train: list[np.ndarray], *borders: int, **options) -> Overlap:
    for path in folder.glob("*.bin"):
        path.unlink()
    write(folder, "val", val)
    write(folder, "train", train, *borders)
    return find_overlap(folder, **options)


def test_disjoint_text_has_no_overlap(tmp_path: Path) -> None:
    result = found(tmp_path, documents(20, 1), documents(200, 2))
    assert (result.documents, result.copies, result.near, result.complete) == (20, 0, 0, True)
    total = sum(map(len, documents(200, 2))) + 200
    counts = "0 of 20 validation documents, 0 more nearly, and 0.0% of the 13-grams of tokens"
    assert result.text == f"{counts} are in {total:,} training tokens"


@pytest.mark.parametrize("block", [50, 1000, 1_000_000])
def test_copies_are_found_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Blocks and shards may end anywhere in a document; one that is cut there would not be found in parts."""
    monkeypatch.setattr(overlap, "_BLOCK", block)
    val, train = documents(20, 1), documents(50, 2)
    # the last document, which no BOS ends
    result = found(tmp_path, val, [*train, val[7]])
    assert (result.copies, result.near) == (1, 0)
    begin = sum(map(len, train)) + len(train) + 1
    at = sum(map(len, val[:7])) + 8
    place = f"text_val_000000.bin, token {at}, in text_train_000000.bin, token {begin:,}"
    assert result.text.endswith(f"; first the document at {place}")
    # a document cut by the border of two shards
    cut = sum(map(len, train[:9])) + 9 + 20
    result = found(tmp_path, val, [*train[:9], val[0], *train[9:]], cut)
    assert result.copies == 1
    assert "in text_train_000000.bin, token" in result.text
    # in another order, twice, and without training text between them
    result = found(tmp_path, val, [*val[::-1], *val])
    assert (result.copies, result.near) == (20, 0)
    assert "20 of 20 validation documents, 0 more nearly, and 100.0% of the 13-grams" in result.text
    assert found(tmp_path, val, [*val[::-1], *val], ngrams=False).copies == 20


def test_what_is_no_copy(tmp_path: Path) -> None:
    """The same tokens in other documents, or a document's first half, are no copy of it."""
    val = documents(4, 1)
    assert found(tmp_path, val, [np.concatenate(val), val[0][:30]]).copies == 0
    assert found(tmp_path, [val[0][:5]], [val[0][:6], val[0][1:5]]).copies == 0


def test_documents_of_validation_count_each(tmp_path: Path) -> None:
    """One that validation has twice is two; pieces without a token, as doubled BOS leave them, are none."""
    val, empty = documents(3, 1), np.zeros(0, np.int64)
    result = found(tmp_path, [val[0], empty, val[1], val[0], empty], [empty, val[0], empty, *documents(5, 2)])
    assert (result.documents, result.copies, result.near) == (3, 2, 0)


def test_near_copies_are_found_by_their_ngrams(tmp_path: Path) -> None:
    """A hash of the document finds no changed one."""
    val, train = documents(10, 1, 400), documents(30, 2)
    changed = val[3].copy()
    changed[[50, 200, 350]] += 1000
    half = np.concatenate([val[4][:200], documents(1, 3, 200)[0]])
    longer = np.concatenate([train[0], val[5], train[1]])
    result = found(tmp_path, val, [changed, *train, half, longer])
    assert (result.copies, result.near) == (0, 2)
    # 403 - 12 less 3 * 13, 200 - 12, and 405 - 12 of all
    share = (403 - 12 - 39 + 188 + 393) / sum(len(doc) - 12 for doc in val)
    assert f"0 of 10 validation documents, 2 more nearly, and {share:.1%} of the 13-grams" in result.text
    at = sum(map(len, val[:3])) + 4
    assert result.text.endswith(f"; first the document at text_val_000000.bin, token {at:,}, nearly")
    short = found(tmp_path, [val[0][:19]], [val[0][:30]])  # 7 n-grams, too few
    assert (short.copies, short.near) == (0, 0)


def test_a_sample_of_ngrams_estimates_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_SAMPLE", 4000)
    val = documents(100, 1, 400)
    result = found(tmp_path, val, [np.concatenate([doc[:200], doc[201:]]) for doc in val[:50]])
    assert (result.copies, result.near) == (0, 50)
    share = float(result.text.split(" and ")[1].split("%")[0])
    assert share == pytest.approx(100 * sum(len(doc) - 25 for doc in val[:50]) / 43750, abs=3)


def test_shards_without_bos_are_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_BLOCK", 100)
    tokens = np.random.default_rng(0).integers(4, 1000, 5000)
    write_shard(tmp_path / "a_val_0.bin", tokens[1000:1200])
    write_shard(tmp_path / "a_train_0.bin", tokens)
    result = find_overlap(tmp_path)
    assert (result.documents, result.copies, result.near) == (1, 0, 1)


def test_time_is_bounded_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_BLOCK", 1000)
    val, train = documents(5, 1), documents(100, 2)
    result = found(tmp_path, val, [*train, *val], seconds=0)
    assert (result.copies, result.complete) == (0, False)
    assert "training tokens" in result.text
    assert "are in the first 9" in result.text


def test_a_split_that_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "val", documents(2, 1))
    with pytest.raises(PgolfError, match=r"no \*_train_\*.bin shard in"):
        find_overlap(tmp_path)


def test_progress_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = iter(range(0, 1_000_000, 11))
    monkeypatch.setattr(overlap, "_BLOCK", 1000)
    monkeypatch.setattr("pgolf_fast.console.time.monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr("pgolf_fast.console.logger", logging.getLogger("test_overlap"))
    with caplog.at_level(logging.INFO):
        found(tmp_path, documents(2, 1), documents(40, 2))
    assert re.match(r"comparing: 1/5 M tokens, .* M tokens/s, ETA \S+$", caplog.messages[0])
