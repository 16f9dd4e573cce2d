"""What a person reads: log lines, metrics, tables, durations."""

import itertools
import json
import logging
import math

import pytest

from pgolf_fast import console
from pgolf_fast.console import MetricsWriter, duration, progress, read_metrics, setup_logging, table


@pytest.fixture(autouse=True)
def close_log_handlers():
    before = console.logger.propagate, console.logger.level
    yield
    console.close_logging()
    console.logger.propagate = before[0]
    console.logger.setLevel(before[1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (3.21, "3.2s"),
        (59.9, "59.9s"),
        (60, "1m00s"),
        (75.2, "1m15s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (4800, "1h20m"),
        (90_061, "25h01m"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_seconds_never_round_up_to_sixty():
    assert duration(59.97) == "1m00s"


def test_table_aligns_columns():
    text = table([("mlp", 1.5, "12"), ("softcap", "10.25", "9,300")], header=("op", "ms", "GB/s"))
    assert text.splitlines() == [
        "op          ms   GB/s",
        "-------  -----  -----",
        "mlp        1.5     12",
        "softcap  10.25  9,300",
    ]


def test_table_with_words_among_numbers_is_left_aligned():
    assert table([("a", "1"), ("b", "none")]).splitlines() == ["a  1", "b  none"]


def test_table_numbers():
    assert table([("-1.5",), ("+20%",), ("1.2e-5",)]).splitlines() == ["  -1.5", "  +20%", "1.2e-5"]


def test_table_without_rows():
    assert table([]) == ""
    assert table([], header=("op", "ms")).splitlines() == ["op  ms", "--  --"]


def test_metrics_survive_a_cut_last_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write("train", step=1, loss=6.9)
    writer.write("val", step=2, bpb=1.1, note="Ünï")
    rows = [{"kind": "train", "step": 1, "loss": 6.9}, {"kind": "val", "step": 2, "bpb": 1.1, "note": "Ünï"}]
    assert read_metrics(path) == rows  # on disk before the writer is closed
    writer.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    assert read_metrics(path) == rows


def test_metrics_go_on_after_a_cut_line(tmp_path):
    """A resumed run appends to the file a crash has cut: its first line must not be lost."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr', encoding="utf-8")
    writer = MetricsWriter(path)
    writer.write("train", step=2)
    writer.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_metrics_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        writer = MetricsWriter(path)
        writer.write("train", step=step)
        writer.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["train"] * 3


def test_metrics_without_a_file():
    writer = MetricsWriter(None)
    writer.write("train", step=1)
    writer.close()


def test_log_lines_go_to_stderr_and_the_file(tmp_path, capsys):
    log = tmp_path / "run" / "train.log"
    setup_logging(log)
    logging.getLogger("pgolf_fast").info("step %d", 1)
    setup_logging(log)  # once more, as a second run in one process does: no line twice
    logging.getLogger("pgolf_fast.ops").warning("slow path")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "step 1\nslow path\n"
    assert log.read_text() == "step 1\nslow path\n"


def test_quiet_logging(tmp_path, capsys):
    setup_logging(tmp_path / "log", quiet=True)
    console.logger.info("hidden")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log").read_text() == "hidden\n"


def test_progress_reports_every_ten_seconds(monkeypatch, capsys):
    clock = itertools.count(0, 4.0)  # every look at the clock is four seconds later
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    setup_logging()
    assert list(progress(range(6), "scoring", unit="batch")) == list(range(6))
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 3/6 batch, 0.25 batch/s, ETA 12.0s",
        "scoring: 6/6 batch, 0.25 batch/s, ETA 0.0s",
    ]


def test_progress_without_a_length(monkeypatch, capsys):
    clock = itertools.count(0, 20.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    setup_logging()
    assert list(progress(iter("ab"), "reading")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[0] == "reading: 1 it, 0.05 it/s"
