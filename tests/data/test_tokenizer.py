from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import real_data

from pgolf_fast.data.corpus import ngram_floors
from pgolf_fast.data.shards import find_shards
from pgolf_fast.data.tokenizer import (
    OPERATORS,
    ByteTable,
    Tokenizer,
    byte_table,
    counting_fault,
    find_tokenizer,
    scored_bytes,
    target_bytes,
    train_tokenizer,
)
from pgolf_fast.errors import PgolfError

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "potent",
    "café",
    "ale",
    "in",
    "1987",
]


def some_text(words: int = 3000, seed: int = 0) -> str:
    pick = random.Random(seed)
    return " ".join("".join(pick.choices(WORDS, k=pick.randint(1, 2))) for _ in range(words))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(train_tokenizer([some_text()], 320, tmp_path_factory.mktemp("sp") / "small"))


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.load(real_data() / "tokenizers" / "fineweb_1024_bpe.model")


def test_text_survives(small: Tokenizer) -> None:
    for text in ("the quick brown fox", "日本 🙂 naïve", "7 + 1987", ""):
        assert small.decode(small.encode(text)) == text
    assert small.encode_document("fox") == [1, *small.encode("fox")]
    assert small.bos_id == 1
    assert small.decode([1, *small.encode("fox"), 2]) == "fox"


def test_lone_surrogates_and_control_pieces_in_text_are_text(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud800b")) == "a?b"
    assert not {0, 1, 2, 3} & set(small.encode("<s> </s> <pad> <unk>"))


def test_trained_tokenizer_is_like_the_challenges(small: Tokenizer) -> None:
    assert small.vocab_size == 320
    assert [small.piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [small.piece(4 + b) for b in range(256)] == [f"<0x{b:02X}>" for b in range(256)]
    assert all(small.is_byte(i) for i in range(4, 260))
    assert small.piece(small.encode("the")[0])[0] != "\u2581"  # no dummy prefix
    assert all(len(small.piece(i).strip("\u2581")) == 1 for i in small.encode("1987"))  # digits are split
    assert small.encode("ﬁx") == small.encode("fix")  # nmt_nfkc


def test_training_is_deterministic_and_quiet(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]; from test_tokenizer import some_text\n"
        "from pgolf_fast.data.tokenizer import train_tokenizer\n"
        "for name in 'ab': train_tokenizer([some_text(), some_text(seed=1)], 300, sys.argv[1] + '/' + name)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *map(str, Path(__file__).parents[:2])],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
    )
    assert (out.stdout, out.stderr) == (b"", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]
    model = (tmp_path / "a.model").read_bytes()
    assert model == (tmp_path / "b.model").read_bytes()
    assert str(tmp_path).encode() not in model


def test_long_texts_are_not_skipped(tmp_path: Path) -> None:
    """SentencePiece drops sentences over its length limit; a document of one line is much longer."""
    tokenizer = Tokenizer.load(train_tokenizer([some_text(40_000) + "z" * 50_000], 400, tmp_path / "a"))
    assert any("quick" in tokenizer.piece(i) for i in range(260, 400))
    assert any("zzzz" in tokenizer.piece(i) for i in range(260, 400))


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world"], 1024, "vocab_size 1024 is too large for this text: it supports at most 286 pieces"),
        (["hello world"], 262, "vocab_size 262 is too small: .* need at least 268"),
        ([], 300, "the text is empty"),
        (["", " \n\t "], 300, "the text is empty"),
    ],
)
def test_training_on_too_little(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(PgolfError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [PgolfError("line 7 is bad"), KeyboardInterrupt("stop")])
def test_what_goes_wrong_in_the_texts_is_not_hidden(tmp_path: Path, error: BaseException) -> None:
    def texts() -> Iterator[str]:
        yield some_text()
        raise error

    with pytest.raises(type(error)) as caught:
        train_tokenizer(texts(), 300, tmp_path / "a")
    assert caught.value is error


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"none.model does not exist: give a SentencePiece"):
        Tokenizer.load(tmp_path / "none.model")
    for content in (b"", b"hello", bytes(100)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(PgolfError, match=r"bad.model is not a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")


def test_the_reason_is_sentencepieces_own(small: Tokenizer, tmp_path: Path) -> None:
    whole, path = small.path.read_bytes(), tmp_path / "bad.model"
    for content, reason in (
        (whole.replace(b"\x0a\x03<s>", b"\x0a\x03<\0>"), r"\(piece must not include null character\.\)"),
        (whole[:1000], r"\(it cannot be parsed\)"),  # not the line of SentencePiece's source
        (b"", r"\(unk is not defined\.\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(PgolfError, match=rf"not a SentencePiece model {reason}: give a .model file"):
            Tokenizer.load(path)


def test_unknown_ids_are_refused(small: Tokenizer) -> None:
    with pytest.raises(PgolfError, match=r"token id 320 does not exist: .* has 320 pieces"):
        small.decode([5, 320])
    table = byte_table(small)
    with pytest.raises(PgolfError, match=r"token ids run from 5 to 320, but the tokenizer has 320 pieces"):
        target_bytes(table, np.array([1, 1]), np.array([5, 320]))


# --- bytes


def test_byte_table_of_each_kind_of_piece(small: Tokenizer) -> None:
    table = byte_table(small)
    assert (table.base_bytes.dtype, table.has_leading_space.dtype, table.is_boundary.dtype) == (
        np.int16,
        np.bool_,
        np.bool_,
    )
    assert table.is_boundary.tolist() == [True] * 4 + [False] * 316
    assert table.base_bytes[:4].tolist() == [0] * 4
    assert (table.base_bytes[4:260] == 1).all()
    assert not table.has_leading_space[:260].any()
    pieces = {small.piece(i): i for i in range(260, 320)}
    marker, accent = pieces["\u2581"], pieces["é"]
    assert (table.base_bytes[marker], table.has_leading_space[marker]) == (0, True)
    assert (table.base_bytes[accent], table.has_leading_space[accent]) == (2, False)
    for piece, token in pieces.items():
        assert table.has_leading_space[token] == piece.startswith("\u2581")
        assert table.base_bytes[token] == len(piece.lstrip("\u2581").encode())


def test_space_counts_unless_after_a_boundary() -> None:
    table = ByteTable(
        np.array([0, 3, 0], np.int16), np.array([False, True, True]), np.array([True, False, False])
    )
    previous, target = np.array([0, 1, 1, 2, 0]), np.array([1, 1, 2, 0, 2])
    assert target_bytes(table, previous, target).tolist() == [3, 4, 1, 0, 0]
    assert target_bytes(table, previous, target).dtype == np.int64
    assert scored_bytes(table, np.array([0, 1, 1, 2, 0, 2])) == 8
    assert scored_bytes(table, np.array([1])) == scored_bytes(table, np.array([], np.int64)) == 0


def test_scored_bytes_are_the_utf8_bytes(small: Tokenizer) -> None:
    """A document that begins without a space: every byte of its text is counted once."""
    for text in (some_text(50), "日本 🙂 naïve"):
        assert scored_bytes(byte_table(small), np.array(small.encode_document(text))) == len(text.encode())


def test_scored_bytes_across_blocks(small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.array(small.encode_document(some_text(50)))
    whole = scored_bytes(byte_table(small), tokens)
    for block in (1, 2, 7, len(tokens) - 1, len(tokens)):
        monkeypatch.setattr("pgolf_fast.data.tokenizer._BLOCK", block)
        assert scored_bytes(byte_table(small), tokens) == whole


@pytest.mark.parametrize(
    ("dataset", "split", "expected"),
    [
        ("webmix_sp1024", "val", 1_256_769),
        ("smoke_sp1024", "val", 90_060),
        ("smoke_sp1024", "train", 315_575),
    ],
)
def test_golden_scored_bytes(real: Tokenizer, dataset: str, split: str, expected: int) -> None:
    (shard,) = find_shards(real_data() / "datasets" / dataset, split)  # type: ignore[arg-type]
    assert scored_bytes(byte_table(real), shard.tokens) == expected


# Bytes are proven on known text


def trained(path: Path, **changes: object) -> Path:
    """Train on words, digits and line breaks as `train_tokenizer` does, except for `changes`."""
    import sentencepiece

    options = {"model_type": "bpe", "vocab_size": 330, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    options |= {"byte_fallback": True, "add_dummy_prefix": False, "hard_vocab_limit": False, "minloglevel": 2}
    sentences = iter([f"{some_text(400)}  of   the\t{some_text(100, 1)}"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(path), **{**options, **changes}
    )
    return path.with_suffix(".model")


def without_space(model: bytes) -> bytes:
    """Return a model whose piece U+2581 is another character."""
    space = b"\x0a\x03\xe2\x96\x81\x15"
    assert model.count(space) == 1
    return model.replace(space, b"\x0a\x03\xe4\xb8\xad\x15")


def test_spaces_spelled_in_three_bytes_are_refused(small: Tokenizer, tmp_path: Path) -> None:
    # counted as three bytes each; only some of them in the first, where words still begin with a space
    some = without_space(small.path.read_bytes())
    every = re.sub(rb"(\x0a.)\xe2\x96\x81([a-z]+\x15)", rb"\1QQQ\2", some)
    for content in (some, every):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(PgolfError, match=r"\d+ bytes are counted for the \d+ of .* a space, U\+2581"):
            Tokenizer.load(tmp_path / "t.model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # unknown characters would be one token of no bytes
        (
            {"byte_fallback": False, "vocab_size": 60},
            r"it loses characters \(.*: train one with byte_fallback",
        ),
        # a space after the last word of every document would count
        ({"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}, "77 bytes are counted for the 76"),
    ],
    ids=["no byte pieces", "a space after all"],
)
def test_tokenizers_that_lose_or_add_text_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(PgolfError, match=rf"t.model cannot be used: {message}"):
        Tokenizer.load(trained(tmp_path / "t", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_rule_name": "nmt_nfkc_cf"},  # case is no fault, nor are the others
        {"add_dummy_prefix": True},
        {"treat_whitespace_as_suffix": True},
        # spaces inside a piece would count three bytes each
        {"split_by_whitespace": False},
        {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
        {"normalization_rule_name": "identity", "user_defined_symbols": ["\n", "\u2581\u2581"]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_bytes_of_unusual_tokenizers_are_right(tmp_path: Path, changes: dict) -> None:
    tokenizer = Tokenizer.load(trained(tmp_path / "t", **changes))
    text = f"the fox of the dog, {some_text(50)}  in   1987 \U0001f642\tpotent ale"
    ids = np.array(tokenizer.encode_document(text))
    kept = text if "remove_extra_whitespaces" in changes else re.sub(" +", " ", text)
    assert scored_bytes(byte_table(tokenizer), ids) == len(kept.encode())


def test_operators_of_caseops_are_no_text(tmp_path: Path) -> None:
    """They say where capitals are, and would count three bytes each."""
    tokenizer = Tokenizer.load(trained(tmp_path / "t", user_defined_symbols=list(OPERATORS)))
    title, capitals, _, _ = OPERATORS
    ids = tokenizer.encode_document(f"{title}the {capitals}fox brews ale")
    assert {tokenizer.piece(i) for i in ids} >= {title, capitals}
    assert scored_bytes(byte_table(tokenizer), np.array(ids)) == len(b"The FOX brews ale")


def test_a_wrong_table_is_a_fault(small: Tokenizer) -> None:
    table = byte_table(small)
    assert counting_fault(small, table) is None
    for wrong in (
        replace(table, base_bytes=table.base_bytes + 2 * table.has_leading_space),
        replace(table, base_bytes=np.where(table.base_bytes > 1, 1, table.base_bytes)),  # characters
        replace(table, has_leading_space=np.zeros_like(table.has_leading_space)),
    ):
        assert "bytes are counted for the" in (counting_fault(small, wrong) or "")


# --- finding


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("place", ["a/b/data", "a/b", "a/b/tokenizers", "a/tokenizers"])
def test_tokenizer_in_or_next_to_the_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "a/b/data").mkdir(parents=True)
    touch(tmp_path / place / "t.model")
    assert find_tokenizer(tmp_path / "a/b/data") == tmp_path / place / "t.model"


def test_names_with_a_dot_are_passed_over(tmp_path: Path) -> None:
    """macOS writes ._NAME beside NAME; two models would be ambiguous, or the first would be read."""
    (tmp_path / "data").mkdir()
    touch(tmp_path / "data/._t.model")
    touch(tmp_path / "tokenizers/t.model", tmp_path / "tokenizers/._t.model")
    assert find_tokenizer(tmp_path / "data") == tmp_path / "tokenizers/t.model"


def test_the_nearest_tokenizer_wins(tmp_path: Path) -> None:
    touch(tmp_path / "a/b/data/near.model", tmp_path / "a/b/tokenizers/far.model")
    assert find_tokenizer(tmp_path / "a/b/data").name == "near.model"
    assert (
        find_tokenizer(tmp_path / "a/b/data", str(tmp_path / "a/b/tokenizers/far.model")).name == "far.model"
    )


def test_of_several_the_one_of_the_folders_size(tmp_path: Path) -> None:
    touch(tmp_path / "tokenizers/fineweb_1024_bpe.model", tmp_path / "tokenizers/fineweb_8192_bpe.model")
    for name, expected in (("fineweb10B_sp1024", "1024"), ("fineweb10B_sp8192", "8192"), ("x_1024", "1024")):
        (tmp_path / "datasets" / name).mkdir(parents=True)
        assert find_tokenizer(tmp_path / "datasets" / name).name == f"fineweb_{expected}_bpe.model"
    for name in ("mine", "fineweb10B_sp102"):
        (tmp_path / "datasets" / name).mkdir()
        with pytest.raises(
            PgolfError, match=r"several tokenizers fit .*fineweb_1024_bpe.model, fineweb_8192_bpe"
        ):
            find_tokenizer(tmp_path / "datasets" / name)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a/b/data").mkdir(parents=True)
    with pytest.raises(PgolfError, match=r"no tokenizer .*: name one with --data.tokenizer"):
        find_tokenizer(tmp_path / "a/b/data")
    with pytest.raises(PgolfError, match=r"x.model does not exist: give a SentencePiece .model file"):
        Tokenizer.load(find_tokenizer(tmp_path / "a/b/data", str(tmp_path / "x.model")))


# --- floors


def test_floors_by_hand() -> None:
    """Two ids of one byte: p(1) from counts plus one; Witten-Bell by its definition."""
    table = ByteTable(np.ones(2, np.int16), np.zeros(2, np.bool_), np.zeros(2, np.bool_))
    train, val = np.array([0, 1, 0, 0, 1]), np.array([0, 1, 1])
    unigram, bigram = ngram_floors(train, val, table, 2)
    below = 3 / 7
    after_0 = (2 + 2 * below) / (3 + 2)  # 0 is followed by 1, 0, 1
    after_1 = (0 + 1 * below) / (1 + 1)  # 1 is followed by 0
    assert unigram == pytest.approx(-np.log2(below))
    assert bigram == pytest.approx(-np.log2(after_0 * after_1) / 2)


def test_floors_refuse_too_little() -> None:
    table = ByteTable(np.array([0, 1], np.int16), np.zeros(2, np.bool_), np.zeros(2, np.bool_))
    ids = np.array([0, 1, 0])
    with pytest.raises(PgolfError, match=r"1 training tokens are too few"):
        ngram_floors(ids[:1], ids, table, 2)
    with pytest.raises(PgolfError, match=r"validation tokens hold id 2, but vocab_size is 2"):
        ngram_floors(ids, ids + 1, table, 2)
    with pytest.raises(PgolfError, match=r"have no text at all"):
        ngram_floors(ids, np.zeros(5, np.int64), table, 2)


def test_floors_of_the_real_mix(real: Tokenizer) -> None:
    folder = real_data() / "datasets" / "webmix_sp1024"
    train = np.concatenate([shard.tokens for shard in find_shards(folder, "train")])
    (val,) = find_shards(folder, "val")
    unigram, bigram = ngram_floors(train, val.tokens, byte_table(real), 1024)
    assert unigram == pytest.approx(3.622, abs=0.002)
    assert bigram == pytest.approx(2.588, abs=0.02)
