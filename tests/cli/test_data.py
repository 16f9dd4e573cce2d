"""`pgolf data` as typed: splits, the overlap of a folder, and the names of its own options in messages."""

import json
import shutil

import numpy as np
import pytest

from pgolf_fast import cli
from pgolf_fast.data.shards import open_shard, write_shard


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty documents of one line."""
    path = tmp_path_factory.mktemp("texts") / "docs it's.jsonl"
    words = [f"word{chr(97 + i)}" for i in range(18)]
    pick = np.random.default_rng(0)
    lines = [json.dumps({"text": f"{i}: {' '.join(pick.permutation(words))}"}) for i in range(40)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def shards(texts):
    """Shards with the first ten documents for validation."""
    out = texts.parent / "out"
    assert (
        cli.main(
            ["data", "tokenize", str(texts), "--vocab-size", "300", "--val-docs", "10", "--out", str(out)]
        )
        == 0
    )
    return out


def call(capsys, *words):
    capsys.readouterr()
    status = cli.main(["data", *map(str, words)])
    return status, *capsys.readouterr()


def test_first_documents_for_validation(capsys, texts, tmp_path):
    out = tmp_path / "d 1"
    status, text, _ = call(capsys, "tokenize", texts, "--vocab-size", 300, "--val-docs", 10, "--out", out)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines()[:-1])
    assert (status, rows["val_documents"], rows["train_documents"]) == (0, "10", "30")
    assert rows["train_tokens"] == f"{open_shard(out / 'text_train_000000.bin').num_tokens:,}"
    assert f"pgolf train small --data.path '{out}' --model.vocab-size 300" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--val-docs", "41"], "val_docs is 41, but"),
        (
            ["--val-docs", "40"],
            "all 40 documents are for validation and none is left to train a tokenizer on",
        ),
        (
            ["--val-fraction", "1"],
            "all 40 documents are for validation and none is left to train a tokenizer on",
        ),
        (
            ["--val-docs", "5", "--val-fraction", "0.1"],
            "val_docs 5 and val_fraction 0.1 are two splits: give one",
        ),
        (
            ["--tokenizer", "none.model"],
            "none.model does not exist: give a SentencePiece .model file with --tokenizer",
        ),
    ],
)
def test_refused_splits(capsys, texts, tmp_path, words, message):
    status, _, err = call(capsys, "tokenize", texts, "--vocab-size", 300, "--out", tmp_path / "d", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_info_compares_validation_with_training(capsys, shards, tmp_path):
    status, out, _ = call(capsys, "info", shards)
    assert status == 0
    assert "validation: first 10 documents; tokenizer and token counts are those of the manifest" in out
    assert "overlap: 0 of 10 validation documents are in" in out
    assert "WARNING" not in out
    folder = shutil.copytree(shards, tmp_path / "d")
    (folder / "manifest.json").unlink()
    train, val = (
        np.asarray(open_shard(folder / f"text_{split}_000000.bin").tokens) for split in ("train", "val")
    )
    last = val[np.flatnonzero(val == 1)[-1] :]
    write_shard(folder / "text_train_000000.bin", np.concatenate([train, last]))
    for words in ([], ["--overlap"]):
        status, out, _ = call(capsys, "info", folder, *words)
        assert status == 0
        assert "overlap: 1 of 10 validation documents" in out
        assert f", in text_train_000000.bin, token {len(train) + 1:,}" in out
        assert "WARNING: validation text is in the training data" in out
    assert "% of the 13-grams" in out
    (folder / "text_train_000000.bin").unlink()
    status, out, _ = call(capsys, "info", folder)
    assert (status, "overlap" in out) == (0, False)
    assert "no *_train_*.bin shard" in call(capsys, "info", folder, "--overlap")[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none does not exist: make shards with"),
        ("empty", "empty holds no *_train_*.bin or *_val_*.bin: make shards with"),
        ("file", "file holds no"),
        ("bare", "name one with --tokenizer"),
        ("changed", "text_val_000000.bin has 9 tokens, but manifest.json says"),
    ],
)
def test_info_names_what_is_wrong(capsys, shards, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_shard(tmp_path / "x" / "y" / "bare" / "a_val_0.bin", np.arange(9))
    write_shard(shutil.copytree(shards, tmp_path / "changed") / "text_val_000000.bin", np.arange(9))
    folder = tmp_path / "x" / "y" / name if name == "bare" else tmp_path / name
    status, _, err = call(capsys, "info", folder)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert "--data.tokenizer" not in err
