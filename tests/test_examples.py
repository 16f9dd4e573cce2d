"""The scripts in examples/ run at tiny sizes and print what they promise."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from helpers import tiny_config
from runs import make_dataset, run_config

import pgolf_fast as pg
from pgolf_fast.config.fields import flatten
from pgolf_fast.model.gpt import GPT

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A packed run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    pg.train(run_config(data), out)
    pg.quantize(out)
    pg.pack(out)
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    """Run an example in this process and return what it prints."""

    def run_script(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_one_op(call):
    lines = call("one_op", "--steps", 41, "--width", 16).splitlines()
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_train_and_score(call, data, tmp_path):
    matplotlib.use("Agg")
    small = dict(flatten(run_config(data)))
    base = dict(flatten(pg.preset("tiny")))
    changes = {name: value for name, value in small.items() if base.get(name, ...) != value}
    words = [f"{n.replace('.', '__')}={json.dumps(v)}" for n, v in changes.items() if n != "data.path"]
    out = call("train_and_score", "--out", tmp_path / "run", "--data", data, "--set", *words)
    for expected in ("bpb, averaged weights", "int6", "= total", "sliding + TTT"):
        assert expected in out
    assert (tmp_path / "run" / "test_time_training.png").read_bytes().startswith(b"\x89PNG")


def verdicts(out: str) -> dict[str, str]:
    return {line.split()[0]: "FAIL" if "  FAIL" in line else "pass" for line in out.splitlines()[2:]}


def test_own_adapter_keeps_the_rules(call, run):
    found = verdicts(call("own_adapter", run))
    assert set(found) == {"C1", "C2", "C3", "C4", "C5", "C7", "C15", "C16"}
    assert set(found.values()) == {"pass"}


def test_own_adapter_learns_from_each_scored_chunk():
    """Counts grow by the targets of the chunk, not by the token before its first target."""
    from types import SimpleNamespace

    example = runpy.run_path(str(EXAMPLES / "own_adapter.py"))
    adapter = example["Frequencies"](GPT(tiny_config()), leak=False)
    before = adapter.counts.clone()
    adapter.adapt(SimpleNamespace(tokens=torch.tensor([[5, 1, 2], [5, 2, 2]])))
    assert (adapter.counts - before)[:6].tolist() == [0, 1, 3, 0, 0, 0]


def test_leaking_adapter_fails_the_audit(call, run):
    assert verdicts(call("own_adapter", run, "--leak"))["C16"] == "FAIL"


def test_compare_artifacts(call, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    pg.quantize(other, bits=4)
    smaller = pg.pack(other).weights_bytes
    out = call("compare_artifacts", run, other / "model.pgolf")
    assert f"{smaller:,}" in out
    assert "bpb, sliding + TTT" in out
    assert "of the weights differ" in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
