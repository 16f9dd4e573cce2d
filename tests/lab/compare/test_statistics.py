"""Intervals and tests over runs: known values, and what `pgolf seeds` prints and refuses."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest

from pgolf_fast.cli import main
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.statistics import bootstrap_gain, over_documents, over_seeds, welch_test


def test_interval_over_seeds_by_hand():
    """Differences -0.1, +0.1, -0.3: mean -0.1, deviation 0.2, t of two degrees 4.30265."""
    found = over_seeds([1.0, 2.0, 3.0], [0.9, 2.1, 2.7])
    half = 4.30265 * 0.2 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.1, -0.1 - half, -0.1 + half), abs=1e-5)
    assert (found.over, found.count) == ("seeds", 3)
    with pytest.raises(PgolfError, match="at least 2 seeds, and has 1"):
        over_seeds([1.0], [2.0])


def test_interval_over_documents_is_paired_and_signed():
    rng = np.random.default_rng(0)
    text_bytes = rng.integers(50, 500, 200)
    before = text_bytes * rng.uniform(0.5, 3.0, 200)  # documents differ far more than models do
    better = before - text_bytes * math.log(2) * (0.01 + 0.005 * rng.standard_normal(200))
    found = over_documents(before, better, text_bytes)
    assert (found.over, found.count) == ("documents", 200)
    assert -0.012 < found.low < found.mean < found.high < -0.008
    same = over_documents(before, before, text_bytes)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_bootstrap_of_the_gain():
    """A gain that is the same on every byte has no spread; one of a few documents only does not exclude 0."""
    rng = np.random.default_rng(0)
    text_bytes = rng.integers(100, 1000, 60)
    before = rng.normal(2, 0.5, 60) * text_bytes
    gain, low, high = bootstrap_gain(before, before - 0.01 * np.log(2) * text_bytes, text_bytes)
    assert (gain, low, high) == pytest.approx((0.01, 0.01, 0.01), rel=1e-6)
    after = before.copy()
    after[0] -= 50
    gain, low, high = bootstrap_gain(before, after, text_bytes)
    assert gain == pytest.approx(50 / (np.log(2) * text_bytes.sum()))
    assert low == pytest.approx(0, abs=1e-9)
    assert high > gain


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(PgolfError, match=r"need SciPy: pip install 'pgolf-fast\[stats\]'"):
        welch_test([1.0, 2.0], [2.0, 3.0])
    with pytest.raises(PgolfError, match="need SciPy"):
        over_seeds([1.0, 2.0], [2.0, 3.5])
    assert over_documents(np.ones(3), np.ones(3), np.ones(3)).mean == 0  # needs none


def test_welch_matches_a_published_example():
    """Example 1 of Wikipedia's article on the test: t = -2.46, 25.0 degrees, two-sided P = 0.021."""
    a = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    b = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    result = welch_test(a, b)
    assert result.statistic == pytest.approx(2.46, abs=0.005)
    assert result.df == pytest.approx(25.0, abs=0.05)
    assert 2 * result.pvalue == pytest.approx(0.021, abs=0.0005)
    assert welch_test(a, [x + 5 for x in b], 5).pvalue == pytest.approx(result.pvalue)
    assert welch_test(b, a).pvalue == pytest.approx(1 - result.pvalue)
    with pytest.raises(PgolfError, match="at least 2 runs"):
        welch_test(a, b[:1])
    with pytest.raises(PgolfError, match="same score"):
        welch_test([1.0, 1.0], [2.0, 2.0])


def scored_run(folder, loss, tokens=100):
    folder.mkdir()
    score = {"bpb": loss / 2, "loss": loss, "tokens": tokens, "bytes": 240}
    scores = dict.fromkeys(("non_overlapping", "sliding", "sliding_ttt"), score)
    (folder / "scores_artifact.json").write_text(json.dumps(scores))
    return str(folder)


def test_seeds_command(capsys, tmp_path):
    ours = [scored_run(tmp_path / f"a{i}", loss) for i, loss in enumerate((3.310, 3.312, 3.311))]
    theirs = [scored_run(tmp_path / f"b{i}", loss) for i, loss in enumerate((3.320, 3.321, 3.322))]
    assert main(["seeds", *ours, "--against", *theirs]) == 0
    out = capsys.readouterr().out
    assert out.count("3.311000") == out.count("3.321000") == 3
    # a gain of 0.010 in which 0.005 is asked for: t = 0.005 / (0.001 sqrt(2 / 3)), 4 degrees
    assert [line.split()[-4:] for line in out.splitlines()[-3:]] == 3 * [
        ["+0.010000", "6.124", "4.00", "0.0018"]
    ]
    refusals = {
        (ours[0],): "needs at least 2 runs",
        (*ours, "--against", theirs[0]): "--against needs at least 2 runs",
        (*ours, ours[0]): "named twice",
        (*ours, scored_run(tmp_path / "c", 3.0, tokens=99)): "compare runs on the same text",
        (*ours, str(tmp_path)): "does not hold three finite scores",
    }
    for words, message in refusals.items():
        assert main(["seeds", *words]) == 2
        assert message in capsys.readouterr().err


def test_seeds_counts_a_model_once(capsys, tmp_path):
    """Copies of a run have a deviation of 0, and a test over them is sure of any difference."""
    one, two = (scored_run(tmp_path / name, loss) for name, loss in (("one", 3.1), ("two", 3.2)))
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "again").mkdir()
    path = tmp_path / "one" / "scores_artifact.json"
    digest = {"artifact_sha256": "ab" * 32}
    path.write_text(json.dumps({**json.loads(path.read_text()), **digest}))
    # the same artifact scored elsewhere: another last digit
    other = {**json.loads(path.read_text())}
    other["sliding"] = {**other["sliding"], "loss": 3.1000001}
    (tmp_path / "again" / "scores_artifact.json").write_text(json.dumps(other))
    for name, reason in (
        ("copy", "one and .*copy hold the same model"),
        ("again", "one and .*again hold the same model"),
        ("link", "link is named twice"),
        ("two/../one", "one is named twice"),
    ):
        for words in ((one, two, f"{tmp_path}/{name}"), (one, two, "--against", f"{tmp_path}/{name}", two)):
            assert main(["seeds", *words]) == 2
            assert re.search(reason, capsys.readouterr().err)
    # NaN is no score: it would make the mean NaN or end in a traceback
    path.write_text(path.read_text().replace("3.1", "NaN"))
    assert main(["seeds", one, two]) == 2
    assert "does not hold three finite scores" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"3.1"', "[]"])
def test_seeds_refuses_scores_that_are_no_numbers(capsys, tmp_path, value):
    """Python reads NaN in JSON, and the deviation of NaN is an AttributeError."""
    runs = [scored_run(tmp_path / f"a{i}", 3.3 + i) for i in range(2)]
    path = tmp_path / "a1" / "scores_artifact.json"
    path.write_text(path.read_text().replace("4.3", value, 1))
    assert main(["seeds", *runs]) == 2
    assert f"{path} does not hold three finite scores: run `pgolf eval" in capsys.readouterr().err


def test_seeds_that_break_the_rules_are_marked_in_every_table(capsys, tmp_path):
    ours, theirs = (
        [scored_run(tmp_path / f"{n}{i}", x + loss) for i, loss in enumerate((3.31, 3.32))]
        for n, x in (("a", 0), ("b", 1))
    )
    path = tmp_path / "b1" / "scores_artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "illegal": "it learns first"}))
    assert main(["seeds", *ours, "--against", *theirs]) == 0
    scores, tests = capsys.readouterr().out.split("\n\n")
    assert (scores.count("(ILLEGAL)"), tests.count("(ILLEGAL)")) == (1, 1)
