"""The training clock without pauses, and the lines that tell how far a run is."""

import itertools
from types import SimpleNamespace

import pytest
from runs import ALONE, make_dataset, run_config

from pgolf_fast import console
from pgolf_fast.config.schema import TrainConfig
from pgolf_fast.console import read_metrics
from pgolf_fast.train import progress
from pgolf_fast.train.loop import train
from pgolf_fast.train.progress import StepClock, StepLog
from pgolf_fast.train.trainer import StepResult


@pytest.fixture
def lines(monkeypatch):
    """Texts of the log lines."""
    found = []
    monkeypatch.setattr(progress.console, "logger", SimpleNamespace(info=found.append, warning=found.append))
    return found


def measured(monkeypatch, steps):
    """Return what a clock counts of steps with these (wall, processor) seconds."""
    now, clock, counted = [100.0, 10.0], StepClock(), []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.time, "process_time", lambda: now[1])
    for wall, busy in steps:
        clock.start()
        now[0] += wall
        now[1] += busy
        counted.append(clock.stop())
    return counted


def test_a_pause_of_the_process_is_no_training_time(monkeypatch, lines):
    """Counted, 12 s of SIGSTOP would be most of a 20 s schedule; capped at five steps, still a lot."""
    usual = [(0.5, 0.9)] * 5
    assert measured(monkeypatch, [*usual, (12.5, 0.9), (0.5, 0.9)]) == pytest.approx([0.5] * 7)
    assert lines == ["the process was paused for 12.0s, which does not count as training time"]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ((60.0, 58.0), "a compiler that keeps a processor busy is training time, or limits would be broken"),
        ((1.9, 0.0), "a short wait for the disk"),
        ((2.4, 0.4), "less than five usual steps"),
    ],
)
def test_slow_steps_count_in_full(monkeypatch, lines, step, why):
    assert measured(monkeypatch, [(0.5, 0.9)] * 3 + [step])[-1] == pytest.approx(step[0]), why
    assert lines == []


def test_a_first_step_has_nothing_to_be_compared_with(monkeypatch, lines):
    assert measured(monkeypatch, [(90.0, 1.0), (0.5, 0.4)]) == pytest.approx([90.0, 0.5])


def shown(monkeypatch, lines, seconds_per_step, terminal, **settings):
    """Return the steps whose lines appear when every step takes that long."""
    clock = itertools.count(0.0, seconds_per_step)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    config = TrainConfig(steps=1000, log_every=500, schedule="steps", max_seconds=None)
    log = StepLog(config, ALONE)
    for step, at in zip(range(1, 61), clock, strict=False):
        now[0] = at
        log.after_step(StepResult(step, 10, 1.0, False, False, loss=1.0), at, last=False)
    return [int(line.split()[1].split("/")[0]) for line in lines]


def test_lines_come_by_seconds(monkeypatch, lines):
    """By steps alone, 500 steps of 4 s are half an hour of silence."""
    assert shown(monkeypatch, lines, 4.0, True)[:4] == [1, 4, 7, 10]


def test_lines_of_a_log_come_every_minute(monkeypatch, lines):
    assert shown(monkeypatch, lines, 4.0, False) == [1, 16, 31, 46]


def test_a_time_schedule_shows_its_share(lines):
    config = TrainConfig(steps=10**6, max_seconds=60.0, schedule="time")
    StepLog(config, ALONE).after_step(StepResult(1, 10, 1.0, False, False, loss=1.0), 25.2, last=True)
    assert "step 1, 42 % of 1m00s  loss" in lines[0]
    assert "1000000" not in lines[0]
    assert "ETA 34.8s" in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("changes", "unfinished"),
    [
        (
            {"train__max_seconds": 1e-3},
            ["learning-rate decay of train.schedule steps ended, at x1.000", "(train.qat)"],
        ),
        (
            {"train__max_seconds": 1e6, "train__schedule": "time"},
            ["decay of train.schedule time ended", "(train.qat)"],
        ),
        ({"train__qat__below": 0.5}, []),
        ({"train__qat": None, "train__max_seconds": 1e6}, []),
    ],
)
def test_what_a_limit_left_out_is_said_and_kept(data, tmp_path, capsys, changes, unfinished):
    """A run that ends by its time at full learning rate looks like any other, and is worse."""
    result = train(run_config(data, **changes), tmp_path / "run")
    *_, end = read_metrics(result.folder.metrics_file)
    assert (end["kind"], end["step"], end["elapsed"]) == ("end", result.steps, result.seconds)
    assert len(end["unfinished"]) == len(unfinished)
    err = capsys.readouterr().err.splitlines()
    for text, line, kept, part in zip(
        unfinished, err[len(err) - len(unfinished) :], end["unfinished"], result.unfinished, strict=True
    ):
        assert text in kept == part
        assert line == f"the run ended at step {result.steps}, {console.duration(result.seconds)}, {kept}"
        assert kept in str(result)


def test_first_lines_name_data_tokens_and_tokenizer(data, tmp_path):
    result = train(run_config(data, train__steps=1), tmp_path / "run")
    log = result.folder.log_file.read_text().splitlines()
    assert log[0].split(" ", 2)[2].startswith(f"data: {data}, ")
    assert "training tokens, 3,968 validation tokens, tokenizer tokenizer.model of 384 pieces" in log[0]
    assert any("step 1 val (raw weights): scoring 3,968 tokens" in line for line in log)
