"""Runs that move between machines and people: results elsewhere, artifacts alone, odd names, moved data."""

import errno
import json
import os
import re
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from runs import call, make_dataset, read_json, run_config

from pgolf_fast import cli
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def refused(capsys, *arguments):
    """The line that a rejected command prints."""
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory):
    """A packed run that is scored in a second; tests copy it or leave it as it is."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    quick = {"ttt__epochs": 0, "data__val_tokens": 320, "train__meta": None, "quant__method": "round"}
    train(run_config(data, train__steps=1, **quick), folder)
    for command in ("quantize", "pack"):
        assert cli.main([command, str(folder)]) == 0
    return RunFolder(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Skip drawing."""
    monkeypatch.setattr("pgolf_fast.bench.drawing.png", lambda paint, size, dark=False: b"PNG")


def copied(run, place):
    shutil.copytree(run.path, place)
    return RunFolder(place)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read_only(folder, monkeypatch):
    """Make writing in a folder fail as on a read-only disk, also for root."""
    real = tempfile.TemporaryFile

    def refuse(*args, dir=None, **options):
        if Path(dir).resolve() == folder.resolve():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*args, dir=dir, **options)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)


def test_results_of_a_read_only_run_go_elsewhere(capsys, packed, tmp_path, monkeypatch, undrawn):
    """A plain --out would name one file of the results and still append to the run's log."""
    run, out, before = packed.path, tmp_path / "out", contents(packed.path)
    os.umask(umask := os.umask(0o022))
    modes = {oct(path.stat().st_mode & 0o777) for path in run.rglob("*") if path.is_file()}
    assert modes == {oct(0o666 & ~umask)}  # safetensors alone would let only their owner read some
    read_only(run, monkeypatch)
    for command in ("quantize", "pack", "eval", "report", "ttt-sweep"):
        assert "cannot be written (Read-only file system): give --out" in refused(capsys, command, run)
    for command in ("eval", "pack", "eval"):
        assert call(capsys, command, run, "--out", out)[0] == 0
    assert contents(run) == before
    assert {"scores_artifact.json", "train.log", "model.pgolf", "config.json"} <= contents(out).keys()
    assert not (out / "checkpoints").exists()
    first = read_json(out / "scores_artifact.json")
    # the copy is a run like any other
    assert call(capsys, "report", out)[0] == call(capsys, "eval", out)[0] == 0
    assert read_json(out / "scores_artifact.json")["sliding"] == first["sliding"]
    assert call(capsys, "report", run, "--out", tmp_path / "page.html")[0] == 0
    assert contents(run) == before


def test_out_never_mixes_two_runs(capsys, packed, tmp_path):
    """Weights of one run beside the scores of another would be a wrong number."""
    run, out = packed.path, tmp_path / "out"
    assert call(capsys, "quantize", run, "--quant.bits", "5", "--out", out)[0] == 0
    assert "quantized.safetensors differs" in refused(capsys, "pack", run, "--out", out)
    assert call(capsys, "pack", out)[0] == 0
    assert (out / "model.pgolf").read_bytes() != packed.artifact_file.read_bytes()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    assert "holds other files" in refused(capsys, "eval", run, "--out", tmp_path / "notes")
    other = copied(packed, tmp_path / "other")
    other.write_config(replace(other.read_config(), name="other"))
    assert "another configuration" in refused(capsys, "eval", other.path, "--out", out)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "pack", run, "--out", tmp_path / "file")
    assert "--eval.strid" in refused(capsys, "eval", run, "--eval.strid", "3", "--out", tmp_path / "new")
    assert "eval.stride" in refused(capsys, "eval", run, "--eval.stride", "-3", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_artifact_alone_is_scored(capsys, packed, data, tmp_path, undrawn):
    alone = tmp_path / "given.pgolf"
    shutil.copyfile(packed.artifact_file, alone)
    # without --data a plain implementation scores the built-in corpus
    for command in ("eval", "audit"):
        assert "does not say where its data is" in refused(capsys, command, alone)
    status, out, _ = call(capsys, "eval", alone, "--data", data)
    assert status == 0
    assert list(tmp_path.iterdir()) == [alone]
    assert "wrote" not in out
    place = tmp_path / "out"
    assert call(capsys, "eval", packed.path, "--out", tmp_path / "run")[0] == 0
    assert call(capsys, "eval", alone, "--data", data, "--out", place)[0] == 0
    scores = [read_json(folder / "scores_artifact.json") for folder in (place, tmp_path / "run")]
    assert scores[0]["sliding"] == scores[1]["sliding"]
    assert f"{scores[0]['sliding']['bpb']:.6f}" in out
    assert call(capsys, "report", place)[0] == 0
    assert "float weights" in refused(capsys, "eval", alone, "--data", data, "--weights", "float")
    assert "--tokenizer" in call(capsys, "generate", alone)[2]
    words = ("--tokens", "3", "--tokenizer", data / "tokenizer.model")
    assert call(capsys, "generate", alone, *words)[:2] == call(capsys, "generate", packed.path, *words)[:2]
    # in a run folder an artifact has that run's data
    assert call(capsys, "eval", packed.artifact_file)[0] == 0


def test_one_process_writes_a_run_at_a_time(capsys, packed):
    with packed.lock():
        for command in ("quantize", "pack", "eval", "ttt-sweep"):
            assert "is in use: process" in refused(capsys, command, packed.path)


@pytest.mark.parametrize("name", ["it's a $(id) run; rm é", "-dash", 'two "quotes"\\', "`tick`"])
def test_commands_in_messages_are_quoted(capsys, packed, tmp_path, monkeypatch, name):
    """Without quotes a name of several words is several arguments, and $(...) is executed."""
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    copied(packed, tmp_path / name).artifact_file.unlink()
    for command in ("eval", "submit"):
        typed = (command,) if name[0] != "-" else (command, "--")
        line = call(capsys, *typed, path)[2]
        assert Path(shlex.split(re.search("`(pgolf.*)`", line)[1])[-1]) == path


def test_relative_data_is_found_from_another_folder(capsys, packed, data, tmp_path, monkeypatch, undrawn):
    """A path kept as typed means another folder, or none, wherever a later command is typed."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "runs").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copytree(data, home / "shards")
    monkeypatch.chdir(home)
    config = run_config("shards", data__tokenizer="shards/tokenizer.model", train__steps=1, train__meta=None)
    train(config, Path("runs/new"))
    stored = RunFolder(home / "runs" / "new").read_config().data
    assert (stored.path, stored.tokenizer) == (f"{home}/shards", f"{home}/shards/tokenizer.model")
    # a run of an older version, which kept what was typed
    old = copied(packed, home / "runs" / "old")
    tree = read_json(old.config_file)
    tree["data"] |= {"path": "shards", "tokenizer": "./shards/tokenizer.model"}
    old.config_file.write_text(json.dumps(tree))
    assert call(capsys, "eval", "runs/old")[0] == 0
    monkeypatch.chdir(elsewhere)
    assert call(capsys, "eval", old.path)[0] == 0
    # the working directory comes first, as it did
    shutil.copytree(home / "shards", elsewhere / "shards")
    assert RunFolder(old.path).read_config().data.path == f"{elsewhere}/shards"
    shutil.rmtree(elsewhere / "shards")
    (home / "shards").rename(home / "moved")
    line = refused(capsys, "eval", old.path)
    assert f"{elsewhere}/shards" in line
    assert f"{home}/shards" in line
    assert "give --data DIR" in line
    assert call(capsys, "eval", old.path, "--data", "../home/moved")[0] == 0
    assert call(capsys, "eval", old.path, "--data.path", home / "moved")[0] == 0


def test_the_tokenizer_of_the_run_stands_in(capsys, packed, data, tmp_path, undrawn):
    """A data folder without its tokenizer: the run has a copy. One of another size is still refused."""
    shutil.copytree(data, tmp_path / "shards", ignore=shutil.ignore_patterns("*.model"))
    run = copied(packed, tmp_path / "run")
    status, _, err = call(capsys, "eval", run.path, "--data", tmp_path / "shards")
    assert status == 0
    assert f"using the run's, {run.tokenizer_file}" in err
    typed = ("--data", tmp_path / "shards", "--tokenizer", tmp_path / "no.model")
    assert "no.model" in refused(capsys, "eval", run.path, *typed)


def test_measurements_are_no_part_of_the_log(capsys, packed, tmp_path):
    run = copied(packed, tmp_path / "run")
    assert call(capsys, "pack", run.path, "--table", "--measure", "raw")[0] == 0
    assert "measuring" not in run.log_file.read_text()
