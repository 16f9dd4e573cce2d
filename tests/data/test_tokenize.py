from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import die, real_data

from pgolf_fast.data import tokenize
from pgolf_fast.data.shards import BOS_ID, find_shards
from pgolf_fast.data.tokenize import tokenize_files
from pgolf_fast.data.tokenizer import Tokenizer, find_tokenizer, train_tokenizer
from pgolf_fast.errors import PgolfError

WORDS = [
    "some",
    "words",
    "that",
    "make",
    "up",
    "sentences",
    "of",
    "no",
    "great",
    "meaning",
    "but",
    "of",
    "a",
    "certain",
    "length",
]


def made_up(count: int, seed: int = 0) -> list[str]:
    pick = random.Random(seed)
    return [f"document {i} " + " ".join(pick.choices(WORDS, k=pick.randint(20, 80))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str], opener: Callable = open) -> Path:
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
    return path


def read_back(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(find_tokenizer(folder))
    flat = np.concatenate([s.tokens for s in find_shards(folder, split)])  # type: ignore[arg-type]
    parts = np.split(flat, np.flatnonzero(flat == BOS_ID))
    return [tokenizer.decode(part.tolist()) for part in parts if len(part)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_documents_are_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """In the order of the files, blank lines not counted. By line number, or per file, others would be."""
    monkeypatch.setattr(tokenize, "_CHUNK_DOCUMENTS", 7)
    texts = made_up(60)
    first = write_jsonl(tmp_path / "z.jsonl", [" ", *texts[:9]])
    (tmp_path / "m.txt").write_text(texts[9], encoding="utf-8")
    files = [first, tmp_path / "m.txt", write_jsonl(tmp_path / "a.jsonl.gz", texts[10:], gzip.open)]
    out = tmp_path / "out"
    result = tokenize_files(files, out=out, vocab_size=320, val_docs=12, shard_tokens=500, workers=workers)
    assert (result["val_documents"], result["train_documents"]) == (12, 48)
    val, train = ("".join(read_back(out, split)) for split in ("val", "train"))
    assert (val, train) == ("".join(texts[:12]), "".join(texts[12:]))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["split"] == "first 12 documents"
    assert manifest["val_documents"] == 12


def test_all_documents_may_be_validation_with_a_tokenizer(tmp_path: Path) -> None:
    file, model = (
        write_jsonl(tmp_path / "a.jsonl", made_up(20)),
        train_tokenizer(made_up(50), 310, tmp_path / "t"),
    )
    for name, split in (("a", {"val_docs": 20}), ("b", {"val_fraction": 1})):
        tokenize_files([file], out=tmp_path / name, vocab_size=310, tokenizer=model, **split)
        assert read_back(tmp_path / name, "val") == made_up(20)
        assert not list((tmp_path / name).glob("*_train_*"))
    tokenize_files([file], out=tmp_path / "c", vocab_size=310, val_docs=0)
    assert read_back(tmp_path / "c", "train") == made_up(20)


def test_files_of_other_programs_in_a_folder_of_texts(tmp_path: Path) -> None:
    """What macOS adds to each file it copies, an editor's swap file, a link to nowhere, a folder."""
    (tmp_path / "in").mkdir()
    file = write_jsonl(tmp_path / "in" / "a.jsonl", made_up(20))
    (tmp_path / "in" / "._a.jsonl").write_bytes(b"\0\5\x16\7\0\2\0\0")
    (tmp_path / "in" / ".a.jsonl.xz").write_bytes(b"")
    (tmp_path / "in" / "gone.txt").symlink_to("nowhere")
    (tmp_path / "in" / "folder.txt").mkdir()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    (tmp_path / "in" / "b.txt").write_bytes(b"\xef\xbb\xbf" + b"marked text " * 20)
    result = tokenize_files([tmp_path / "in"], out=tmp_path / "out", vocab_size=300, val_docs=1)
    assert (result["files"], result["documents"]) == (2, 21)
    assert read_back(tmp_path / "out", "train")[-1].rstrip() == " ".join(["marked text"] * 20)


def test_every_document_arrives_in_order(tmp_path: Path) -> None:
    texts = made_up(200)
    (tmp_path / "b.txt").write_text(texts[0] + "\n", encoding="utf-8")
    files = [
        tmp_path / "b.txt",
        write_jsonl(tmp_path / "a.jsonl", texts[1:100]),
        write_jsonl(tmp_path / "c.jsonl.gz", texts[100:150], gzip.open),
        write_jsonl(tmp_path / "d.jsonl.xz", texts[150:], lzma.open),
    ]
    result = tokenize_files(files, out=tmp_path / "out", vocab_size=330, val_fraction=0.2)
    train, val = read_back(tmp_path / "out", "train"), read_back(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    for part in (train, val):
        assert part == [text for text in texts if text in set(part)]
    assert 20 <= len(val) <= 60
    assert result["files"] == 4
    assert (result["documents"], result["train_documents"]) == (200, len(train))
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert result["tokens"] == sum(
        s.num_tokens for p in ("train", "val") for s in find_shards(tmp_path / "out", p)
    )  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock",
        "manifest.json",
        "text_train_000000.bin",
        "text_val_000000.bin",
        "tokenizer.model",
    ]


def test_workers_and_runs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_CHUNK_DOCUMENTS", 7)
    file = write_jsonl(tmp_path / "a.jsonl", made_up(100))
    for name, workers in (("one", 1), ("two", 2), ("auto", None)):
        tokenize_files([file], out=tmp_path / name, vocab_size=320, shard_tokens=1000, workers=workers)
    for path in (tmp_path / "one").glob("[!.]*"):
        for name in ("two", "auto"):
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()


def test_shards_are_full_but_the_last(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", made_up(100))
    result = tokenize_files([file], out=tmp_path / "out", vocab_size=320, shard_tokens=1000)
    sizes = [s.num_tokens for s in find_shards(tmp_path / "out", "train")]
    assert sizes[:-1] == [1000] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 1000
    assert len(sizes) == result["train_shards"] > 2
    assert len(read_back(tmp_path / "out", "train")) == result["train_documents"]
    tokenize_files([file], out=tmp_path / "whole", vocab_size=320)
    (whole,) = find_shards(tmp_path / "whole", "train")
    np.testing.assert_array_equal(
        np.concatenate([s.tokens for s in find_shards(tmp_path / "out", "train")]), whole.tokens
    )


def test_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = made_up(100)
    forward = write_jsonl(tmp_path / "a.jsonl", texts)
    backward = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    tokenize_files([forward], out=tmp_path / "f", vocab_size=320)
    tokenize_files([backward], out=tmp_path / "b", vocab_size=320)
    assert read_back(tmp_path / "f", "val") == read_back(tmp_path / "b", "val")[::-1]


def test_there_is_always_a_validation_and_a_training_document(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", made_up(3))
    tokenize_files([file], out=tmp_path / "low", vocab_size=290, val_fraction=0.0001)
    assert len(read_back(tmp_path / "low", "val")) == 1
    tokenize_files([file], out=tmp_path / "high", vocab_size=290, val_fraction=0.9999)
    assert len(read_back(tmp_path / "high", "train")) == 1
    tokenize_files([file], out=tmp_path / "none", vocab_size=290, val_fraction=0)
    assert len(read_back(tmp_path / "none", "train")) == 3
    assert not list((tmp_path / "none").glob("*_val_*"))


def test_a_lone_document_gives_its_end(tmp_path: Path) -> None:
    text = " ".join(made_up(40))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    tokenize_files([tmp_path / "book.txt"], out=tmp_path / "out", vocab_size=320, val_fraction=0.1)
    (train,), (val,) = read_back(tmp_path / "out", "train"), read_back(tmp_path / "out", "val")
    assert train + " " + val == text
    assert len(val) == pytest.approx(0.1 * len(text), rel=0.05)


def test_a_folder_is_read_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, text in enumerate(made_up(12)):
        (tmp_path / "in" / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "in" / "readme.md").write_text("not this")
    result = tokenize_files([tmp_path / "in"], out=tmp_path / "out", vocab_size=300)
    assert (result["files"], result["documents"]) == (12, 12)


def test_blank_documents_and_lines_are_left_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*made_up(20), "", "  \n "])
    file.write_text(file.read_text() + "\n\n")
    assert tokenize_files([file], out=tmp_path / "out", vocab_size=300)["documents"] == 20


def test_a_given_tokenizer_is_used_and_copied(tmp_path: Path) -> None:
    model = train_tokenizer(made_up(50, seed=1), 310, tmp_path / "mine")
    file = write_jsonl(tmp_path / "a.jsonl", made_up(20))
    tokenize_files([file], out=tmp_path / "out", vocab_size=310, tokenizer=model)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    with pytest.raises(
        PgolfError, match=r"mine.model has 310 pieces but vocab_size is 320: give vocab_size 310"
    ):
        tokenize_files([file], out=tmp_path / "out2", vocab_size=320, tokenizer=model)
    with pytest.raises(PgolfError, match=r"none.model does not exist"):
        tokenize_files([file], out=tmp_path / "out2", vocab_size=320, tokenizer=tmp_path / "none.model")


def test_a_tokenizer_with_another_bos_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up(50)), model_prefix=str(tmp_path / "t5"), vocab_size=300,
        bos_id=-1, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    file = write_jsonl(tmp_path / "a.jsonl", made_up(20))
    with pytest.raises(PgolfError, match=r"t5.model has BOS id -1; shards need id 1"):
        tokenize_files([file], out=tmp_path / "out", vocab_size=300, tokenizer=tmp_path / "t5.model")
    with pytest.raises(PgolfError, match=r"t5.model has no BOS piece"):
        Tokenizer.load(tmp_path / "t5.model").encode_document("text")


def bad_inputs(folder: Path) -> dict[str, tuple[list[Path], str]]:
    good = json.dumps({"text": "fine"}) + "\n"
    flipped = gzip.compress(good.encode() * 100)
    flipped = flipped[:-8] + bytes([flipped[-8] ^ 0xFF]) + flipped[-7:]
    contents: dict[str, tuple[bytes, str]] = {
        "no_text.jsonl": (good.encode() + b'{"txt": "x"}\n', r'no_text.jsonl line 2 has no "text" string'),
        "number.jsonl": (b'{"text": 3}\n', r'number.jsonl line 1 has no "text" string'),
        "list.jsonl": (b"[1]\n", r'list.jsonl line 1 has no "text" string'),
        "broken.jsonl": (good.encode() * 2 + b'{"text": \n', "broken.jsonl line 3 is not valid JSON: Exp"),
        "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl line 1 is not valid JSON in UTF-8: byte 13"),
        "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 text .* at byte 3"),
        "plain.jsonl.gz": (good.encode(), "cannot read .*plain.jsonl.gz: "),
        "cut.jsonl.gz": (gzip.compress(good.encode() * 100)[:-20], "cannot read .*cut.jsonl.gz: "),
        "plain.jsonl.xz": (good.encode(), "cannot read .*plain.jsonl.xz: "),
        "cut.jsonl.xz": (lzma.compress(good.encode() * 100)[:-20], "cannot read .*cut.jsonl.xz: "),
        "page.html": (b"<p>", r"page.html is not a kind of file that can be read: give .txt"),
        "empty.txt": (b"", "empty corpus: no text in .*empty.txt"),
        "short.txt": (b"x", "only document in .*short.txt is too short to use 5% of it for validation"),
        # a reader of JSONDecodeError alone would let the next two through as ValueError and RecursionError
        "digits.jsonl": (good.encode() + b"[%s]" % (b"9" * 5000), "digits.jsonl line 2 .*too many digits"),
        "deep.jsonl": (good.encode() * 2 + b"[" * 99999, "deep.jsonl line 3 .*nested too deeply"),
        "open.jsonl.gz": (gzip.compress(b'{"a": [' * 99999), "open.jsonl.gz line 1 .*nested too deeply"),
        "utf16.jsonl": (good.encode("utf-16"), "utf16.jsonl line 2 is not valid JSON"),
        "noise.jsonl.xz": (lzma.compress(good.encode() * 99)[:40] + b"\1" * 99, "cannot read .*noise.js"),
        "flipped.jsonl.gz": (flipped, "cannot read .*flipped.jsonl.gz: CRC"),
        "same.jsonl": (good.encode() * 4, "all 4 documents in .* are the same"),
    }
    cases = {}
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        cases[name] = ([folder / name], message)
    (folder / "bare").mkdir()
    cases["nothing"] = ([], "no files to tokenize: give .txt, .jsonl")
    cases["bare folder"] = ([folder / "bare"], "no files to tokenize")
    cases["missing"] = ([folder / "missing.txt"], "missing.txt does not exist")
    cases["many"] = ([folder / f"{i}.txt" for i in range(5)], "and 2 more files")
    for path in cases["many"][0]:
        path.touch()
    (folder / "both").mkdir()
    (folder / "both" / "a.jsonl").write_text(good)
    (folder / "both" / "b.jsonl").symlink_to("a.jsonl")
    cases["twice by link"] = ([folder / "both"], "a.jsonl and .*b.jsonl are the same file: give one of them")
    cases["twice"] = (
        [folder / "no_text.jsonl", folder],
        "no_text.jsonl and .*no_text.jsonl are the same file",
    )
    (folder / "link.txt").symlink_to("gone.txt")
    cases["link"] = ([folder / "link.txt"], "link.txt, a link to gone.txt, does not exist")
    (folder / "only").mkdir()
    (folder / "only" / "._a.txt").write_bytes(b"\0\5\x16\7")
    cases["hidden"] = ([folder / "only"], "no files to tokenize in .*only: give .txt")
    (folder / "name.txt").mkdir()
    cases["folder"] = ([folder / "name.txt"], "no files to tokenize in .*name.txt")
    os.mkfifo(folder / "pipe.txt")
    cases["pipe"] = ([folder / "pipe.txt"], "pipe.txt is not a kind of file that can be read")
    return cases


@pytest.mark.parametrize(
    "name",
    [
        "no_text.jsonl", "number.jsonl", "list.jsonl", "broken.jsonl", "latin.jsonl", "latin.txt",
        "plain.jsonl.gz", "cut.jsonl.gz", "plain.jsonl.xz", "cut.jsonl.xz", "page.html", "empty.txt",
        "short.txt", "same.jsonl", "nothing", "bare folder", "missing", "many",
        "digits.jsonl", "deep.jsonl", "open.jsonl.gz", "utf16.jsonl", "noise.jsonl.xz", "flipped.jsonl.gz",
        "twice", "twice by link", "link", "hidden", "folder", "pipe",
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    files, message = bad_inputs(tmp_path)[name]
    with pytest.raises(PgolfError, match=message) as caught:
        tokenize_files(files, out=tmp_path / "out", vocab_size=300)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 60_000}, "vocab_size 60000 is too large for this text: it supports at most"),
        ({"vocab_size": 100}, "vocab_size 100 is too small"),
        ({"vocab_size": 70_000}, "vocab_size is 70000; shards hold ids of 16 bits"),
        ({"vocab_size": 300, "val_fraction": 1.0}, "all 20 documents are for validation and none is left"),
        ({"vocab_size": 300, "val_docs": 20}, "all 20 documents are for validation and none is left"),
        ({"vocab_size": 300, "val_fraction": 1.1}, r"val_fraction is 1.1; it must be from 0 to 1"),
        ({"vocab_size": 300, "val_fraction": float("nan")}, r"val_fraction is nan; it must be from 0 to 1"),
        ({"vocab_size": 300, "val_docs": 21}, r"val_docs is 21, but .*a.jsonl hold 20 documents: give more"),
        ({"vocab_size": 300, "val_docs": -1}, "val_docs is -1, but"),
        ({"vocab_size": 300, "val_docs": 3, "val_fraction": 0.05}, "val_docs 3 and val_fraction 0.05 are"),
        ({"vocab_size": 300, "shard_tokens": 0}, "shard_tokens is 0"),
        ({"vocab_size": 300, "workers": 0}, "workers is 0"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict, message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", made_up(20))
    with pytest.raises(PgolfError, match=message):
        tokenize_files([file], out=tmp_path / "out", **settings)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}


def test_shards_that_are_there_are_not_mixed_in(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", made_up(20))
    tokenize_files([file], out=tmp_path / "out", vocab_size=300)
    with pytest.raises(PgolfError, match=r"out already holds shards \(text_train_000000.bin\)"):
        tokenize_files([file], out=tmp_path / "out", vocab_size=300)
    with pytest.raises(PgolfError, match=r"cannot make the folder .*a.jsonl"):
        tokenize_files([file], out=file, vocab_size=300)


@pytest.mark.parametrize("name", ["tokenizer.model", "manifest.json"])
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", made_up(30)), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(PgolfError, match=f"out/{name} would be replaced"):
        tokenize_files([source], out=out, vocab_size=300)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_two_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would find the folder empty and fill it; and what a killed one left is removed by the next."""
    file, out = write_jsonl(tmp_path / "a.jsonl", made_up(20)), tmp_path / "out"
    (out / ".tokenize-left" / "x").mkdir(parents=True)
    honest = tokenize.train_tokenizer

    def slow(*arguments: object) -> Path:
        with pytest.raises(PgolfError, match=r"out is in use: process \d+ on .* has held its lock"):
            tokenize_files([file], out=out, vocab_size=310)
        return honest(*arguments)

    monkeypatch.setattr(tokenize, "train_tokenizer", slow)
    tokenize_files([file], out=out, vocab_size=300)
    assert not list(out.glob(".tokenize-*"))
    assert Tokenizer.load(out / "tokenizer.model").vocab_size == 300


def test_a_dead_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", made_up(20))
    monkeypatch.setattr(tokenize, "_encode_chunk", die)
    with pytest.raises(PgolfError, match=r"a tokenizing process died.* fewer workers than 2"):
        tokenize_files([file], out=tmp_path / "out", vocab_size=300, workers=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_progress_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = iter(range(0, 1_000_000, 11))
    monkeypatch.setattr("pgolf_fast.console.time.monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr("pgolf_fast.console.logger", logging.getLogger("test_progress"))
    with caplog.at_level(logging.INFO):
        tokenize_files([write_jsonl(tmp_path / "a.jsonl", made_up(5))], out=tmp_path / "out", vocab_size=290)
    lines = caplog.messages
    assert any(line.startswith("training tokenizer: 3/5 doc") for line in lines)
    assert any(line.startswith("tokenizing: 5/5 doc") for line in lines)


def test_a_long_training_of_the_tokenizer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Progress by documents says nothing after the last of them."""
    monkeypatch.setattr(tokenize, "_QUIET_SECONDS", 0.01)
    monkeypatch.setattr("pgolf_fast.console.logger", logging.getLogger("test_progress"))
    honest = tokenize.train_tokenizer
    monkeypatch.setattr(tokenize, "train_tokenizer", lambda *a: (time.sleep(0.2), honest(*a))[1])
    with caplog.at_level(logging.INFO):
        tokenize_files([write_jsonl(tmp_path / "a.jsonl", made_up(5))], out=tmp_path / "out", vocab_size=290)
    assert any(re.match(r"training tokenizer: 0.\ds so far", line) for line in caplog.messages)


def test_the_challenges_tokens_come_out(tmp_path: Path) -> None:
    """Its validation text, tokenized again with its tokenizer, is the competition's own shard."""
    data = real_data()
    result = tokenize_files(
        [data / "docs" / "val_docs.jsonl.xz"],
        out=tmp_path,
        vocab_size=1024,
        tokenizer=data / "tokenizers" / "fineweb_1024_bpe.model",
        val_fraction=0,
    )
    assert (result["tokens"], result["bytes"]) == (524_320, 1_256_769)
    (mine,), (theirs,) = (
        find_shards(tmp_path, "train"),
        find_shards(data / "datasets" / "webmix_sp1024", "val"),
    )
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
