"""Interrupted evaluations, and evaluations by several ranks, end with the same numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from evaluations import CPU, byte_table, tiny_model
from runs import make_dataset, run_config
from safetensors import safe_open

from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.evaluation.adapters.descent import SGD
from pgolf_fast.evaluation.resume import identity
from pgolf_fast.evaluation.run import score_run
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.train.loop import train

TTT = {"ttt__chunk_tokens": 256, "ttt__batch_seqs": 2, "ttt__lr": 0.05, "ttt__epochs": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run folder with float weights, evaluated in sixteen chunks of test-time training."""
    place = tmp_path_factory.mktemp("resume")
    config = run_config(make_dataset(place / "data"), train__steps=4, eval__stride=8, **TTT)
    train(config, place / "run")
    return place / "run"


def copy_of(run, tmp_path, name):
    shutil.copytree(run, tmp_path / name)
    return tmp_path / name


def scored(path, **changes):
    """Score a folder and return its scores_float.json as text."""
    config = RunFolder(path).read_config()
    config = replace(config, eval=replace(config.eval, checkpoint_minutes=0.0, **changes))
    score_run(RunFolder(path), config, "float")
    return (path / "scores_float.json").read_text()


def states(path):
    return sorted(p.name for p in path.glob("*.state"))


class Stopped(Exception):
    pass


def stop_at(monkeypatch, updates):
    """Interrupt when an adapter is about to learn after `updates` updates."""
    adapt = SGD.adapt

    def stopping(self, scored):
        if self.updates >= updates:
            raise Stopped
        adapt(self, scored)

    monkeypatch.setattr(SGD, "adapt", stopping)


def test_states_belong_to_their_byte_counts():
    """Half of a score's bytes would be those of the pieces, and half those of side files added since."""
    model, tokens = tiny_model(), np.arange(60)
    by_piece = Stream(tokens, byte_table(), CPU)
    by_side = Stream(tokens, byte_table(), CPU, by_piece.target_bytes + (np.arange(59) == 7))
    assert identity(model, by_side, {}) != identity(model, by_piece, {})
    assert by_side.target_bytes.sum() == by_piece.target_bytes.sum() + 1


def test_interrupted_evaluation_resumes_to_the_same_file(run, tmp_path, monkeypatch):
    whole = scored(copy_of(run, tmp_path, "whole"))
    assert states(tmp_path / "whole") == []
    path = copy_of(run, tmp_path, "cut")
    with monkeypatch.context() as patch:
        stop_at(patch, 40)
        with pytest.raises(Stopped):
            scored(path)
    assert states(path) == [
        "scores_float.non-overlapping.state",
        "scores_float.sliding.state",
        "scores_float.sliding_TTT.state",
    ]
    assert not (path / "scores_float.json").exists()
    done = []
    adapt = SGD.adapt
    monkeypatch.setattr(
        SGD, "adapt", lambda self, scored: (done.append(scored.index), adapt(self, scored))[1]
    )
    assert scored(path) == whole
    assert done == list(range(5, 15))  # eight updates a chunk: five were saved
    assert states(path) == []


def test_state_of_other_settings_is_not_used(run, tmp_path, monkeypatch):
    path = copy_of(run, tmp_path, "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 40)
        with pytest.raises(Stopped):
            scored(path)
    assert scored(path, stride=16) == scored(copy_of(run, tmp_path, "other"), stride=16)


def evaluate(path, processes, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(processes), "-m", "pgolf_fast.cli", "eval", str(path), "--weights", "float", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.slow
def test_one_two_and_three_ranks_write_the_same_file(run, tmp_path):
    """Bit for bit: batches are the same, each is one thread's work, and sums run over all losses in order."""
    want = scored(copy_of(run, tmp_path, "1"))
    for processes in (2, 3):
        path = copy_of(run, tmp_path, str(processes))
        done = evaluate(path, processes, "--eval.checkpoint-minutes", "0")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("sliding + TTT") == 1
        assert (path / "scores_float.json").read_text() == want
    scores = json.loads(want)
    assert scores["ttt_updates"] == 15 * 8
    assert scores["sliding_ttt"]["bpb"] != scores["sliding"]["bpb"]


@pytest.mark.slow
def test_killed_evaluation_resumes_to_the_same_file(run, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(  # the same evaluation, with time to be killed in
        "import sys, time\n"
        "from pgolf_fast import cli\n"
        "from pgolf_fast.evaluation.adapters.descent import SGD\n"
        "adapt = SGD.adapt\n"
        "SGD.adapt = lambda self, scored: (time.sleep(0.3), adapt(self, scored))[1]\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    words = ["eval", "run", "--weights", "float", "--eval.checkpoint-minutes", "0"]
    path = copy_of(run, tmp_path, "run")
    options = {"cwd": tmp_path, "env": environment}
    with subprocess.Popen([sys.executable, str(script), *words], **options) as process:
        wait_for_chunks(path / "scores_float.sliding_TTT.state", 3, process)
        process.send_signal(signal.SIGKILL)
    assert not (path / "scores_float.json").exists()
    module = [sys.executable, "-m", "pgolf_fast.cli", *words]
    done = subprocess.run(module, capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after" in done.stderr
    assert (path / "scores_float.json").read_text() == scored(copy_of(run, tmp_path, "whole"))


def wait_for_chunks(path, count, process):
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if path.is_file():
            with safe_open(path, framework="pt") as handle:
                if len(json.loads(handle.metadata()["metadata"])["scores"]) >= count:
                    return
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    raise AssertionError("no state was written in time")
