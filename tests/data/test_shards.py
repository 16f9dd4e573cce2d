from __future__ import annotations

import contextlib
import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_helpers import counting_shards, real_data

from pgolf_fast.config.schema import DataConfig
from pgolf_fast.console import logger
from pgolf_fast.data.shards import (
    HEADER_BYTES,
    MAGIC,
    check_tokens,
    find_shards,
    load_validation,
    open_shard,
    side_file,
    warn_of_others,
    write_shard,
)
from pgolf_fast.data.source import describe, open_source, returning
from pgolf_fast.data.tokenizer import (
    Tokenizer,
    byte_table,
    find_tokenizer,
    scored_bytes,
    target_bytes,
    train_tokenizer,
)
from pgolf_fast.errors import PgolfError


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 65536, 1000)
    written = write_shard(tmp_path / "a.bin", tokens)
    shard = open_shard(tmp_path / "a.bin")
    assert shard == written
    assert shard.tokens.dtype == np.uint16
    np.testing.assert_array_equal(shard.tokens, tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_the_layout_is_the_challenges(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([1, 258]))
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == HEADER_BYTES + 4
    assert raw[:12] == MAGIC.to_bytes(4, "little") + b"\1\0\0\0" + b"\2\0\0\0"
    assert raw[12:HEADER_BYTES] == bytes(HEADER_BYTES - 12)
    assert raw[HEADER_BYTES:] == b"\1\0\2\1"


@contextlib.contextmanager
def warnings_of() -> Iterator[list[str]]:
    """Collect what is warned of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def damage(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def shard_bytes(magic: int = MAGIC, version: int = 1, count: int = 2, tokens: int = 2) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + bytes(2 * tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, less than the 1024-byte header"),
        (bytes(1023), "has 1023 bytes, less than the 1024-byte header"),
        (shard_bytes(magic=7), "is not a token shard: its first word is 7, a shard has 20240520"),
        (shard_bytes(version=2), "is a shard of version 2; only version 1"),
        (shard_bytes(count=0, tokens=0), "holds 0 tokens"),
        (shard_bytes(count=-5), "holds -5 tokens"),
        (shard_bytes(count=3), "has 1028 bytes, but its header says 3 tokens, which takes 1030"),
        (shard_bytes(tokens=3), "has 1030 bytes, but its header says 2 tokens, which takes 1028"),
        (shard_bytes() + b"x", "has 1029 bytes"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = damage(tmp_path / "bad.bin", content)
    with pytest.raises(PgolfError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"cannot read shard .*none\.bin: No such file"):
        open_shard(tmp_path / "none.bin")


def test_foreign_ids_are_found_at_their_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgolf_fast.data.shards._CHECK_BLOCK", 10)
    tokens = np.full(100, 1023)
    tokens[57] = 1024
    path = tmp_path / "a.bin"
    shard = write_shard(path, tokens)
    with pytest.raises(
        PgolfError, match=r"a\.bin has token id 1024 at position 57, but model.vocab_size is 1024"
    ):
        check_tokens(open_shard(path), 1024)
    check_tokens(open_shard(path), 1025)
    check_tokens(shard, 1024, limit=57)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([], dtype=np.uint16), r"array of shape \(0,\)"),
        (np.zeros((2, 2), dtype=np.int64), r"array of shape \(2, 2\)"),
        (np.array([1.0]), "got float64 values"),
        (np.array([-1, 5]), "token ids run from -1 to 5"),
        (np.array([0, 65536]), "token ids run from 0 to 65536"),
    ],
)
def test_what_is_no_row_of_ids_is_not_written(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    with pytest.raises(PgolfError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_shards_are_found_in_order_of_name(tmp_path: Path) -> None:
    for name in ("x_train_000010.bin", "x_train_000002.bin", "x_val_000000.bin", "other.bin"):
        write_shard(tmp_path / name, np.array([1]))
    assert [s.path.name for s in find_shards(tmp_path, "train")] == [
        "x_train_000002.bin",
        "x_train_000010.bin",
    ]
    assert [s.path.name for s in find_shards(tmp_path, "val")] == ["x_val_000000.bin"]


def test_only_names_of_shards_are_shards(tmp_path: Path) -> None:
    """A pattern like *_val_* reads all of the others as validation text."""
    shards = ["a_val_0.bin", "fineweb_val_000000.bin", "my_val_bytes_val_000001.bin"]
    sides = ["a_val_bytes_0.bin", "fineweb_val_bytes_000000.bin"]
    others = ["fineweb_val_000000_copy.bin", "fineweb_val_bytes_000007.bin", "fineweb_val_old.bin", "x.bin"]
    for name in [*shards, *sides, *others, "._fineweb_val_000000.bin", "fineweb_val_000000.bin.tmp"]:
        (tmp_path / name).write_bytes(shard_bytes())
    assert [shard.path.name for shard in find_shards(tmp_path, "val")] == shards
    with pytest.raises(PgolfError, match=r"no .*_train_"):
        find_shards(tmp_path, "train")
    with warnings_of() as said:
        warn_of_others(tmp_path)
    assert said == [f"{tmp_path}: ignored, because shards are not named like this: {', '.join(others)}"]


def test_missing_folder_and_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"does not exist: name one of .* with --data.path"):
        find_shards(tmp_path / "none", "train")
    with pytest.raises(PgolfError, match=r"is not a folder"):
        find_shards(damage(tmp_path / "file", b""), "train")
    with pytest.raises(PgolfError, match=r"no \*_val_\*\.bin shard in"):
        find_shards(tmp_path, "val")


def validation_folder(folder: Path) -> Path:
    write_shard(folder / "x_val_000000.bin", np.arange(0, 7))
    write_shard(folder / "x_val_000001.bin", np.arange(7, 20))
    return folder


@pytest.mark.parametrize(
    ("seq_len", "max_tokens", "kept"),
    [(4, None, 17), (19, None, 20), (6, None, 19), (4, 8, 9), (4, 11, 9), (4, 1000, 17), (3, 3, 4)],
)
def test_validation_is_whole_sequences_and_one(
    tmp_path: Path, seq_len: int, max_tokens: int | None, kept: int
) -> None:
    folder = validation_folder(tmp_path)
    tokens = load_validation(folder, seq_len, vocab_size=20, max_tokens=max_tokens)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.arange(kept))


def test_validation_shorter_than_a_sequence(tmp_path: Path) -> None:
    folder = validation_folder(tmp_path)
    with pytest.raises(
        PgolfError, match=r"sequence longer than data: .* has 20 validation tokens.* of 20 needs 21"
    ):
        load_validation(folder, 20, vocab_size=20)
    with pytest.raises(PgolfError, match=r"data.val_tokens is 3, less than one sequence of 4 tokens"):
        load_validation(folder, 4, vocab_size=20, max_tokens=3)
    with pytest.raises(PgolfError, match=r"token id 19 at position 12"):
        load_validation(folder, 4, vocab_size=19)


def test_real_shards() -> None:
    folder = real_data() / "datasets" / "webmix_sp1024"
    assert [s.num_tokens for s in find_shards(folder, "train")] == [7_983_048, 7_980_476]
    tokens = load_validation(folder, 2048, vocab_size=1024)
    assert len(tokens) == 256 * 2048 + 1


def test_describe_real_shards() -> None:
    folder = real_data() / "datasets" / "smoke_sp1024"
    rows = describe(folder, Tokenizer.load(find_tokenizer(folder)))
    assert [(r.split, r.tokens, r.documents, r.scored_bytes) for r in rows] == [
        ("train", 133_627, 56, 315_575),
        ("val", 35_859, 23, 90_060),
    ]
    assert rows[1].bytes_per_token == pytest.approx(90_060 / 35_858)


# Byte side files, and text of another tokenizer

DOCUMENTS = [
    f"{name} read {count} quiet letters by the river, and nobody knew why the café was closed. " * 9
    for count, name in enumerate(["Ada", "Ben", "Cleo", "Dan", "Eve", "Flo"])
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of documents and their tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    return tokenized(folder, Tokenizer.load(train_tokenizer(DOCUMENTS, 350, folder / "tokenizer")))


def tokenized(folder: Path, tokenizer: Tokenizer) -> Path:
    for name, part in (("train_0", DOCUMENTS), ("val_0", DOCUMENTS[:4]), ("val_1", DOCUMENTS[4:])):
        ids = np.concatenate([tokenizer.encode_document(text) for text in part])
        write_shard(folder / f"t_{name}.bin", ids)
    return folder


def with_sides(texts: Path, folder: Path, change=lambda counts: counts, names=("val_0", "val_1")) -> Path:
    """Copy `texts` with side files, which hold one byte more for every 50th token than the pieces."""
    shutil.copytree(texts, folder)
    table = byte_table(Tokenizer.load(texts / "tokenizer.model"))
    for name in names:
        tokens = np.array(open_shard(texts / f"t_{name}.bin").tokens)
        counts = np.append(0, target_bytes(table, tokens[:-1], tokens[1:]))
        counts[1:][(tokens[1:] != 1) & (np.arange(1, len(tokens)) % 50 == 0)] += 1
        write_shard(side_file(folder / f"t_{name}.bin"), change(counts))
    return folder


def test_side_files_are_the_bytes(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"has 350 pieces but model.vocab_size is 1024: set"):
        open_source(DataConfig(path=str(texts)), 1024)
    plain = open_source(DataConfig(path=str(texts)), 350)
    assert plain.side_bytes(plain.validation(16)) is None
    source = open_source(DataConfig(path=str(with_sides(texts, tmp_path / "s"))), 350)
    tokens = source.validation(16)
    np.testing.assert_array_equal(tokens, plain.validation(16))  # side files are no text
    counts = source.side_bytes(tokens)
    assert counts is not None
    sides = [open_shard(tmp_path / "s" / f"t_val_bytes_{i}.bin").tokens for i in (0, 1)]
    np.testing.assert_array_equal(counts, np.concatenate(sides)[1 : len(tokens)])
    assert counts.sum() > scored_bytes(source.table, tokens)
    rows = describe(tmp_path / "s", source.tokenizer)
    assert [row.scored_bytes for row in rows[1:]] == [int(side[1:].sum(dtype=np.int64)) for side in sides]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts[:-1], r"bytes of \d+ tokens, but t_val_0.bin has .* use the side file"),
        (lambda counts: np.roll(counts, 1), "and none of BOS tokens"),  # with the right sum
        (lambda counts: counts + (np.arange(len(counts)) % 8 == 3) * (counts > 0) * 2, "t_val_0.bin has"),
        (lambda counts: counts * 0 + (counts > 0), "t_val_bytes_0.bin counts"),  # a token, a byte
        (lambda counts: counts[:0:-1].repeat(2)[: len(counts)], "t_val_bytes_0.bin counts"),
    ],
    ids=["shorter", "shifted", "too many", "too few", "another text's"],
)
def test_side_files_of_something_else_are_refused(texts: Path, tmp_path: Path, change, message: str) -> None:
    folder = with_sides(texts, tmp_path / "s", change)
    source = open_source(DataConfig(path=str(folder)), 350)
    with pytest.raises(PgolfError, match=message) as caught:
        source.side_bytes(source.validation(16))
    assert "t_val_bytes_0.bin" in str(caught.value)
    with pytest.raises(PgolfError, match=message):
        describe(folder, source.tokenizer)


def test_side_files_at_other_tokens_are_warned_of(texts: Path, tmp_path: Path) -> None:
    bos = [open_shard(texts / f"t_val_{i}.bin").tokens == 1 for i in (0, 1)]
    shifted = lambda counts: np.roll(counts, 1) * ~next(b for b in bos if len(b) == len(counts))  # noqa: E731
    folder = with_sides(texts, tmp_path / "s", shifted)
    source = open_source(DataConfig(path=str(folder)), 350)
    with warnings_of() as said:
        source.side_bytes(source.validation(16))
    assert "counts bytes at other tokens than t_val_0.bin" in said[0]


def test_a_side_file_that_leads_nowhere_is_not_passed_over(texts: Path, tmp_path: Path) -> None:
    folder = with_sides(texts, tmp_path / "s")
    for name in ("t_val_bytes_0.bin", "t_val_bytes_1.bin"):
        (folder / name).unlink()
        (folder / name).symlink_to("nowhere")
    source = open_source(DataConfig(path=str(folder)), 350)
    with pytest.raises(PgolfError, match=r"t_val_bytes_0.bin: No such file"):
        source.side_bytes(source.validation(16))


def test_a_missing_side_file_is_named(texts: Path, tmp_path: Path) -> None:
    source = open_source(DataConfig(path=str(with_sides(texts, tmp_path / "s", names=["val_1"]))), 350)
    with pytest.raises(PgolfError, match=r"2 validation shards but 1 side files like"):
        source.side_bytes(source.validation(16))


def test_text_of_another_tokenizer_is_warned_of(texts: Path, tmp_path: Path) -> None:
    """Of the same size, so that every id exists; bytes would be counted all the same."""
    words = ["seven", "wizards", "brew", "potent", "ale", "lazy", "dogs", "jump", "over", "quick", "foxes"]
    mixed = [" ".join(random.Random(i).choices(words, k=99)) for i in range(9)]
    other = Tokenizer.load(train_tokenizer(mixed, 350, tmp_path / "other"))
    own = Tokenizer.load(texts / "tokenizer.model")
    with warnings_of() as said:
        assert all(row.scored_bytes for row in describe(texts, own))
        source = open_source(DataConfig(path=str(texts)), 350)
        source.train_shards(), source.side_bytes(source.validation(16))
    assert said == []
    for tokenizer, split in ((other, "train"), (other, "val")):
        with warnings_of() as said:
            source = open_source(DataConfig(path=str(texts), tokenizer=str(tokenizer.path)), 350)
            source.train_shards() if split == "train" else source.side_bytes(source.validation(16))
        (warning,) = said
        assert warning.startswith(
            f"{texts}/t_{split}_0.bin does not look like text of tokenizer {other.path}: 0 of"
        )
    with warnings_of() as said:
        rows = describe(texts, other)
    assert len(said) == 3
    assert [(row.scored_bytes, row.bytes_per_token) for row in rows] == [(None, None)] * 3


def test_documents_may_be_marked_in_other_ways(texts: Path) -> None:
    tokenizer = Tokenizer.load(texts / "tokenizer.model")
    parts = [tokenizer.encode(text) for text in DOCUMENTS]
    for mark in (lambda ids: ids, lambda ids: [1, 1, *ids], lambda ids: [1, *ids, 2], lambda ids: [*ids, 1]):
        same, tried = returning(np.array([i for ids in parts for i in mark(ids)]), tokenizer)
        assert same == tried > 0
    for start in range(9):  # inside of words and before spaces, as a later shard without BOS may begin
        assert returning(np.array(parts[0][start:]), tokenizer) == (1, 1)
    unused = [[*ids[:50], 3, *ids[50:]] for ids in parts]  # an unknown piece inside the text
    assert returning(np.array([i for ids in unused for i in [1, *ids]]), tokenizer) == (0, 6)


def test_describe_says_what_is_missing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(real_data() / "tokenizers" / "fineweb_1024_bpe.model")
    with pytest.raises(PgolfError, match=r"does not exist"):
        describe(tmp_path / "none", tokenizer)
    with pytest.raises(PgolfError, match=r"no \*_train_\*\.bin or \*_val_\*\.bin shard"):
        describe(tmp_path, tokenizer)
    counting_shards(tmp_path, 2000)
    with pytest.raises(PgolfError, match=r"token id 1024 at position 1024"):
        describe(tmp_path, tokenizer)


def test_importing_the_room_needs_no_torch() -> None:
    names = ("shards", "loader", "tokenizer", "corpus", "tokenize", "download", "source")
    code = "; ".join(f"import pgolf_fast.data.{name}" for name in names)
    heavy = "{'torch', 'sentencepiece', 'huggingface_hub', 'tqdm'}"
    code += f"; import sys; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("[]\n", "")
