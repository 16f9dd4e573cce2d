"""The CaseOps transform, its inverse, the bytes of each token, and shards made with it."""

from __future__ import annotations

import itertools
import json
import lzma
import random
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import real_data
from hypothesis import given
from hypothesis import strategies as st

from pgolf_fast.config.schema import DataConfig
from pgolf_fast.data import caseops
from pgolf_fast.data.shards import BOS_ID, find_shards, open_shard, write_shard
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenize import tokenize_files
from pgolf_fast.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.audit import scoring
from pgolf_fast.lab.audit.overlap import find_overlap

TITLE, CAPS, NEXT, ESC = caseops.OPERATORS
EVERYTHING = st.text(st.characters(exclude_categories=()))  # lone surrogates too
DENSE = st.text(st.sampled_from("abAB 1\u00e9\u00c9" + caseops.OPERATORS))


def by_definition(text: str) -> str:
    """CaseOps letter by letter (PR 1729)."""
    out = ""
    for is_word, group in itertools.groupby(text, lambda c: c.isascii() and c.isalpha()):
        run = "".join(group)
        if not is_word:
            out += "".join(ESC + c if c in caseops.OPERATORS else c for c in run)
        elif len(run) > 1 and run.isupper():
            out += CAPS + run.lower()
        else:
            first = TITLE + run[0].lower() if run[0].isupper() else run[0]
            out += first + "".join(NEXT + c.lower() if c.isupper() else c for c in run[1:])
    return out


@given(EVERYTHING | DENSE)
def test_any_text_comes_back(text: str) -> None:
    encoded = caseops.encode(text)
    assert encoded == by_definition(text)
    assert not re.search("[A-Z]", encoded)
    assert caseops.decode(encoded) == text == caseops.decode(encoded, strict=False)


@given(DENSE)
def test_what_is_not_strict_never_fails(text: str) -> None:
    plain = caseops.decode(text, strict=False)
    try:
        assert caseops.decode(text) == plain
    except ValueError as error:
        assert len(plain) < len(text)
        at = int(re.match(r"position (\d+): ", str(error))[1])
        assert text[at] in caseops.OPERATORS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TITLE, "position 0: TITLE ends the text"),
        (f"a {CAPS}", "position 2: ALLCAPS ends the text"),
        (f"{TITLE} a", "position 0: TITLE before ' ' instead of an ASCII letter"),
        (f"{CAPS}1", "position 0: ALLCAPS before '1' instead of an ASCII letter"),
        (f"{TITLE}\u00e9", "position 0: TITLE before '\u00e9' instead of an ASCII letter"),
        (f"a{TITLE}b", "position 1: TITLE inside a word"),
        (f"{TITLE}a{NEXT}b{CAPS}c", "position 4: ALLCAPS inside a word"),
        (f"{TITLE}{CAPS}a", "position 0: TITLE before ALLCAPS instead of an ASCII letter"),
        (f"a{NEXT}{NEXT}a", "position 1: CAPNEXT before CAPNEXT instead of an ASCII letter"),
        (f"{ESC}{ESC}{ESC}", "position 2: ESC ends the text"),
        (f"{ESC}a", "position 0: ESC before 'a', which is no operator"),
    ],
)
def test_what_encode_does_not_write_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        caseops.decode(text)


def test_a_long_word_takes_no_longer_per_letter() -> None:
    for letters in ("a" * 10**6, "a" * 10**6 + "B", "aB" * 10**5, "A" * 10**6 + "a", CAPS * 10**5):
        assert caseops.decode(caseops.encode(letters)) == letters


# Tokens

NAMES = ["Ada", "BEN", "McCleo", "iDan", "eve", "F"]
WORDS = [
    "read",
    "quiet",
    "letters",
    "by the river",
    "Nobody",
    "knew why",
    "caf\u00e9s",
    "OF theirs",
    "closed",
]


def made_up(count: int) -> list[str]:
    pick = random.Random(0)
    texts = [
        " ".join([NAMES[i % 6], f"No.{i}", *pick.choices(WORDS, k=pick.randint(20, 60))])
        for i in range(count)
    ]
    texts[1] += f"  \ufb01ne \u2122 {TITLE}{ESC} \u00bd\n\nEND  "
    return texts


def raw_bytes(texts: list[str]) -> int:
    return sum(len(text.strip().encode()) for text in texts)  # no token covers white space at the ends


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 50 validation and 150 training documents, with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("made")
    write_jsonl(folder / "in.jsonl", made_up(200))
    settings = {"vocab_size": 400, "val_docs": 50, "shard_tokens": 1000, "caseops": True}
    counts = tokenize_files([folder / "in.jsonl"], out=folder / "out", **settings)
    assert counts["val_bytes"] == raw_bytes(made_up(200)[:50])
    return folder / "out"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_side_files_count_the_bytes_of_the_raw_text(made: Path) -> None:
    shards = find_shards(made, "val")
    assert len(shards) > 1
    sides = [open_shard(made / f"fineweb_val_bytes_{i:06d}.bin") for i in range(len(shards))]
    assert [side.num_tokens for side in sides] == [shard.num_tokens for shard in shards]
    assert len(list(made.glob("*_bytes_*"))) == len(shards)  # none of training
    tokens, counts = (np.concatenate([s.tokens for s in group]) for group in (shards, sides))
    assert not counts[tokens == BOS_ID].any()
    documents = np.split(counts, np.flatnonzero(tokens == BOS_ID))[1:]
    assert [int(part.sum()) for part in documents] == [raw_bytes([text]) for text in made_up(200)[:50]]
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["side_files"] == {side.path.name: side.num_tokens for side in sides}


def test_scores_divide_by_them(made: Path) -> None:
    source = open_source(DataConfig(path=str(made)), 400)
    tokens = source.validation(16)
    counts = source.side_bytes(tokens)
    assert counts is not None
    assert counts.sum() != scoring.target_bytes(source.table, tokens[:-1], tokens[1:]).sum()
    finding = scoring.byte_counts(tokens, source.table, source.tokenizer, counts, exact=False)
    assert finding.passed, finding
    assert source.tokenizer.has_caseops
    texts = [
        source.tokenizer.decode_document(part.tolist())
        for part in np.split(tokens, np.flatnonzero(tokens == 1))
    ]
    assert texts[1] == made_up(2)[0]


def test_a_side_file_that_changed_is_named(made: Path) -> None:
    side = made / "fineweb_val_bytes_000001.bin"
    counts, content = np.array(open_shard(side).tokens), side.read_bytes()
    try:
        for change in (lambda: write_shard(side, counts[:-1]), side.unlink):
            change()
            with pytest.raises(
                PgolfError, match=r"fineweb_val_bytes_000001.bin has .* but manifest.json says"
            ):
                open_source(DataConfig(path=str(made)), 400)
    finally:
        side.write_bytes(content)


def test_a_tokenizer_decides(made: Path, tmp_path: Path) -> None:
    """One with the operators encodes documents by CaseOps; one without them cannot."""
    file = write_jsonl(tmp_path / "a.jsonl", made_up(20))
    given = {"vocab_size": 400, "tokenizer": made / "tokenizer.model", "val_docs": 5}
    tokenize_files([file], out=tmp_path / "a", **given)
    np.testing.assert_array_equal(
        open_shard(tmp_path / "a" / "fineweb_val_000000.bin").tokens,
        open_shard(made / "fineweb_val_000000.bin").tokens[
            : find_shards(tmp_path / "a", "val")[0].num_tokens
        ],
    )
    plain = train_tokenizer(made_up(50), 400, tmp_path / "plain")
    with pytest.raises(PgolfError, match=r"lacks the operators of CaseOps .* leave it out to train one"):
        tokenize_files([file], out=tmp_path / "b", caseops=True, **{**given, "tokenizer": plain})
    assert Tokenizer.load(plain).encode_document_with_bytes("\ufb01ne \u00bd")[1].sum() == len(
        "\ufb01ne \u00bd".encode()
    )


def test_white_space_that_no_side_file_holds(made: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["a" + " " * 70_000 + "b", "more text"])
    with pytest.raises(PgolfError, match=r"'a  .* has 70,001 bytes, more than a side file holds: shorten"):
        tokenize_files(
            [file], out=tmp_path / "o", vocab_size=400, tokenizer=made / "tokenizer.model", val_docs=1
        )


def test_training_on_validation_documents_is_found(made: Path, tmp_path: Path) -> None:
    """As by a split of 10 validation documents beside the validation shards of a split of 50."""
    file = write_jsonl(tmp_path / "a.jsonl", made_up(200))
    model = made / "tokenizer.model"
    tokenize_files([file], out=tmp_path / "o", vocab_size=400, tokenizer=model, val_docs=10)
    for path in (tmp_path / "o").glob("*_val_*"):
        path.unlink()
    for path in made.glob("*_val_*"):
        (tmp_path / "o" / path.name).write_bytes(path.read_bytes())
    assert find_overlap(made, ngrams=False, seconds=60).copies == 0
    assert find_overlap(tmp_path / "o", ngrams=False, seconds=60).copies == 40


# Real text


def real_documents(name: str, source: str | None = None) -> list[str]:
    with lzma.open(real_data() / "docs" / name, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows if source is None or row["source"] == source]


def test_real_documents_come_back_and_their_bytes_are_those_of_the_text() -> None:
    texts = real_documents("train_docs.jsonl.xz", "fineweb")
    validation = real_documents("val_docs.jsonl.xz")
    assert (len(texts), len(validation)) == (246, 465)
    for text in texts + validation:
        assert caseops.decode(caseops.encode(text)) == text
    tokenizer = Tokenizer.load(real_data() / "tokenizers" / "fineweb_8192_bpe_caseops.model")
    counts = [tokenizer.encode_document_with_bytes(text)[1].sum() for text in texts]
    assert sum(counts) == sum(len(text.encode()) for text in texts) == 1_489_469
