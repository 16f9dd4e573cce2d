"""Signals during training: a checkpoint is left, the command to go on is named, the exit status says why."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs import assert_same, make_dataset, run_config, words
from safetensors.torch import load_file

from pgolf_fast import cli
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.console import read_metrics
from pgolf_fast.train import loop
from pgolf_fast.train.interrupt import Interrupted, Interrupts
from pgolf_fast.train.loop import train
from pgolf_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def signal_in(monkeypatch, place, name, number, when=lambda self: True):
    """Send a signal to this process at the start of a method."""
    original = getattr(place, name)

    def method(self, *arguments, **options):
        if when(self):
            monkeypatch.setattr(place, name, original)
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    monkeypatch.setattr(place, name, method)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(data, tmp_path, monkeypatch, capsys, number, status):
    """A plain handler would lose the steps since the last checkpoint, or save in the middle of one."""
    monkeypatch.chdir(tmp_path)
    cli._prepare_process()  # a command's own handlers stay
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signal_in(monkeypatch, Trainer, "_accumulate", number, lambda trainer: trainer.step == 2)
    assert cli.main(["train", "tiny", *words(run_config(data)), "--out", "my run"]) == status
    *_, note, last = capsys.readouterr().err.splitlines()
    assert note == "stopping after this step; a second signal stops at once, without a checkpoint"
    assert last == (
        f"stopped by {number.name} after step 3; my run/checkpoints/step_00000003.safetensors is kept: "
        "`pgolf train --resume 'my run'` continues from it"
    )
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    rows = [row["step"] for row in read_metrics(Path("my run", "metrics.jsonl"))]
    assert rows == [1, 2, 3]
    if number == signal.SIGTERM:  # the printed command is all it takes, and nothing is lost
        assert cli.main(["train", "--resume", "my run"]) == 0
        straight = train(run_config(data), tmp_path / "straight").folder
        assert_same(load_file("my run/model.safetensors"), load_file(straight.model_file))


@pytest.mark.parametrize("lag", [0, 1])
def test_a_signal_during_validation_does_not_wait_for_its_end(data, tmp_path, monkeypatch, lag):
    """The state between two steps is saved; one of the validated average would ruin the run."""
    scored = []
    monkeypatch.setattr(loop, "_lag", lambda world: lag)
    monkeypatch.setattr(
        loop, "plain_score", lambda *_: (os.kill(os.getpid(), signal.SIGINT), scored.append(1))
    )
    config = run_config(data, train__val_every=4)
    with pytest.raises(Interrupted) as stop:
        train(config, tmp_path / "run")
    assert stop.value.status == 130
    assert scored == []
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True).steps == 8
    assert_same(
        load_file(tmp_path / "run" / "model.safetensors"),
        load_file(train(config, tmp_path / "straight").folder.model_file),
    )


def test_a_signal_before_the_first_step_or_in_the_last_validation(data, tmp_path, monkeypatch, capsys):
    for place, name, note in (
        (loop._Run, "__init__", ""),  # nothing is written yet, so no command can go on from here
        (loop._Run, "_start", " after step 0; there is no checkpoint yet"),
    ):
        signal_in(monkeypatch, place, name, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(run_config(data), tmp_path / "run")
        assert capsys.readouterr().err.splitlines()[-1] == f"stopped by SIGTERM{note}"
    calls = []
    score = loop.plain_score

    def second(*arguments):
        calls.append(1)
        if len(calls) == 2:  # of the average, whose weights are in the model
            os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments)

    monkeypatch.setattr(loop, "plain_score", second)
    with pytest.raises(Interrupted):
        train(run_config(data), tmp_path / "run", resume=True)
    folder = RunFolder(tmp_path / "run")
    assert not folder.model_file.exists()
    ended = train(run_config(data), folder.path, resume=True)
    assert_same(
        load_file(folder.model_file), load_file(train(run_config(data), tmp_path / "b").folder.model_file)
    )
    assert ended.averaged.bpb != ended.raw.bpb


PROGRAM = """
import os, signal, sys, time
from pgolf_fast.train.interrupt import Interrupts
with Interrupts(int(sys.argv[1])) as stop:
    stop.allow(at_once=False)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    print(stop.number)
"""


@pytest.mark.parametrize(("ranks", "status", "out"), [(1, -signal.SIGTERM, ""), (2, 0, "15\n")])
def test_a_second_signal_ends_the_process_but_not_one_of_torchrun(ranks, status, out):
    """Ctrl-C in a terminal reaches the processes of torchrun twice: from the terminal and from torchrun."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ranks)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (status, out), done.stderr


def test_ignored_signals_and_other_threads_are_left_alone():
    """nohup ignores SIGHUP, and only the main thread may install handlers."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(1) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    problems = []

    def inside():
        try:
            with Interrupts(1):
                pass
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert problems == []


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step(data, tmp_path):
    """The signal reaches rank 1 only: a rank that decided alone would leave the other waiting."""
    script = tmp_path / "both.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pgolf_fast import cli\n"
        "from pgolf_fast.train.trainer import Trainer\n"
        "launch = Trainer.launch\n"
        "def with_signal(self):\n"
        "    if self.step == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return launch(self)\n"
        "Trainer.launch = with_signal\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), "train", "tiny", "--out", str(tmp_path / "run"), *words(run_config(data))]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "stopped by SIGTERM after step 3" in done.stderr, done.stderr[-2000:]
    assert train(run_config(data, train__micro_batch_tokens=64), tmp_path / "run", resume=True).steps == 8
