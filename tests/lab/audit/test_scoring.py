"""C13: a wrong denominator is found, on known text, in documents and by side files."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from pgolf_fast import cli
from pgolf_fast.data import source
from pgolf_fast.data.shards import open_shard, write_shard
from pgolf_fast.data.tokenizer import Tokenizer, byte_table, target_bytes
from pgolf_fast.lab.audit import scoring
from pgolf_fast.lab.audit.check import broken, run_checks
from pgolf_fast.lab.audit.rules import checks
from pgolf_fast.lab.audit.target import open_target


def three_bytes_a_space(table):
    return replace(table, base_bytes=table.base_bytes + 2 * table.has_leading_space)


@pytest.mark.parametrize("known", [True, False], ids=["known text", "documents"])
def test_wrong_denominator(run, monkeypatch, capsys, known):
    """Known text and the documents each tell; decoded text that holds U+2581 for a space would agree."""
    honest = source.byte_table
    monkeypatch.setattr(source, "byte_table", lambda tokenizer: three_bytes_a_space(honest(tokenizer)))
    if not known:
        monkeypatch.setattr(scoring, "counting_fault", lambda tokenizer, table: None)
    assert cli.main(["audit", str(run.path), "--only", "C13"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^C13 +byte counts are those of the text +FAIL ", out, re.MULTILINE)
    assert ("known text: 106 bytes are counted for the 76" if known else "bytes counted, the text has") in out
    assert "1 of 1 do not hold: C13" in out


def test_spaces_spelled_in_bytes_are_counted_as_the_text(target, monkeypatch):
    """Their pieces sum to the decoded text, in which each is U+2581: three bytes."""
    from sentencepiece import SentencePieceProcessor

    model, space = target.tokenizer.path.read_bytes(), b"\x0a\x03\xe2\x96\x81\x15"
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.replace(space, b"\x0a\x03\xe4\xb8\xad\x15"))
    tokenizer = Tokenizer(processor, target.tokenizer.path)
    documents = [tokenizer.encode_document(target.tokenizer.decode(target.tokens.tolist())) for _ in range(3)]
    tokens = np.concatenate(documents)
    finding = scoring.byte_counts(tokens, byte_table(tokenizer), tokenizer)
    assert (finding.passed, finding.evidence[:12]) == (False, "known text: ")
    monkeypatch.setattr(scoring, "counting_fault", lambda tokenizer, table: None)
    finding = scoring.byte_counts(tokens, byte_table(tokenizer), tokenizer)
    assert finding.passed is False
    assert "bytes counted, the text has" in finding.evidence


@pytest.mark.parametrize(
    ("planted", "evidence"),
    [
        # where no side file counts, all bytes are those of the pieces, also in the last, cut document
        ({"counts": lambda right: right + (right > 3)}, "bytes are scored, the pieces have"),
        ({"counts": lambda right: np.roll(right, 1)}, "5,695 bytes are scored, the pieces have 5,695"),
        ({"counts": lambda right: right + (right > 1), "exact": False}, "1 documents: "),
        ({"exact": False}, None),
        ({"tokens": lambda tokens: np.where(tokens > 299, 599 - tokens, tokens)}, "are other tokens when"),
    ],
)
def test_byte_counts_that_are_not_those_of_the_text(target, planted, evidence):
    tokens = planted.get("tokens", lambda same: same)(target.validation)
    counts = planted.get("counts", lambda same: same)(target_bytes(target.table, tokens[:-1], tokens[1:]))
    exact = planted.get("exact", True)
    finding = scoring.byte_counts(tokens, target.table, target.tokenizer, counts, exact=exact)
    assert finding.passed is (evidence is None), finding.evidence
    assert (evidence or "") in finding.evidence
    assert scoring.byte_counts(target.validation[:50], target.table, target.tokenizer).passed is None


def test_side_files_are_what_is_audited(run, target, tmp_path):
    """They hold a byte more for some tokens, as text has before it is normalized."""
    data = shutil.copytree(run.read_config().data.path, tmp_path / "data")
    tokens = np.array(open_shard(data / "help_val_000000.bin").tokens)
    side = np.append(0, target_bytes(target.table, tokens[:-1], tokens[1:]))
    side[1:][(tokens[1:] != 1) & (np.arange(1, len(tokens)) % 40 == 0)] += 1
    write_shard(data / "help_val_bytes_000000.bin", side)
    other = open_target(run.path, data=data)
    count = len(other.validation) - 1
    (finding,) = run_checks(check for check in checks(other) if check.id == "C13")
    assert finding.verdict == "pass"
    assert f"whole split: {side[1 : count + 1].sum():,} bytes of {count:,} targets" in finding.evidence
    assert other.stream(other.tokens).target_bytes.sum() == side[1 : len(other.tokens)].sum()
    assert broken(run_checks(check for check in checks(other) if check.id == "C5")) == []
