"""C18, validation documents in the training data; tests/lab/audit/test_rules.py has the other checks."""

import re

import numpy as np
import pytest
from runs import make_dataset, make_trainer, run_config

from pgolf_fast import cli
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.data.shards import BOS_ID, open_shard, write_shard
from pgolf_fast.io import save_tensors
from pgolf_fast.lab.audit import submission
from pgolf_fast.lab.audit.overlap import Overlap


@pytest.fixture
def val(tmp_path):
    """Two validation documents, beside a training shard of other text."""
    pick = np.random.default_rng(0)
    val, train = (
        np.concatenate([np.append(BOS_ID, pick.integers(4, 999, 400)) for _ in range(n)]) for n in (2, 9)
    )
    write_shard(tmp_path / "a_val_0.bin", val)
    write_shard(tmp_path / "a_train_0.bin", train)
    return val


def test_text_that_was_changed_in_few_places(tmp_path, val):
    """A comparison of whole documents would find none."""
    assert submission.validation_is_unseen(tmp_path).passed is True
    val[100::200] = 3
    write_shard(tmp_path / "a_train_1.bin", val)
    finding = submission.validation_is_unseen(tmp_path)
    assert finding.passed is False
    assert "0 of 2 validation documents, 2 more nearly, and 93.3% of the 13-grams" in finding.evidence


def test_training_data_that_cannot_be_compared(tmp_path, val):
    write_shard(tmp_path / "a_train_1.bin", np.concatenate([np.full(1_000_000, 7), val]))
    finding = submission.validation_is_unseen(tmp_path, seconds=0)
    assert finding.passed is None
    assert finding.evidence.endswith("training tokens, in 0 s; `pgolf data info --overlap` compares all")
    assert submission.validation_is_unseen(tmp_path).passed is False
    for path in tmp_path.glob("*_train_*"):
        path.unlink()
    finding = submission.validation_is_unseen(tmp_path)
    assert (finding.passed, finding.evidence) == (None, f"no training shards in {tmp_path}")


@pytest.mark.parametrize(
    ("counts", "passed"),
    [((1000, 0, 50), True), ((1000, 0, 51), False), ((1000, 1, 0), None), ((999, 1, 0), False)],
)
def test_copies_that_may_be_chance(monkeypatch, tmp_path, counts, passed):
    monkeypatch.setattr(submission, "shard_paths", lambda *_: [tmp_path])
    monkeypatch.setattr(submission, "find_overlap", lambda *_, **__: Overlap(*counts, True, "found"))
    assert submission.validation_is_unseen(tmp_path).passed is passed


def test_audit_fails_by_name(tmp_path, capsys):
    """One document, across the border of two shards. C13 sees nothing of it, nor would any other check."""
    config = run_config(shards := make_dataset(tmp_path / "data"))
    (run := RunFolder(tmp_path / "run")).write_config(config)
    trainer = make_trainer(config)
    trainer.loader.close()
    save_tensors(run.model_file, trainer.model.state_dict(), {})
    words = ["audit", str(run.path), "--only", "C13", "C18"]
    assert cli.main(words) == 0
    train = np.asarray(open_shard(shards / "help_train_000000.bin").tokens)
    val = np.asarray(open_shard(shards / "help_val_000000.bin").tokens)
    document = val[: np.flatnonzero(val == BOS_ID)[1]]
    write_shard(shards / "help_train_000000.bin", np.concatenate([train, document[:100]]))
    write_shard(shards / "help_train_000001.bin", np.concatenate([document[100:], train[:500]]))
    capsys.readouterr()
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert "1 of 2 do not hold: C18" in out
    place = f"help_val_000000.bin, token 1, in help_train_000000.bin, token {len(train) + 1:,}"
    row = rf"^C18 .* FAIL .* 1 of 2 validation documents, .*; first the document at {place}"
    assert re.search(row, out, re.MULTILINE)
