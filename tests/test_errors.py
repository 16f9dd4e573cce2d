"""What any exception becomes: a status and one line."""

import errno
import os

import numpy as np
import pytest
import torch

from pgolf_fast import errors
from pgolf_fast.errors import PgolfError, explain, one_line


class OutOfMemoryError(RuntimeError):
    """Named like that of torch, which is known by name only."""


class DistNetworkError(type("DistError", (RuntimeError,), {})):
    pass


def raised(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        function(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PgolfError("give a preset"), "give a preset"),
        (MemoryError(), "out of memory: lower --x"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"),
            "lower --x (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0)",
        ),
        (RuntimeError("can't start new thread"), "out of memory: lower --x"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "writing: No space left on device"),
        (OSError("odd"), "system error: odd"),
        (
            UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte"),
            "can't decode byte 0xff in position 2",
        ),
        (
            UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"),
            "a name or text that is not Unicode cannot be written",
        ),
        (
            ModuleNotFoundError("No module named 'jinja2.x'", name="jinja2.x"),
            "a package is not installed (No module named 'jinja2.x')",
        ),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OverflowError("Python int too large to convert to C long"), "a number is too large (Python int"),
        (
            DistNetworkError("timed out\nframe #0: c10"),
            "another rank has ended or cannot be reached (timed out)",
        ),
        (
            RuntimeError("[/gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:3"),
            "another rank has ended",
        ),
    ],
)
def test_what_a_person_can_cause_is_bad_input(error, line):
    status, text = explain(error, "lower --x")
    assert status == errors.BAD_INPUT
    assert line in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "make", [lambda: torch.empty(2**60), lambda: np.empty(2**60), lambda: torch.empty(2**62, 9)]
)
def test_real_allocations_that_fail(make):
    """MemoryError alone would miss torch's, which are RuntimeErrors."""
    status, text = explain(raised(make), "lower eval.batch_seqs")
    assert status == errors.BAD_INPUT
    assert text.startswith("out of memory: lower eval.batch_seqs (")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        AssertionError(),
        TypeError("a\nb"),
        IndexError("index 5 is out of bounds for axis 0 with size 5"),  # no number that is too large
        ModuleNotFoundError("No module named 'pgolf_fast.x'", name="pgolf_fast.x"),  # no package to install
    ],
)
def test_anything_else_is_a_bug_and_says_so(error):
    status, text = explain(error)
    assert status == errors.BUG == 70
    assert text.startswith(f"this is a bug in pgolf_fast: {type(error).__name__}: ")
    assert "PGOLF_TRACEBACK=1" in text
    assert len(text.splitlines()) == 1


def test_a_bug_names_the_innermost_line_of_the_package():
    error = raised(one_line, None)
    assert "(errors.py:" in explain(error)[1]


def test_one_line_of_any_text():
    # a file name may hold line ends, colors and bytes that are not UTF-8
    assert one_line("a\nb\x1b[31m\udcffé\t日") == r"a\nb\x1b[31m\udcffé\t日"
    assert one_line("a\nb\r", keep="\n") == "a\nb\\r"
    assert len(one_line("x" * 10**6)) < 5000
    assert os.fsencode(one_line("\udcff")).isascii()
