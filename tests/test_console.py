"""Log lines, metrics, tables, durations."""

import errno
import itertools
import json
import logging
import math
import os
import re
import time
from datetime import datetime
from types import SimpleNamespace

import pytest

from pgolf_fast import console
from pgolf_fast.console import MetricsWriter, Table, duration, number, progress, read_metrics, setup_logging
from pgolf_fast.errors import PgolfError


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
    table = Table(("op", "ms", "GB/s"), [("mlp", 1.5, "12"), ("softcap", "10.25", "9,300")])
    assert table.text().splitlines() == [
        "op          ms   GB/s",
        "-------  -----  -----",
        "mlp        1.5     12",
        "softcap  10.25  9,300",
    ]


def test_table_with_words_among_numbers_is_left_aligned():
    assert Table(None, [("a", "1"), ("b", "none")]).text().splitlines() == ["a  1", "b  none"]


def test_table_numbers():
    assert Table(None, [("-1.5",), ("+20%",), ("1.2e-5",)]).text().splitlines() == [
        "  -1.5",
        "  +20%",
        "1.2e-5",
    ]


def test_table_without_rows():
    assert Table(None, []).text() == ""
    assert Table(("op", "ms"), []).text().splitlines() == ["op  ms", "--  --"]


def test_table_numeric_columns():
    rows = [
        ("a", "1,234", "1.5 ms", "-", "1 of 2", "+0.01", "", "3 %", "nan", "1.0 to 2.0", "C1"),
        ("b", "-", "-2e-05", "-", "3", "±0.02", "7", "~4", "2", "3", "2"),
    ]
    numeric = [False, True, True, False, False, True, True, True, True, False, False]
    assert Table(None, rows).numeric() == numeric


def test_table_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"table 'Times': row \('b',\) has 1 cells, not 2"):
        Table(("op", "ms"), [("a", "1"), ("b",)], "Times")
    with pytest.raises(ValueError, match="has 1 cells, not 2"):
        Table(None, [("a", "1"), ("b",)])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1", True])
def test_number_shows_a_dash_for_anything_else(value):
    assert number(value) == "-"


def test_number_formats():
    assert number(1.25, ".1f") == "1.2"
    assert number(3) == "3"


def test_metrics_survive_a_truncated_last_line(tmp_path):
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


def test_metrics_resume_after_a_truncated_line(tmp_path):
    """A resumed run appends to a file truncated by a crash; its first line must not be lost."""
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
    setup_logging(log)  # again, as a second run in the same process: no line twice
    logging.getLogger("pgolf_fast.ops").warning("slow path")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "step 1\nslow path\n"
    stamped = re.fullmatch(r"(\S+ \S+) step 1\n(\S+ \S+) slow path\n", log.read_text())
    for stamp in stamped.groups():
        datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S")


def test_quiet_logging(tmp_path, capsys):
    setup_logging(tmp_path / "log", quiet=True)
    console.logger.info("hidden")
    assert capsys.readouterr().err == ""
    console.logger.warning("also hidden")  # Python prints warnings where there is no handler at all
    assert capsys.readouterr().err == ""
    assert [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text().splitlines()] == [
        "hidden",
        "also hidden",
    ]


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC, errno.EIO])
def test_a_log_that_cannot_be_written_is_given_up_in_one_line(tmp_path, capsys, code):
    """By default `logging` prints a traceback for every line, and closing the file raises once more."""
    setup_logging(tmp_path / "log")
    console.logger.info("first")
    (file,) = [h.stream for h in console.logger.handlers if isinstance(h, console._LogFile)]
    with file._file:
        file._file = SimpleNamespace(write=fails(code), close=lambda: None)
        for line in ("second", "third"):
            console.logger.info(line)
        console.close_logging()
    *before, note, last = capsys.readouterr().err.splitlines()
    assert (before, last) == (["first", "second"], "third")
    assert note.startswith(f"cannot write {tmp_path}/log: ")
    assert note.endswith("; log lines are no longer kept")


def fails(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("part", [0, 5])
def test_metrics_on_a_full_disk_name_the_file(tmp_path, part):
    """The disk takes a part of the line; a buffer would keep the rest and fail again when the file closes."""
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write("step", step=1)
    raw, sizes = writer._file._file, iter([part])

    def write(data):
        size = next(sizes, 0)
        return raw.write(data[:size]) if size else fails(errno.ENOSPC)()

    writer._file._file = SimpleNamespace(write=write, close=raw.close)
    with pytest.raises(PgolfError, match=rf"cannot write {path}: no space is left; free some"):
        writer.write("step", step=2)
    writer.close()
    again = MetricsWriter(path)
    again.write("step", step=2)
    again.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_progress_reports_every_ten_seconds(monkeypatch, capsys):
    clock = itertools.count(0, 4.0)  # each reading is four seconds later
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


def test_an_item_that_takes_long_is_not_silent(monkeypatch, capsys):
    """Lines at the end of items only would say nothing during the first one."""
    monkeypatch.setattr(console, "_PAUSE", 0.05)
    setup_logging()
    for _ in progress(range(1), "auditing", unit="check"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert lines[0].startswith("auditing: 0/1 check, 0.")


def test_no_line_after_the_last_item_and_none_from_a_note_that_fails(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PAUSE", 0.02)
    setup_logging()
    for _ in progress(range(2), "scoring", note=lambda: [][0]):
        time.sleep(0.01)
    capsys.readouterr()
    time.sleep(0.06)
    assert capsys.readouterr().err == ""
