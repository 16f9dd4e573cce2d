"""How a command ends: one line and a status for errors, bugs and signals; output that any terminal takes."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from pgolf_fast import cli
from pgolf_fast.cli import commands

COMMAND = [sys.executable, "-m", "pgolf_fast.cli"]


@pytest.fixture
def ending(monkeypatch, capsys):
    """Run a command line whose work is `function`; return the status and standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(function, *words):
        monkeypatch.setattr(cli, "_dispatch", lambda _: function())
        status = cli.main(words)
        return status, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fail(error):
    raise error


def test_a_bug_is_one_line_and_its_own_status(ending, monkeypatch):
    monkeypatch.delenv("PGOLF_TRACEBACK", raising=False)
    status, text = ending(lambda: fail(KeyError("x")))
    assert status == 70
    assert text.startswith("pgolf: this is a bug in pgolf_fast: KeyError: 'x' (")
    assert len(text.splitlines()) == 1
    monkeypatch.setenv("PGOLF_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in ending(lambda: fail(KeyError("x")))[1]


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["train", "small"], "lower train.micro_batch_tokens"),
        (["eval", "run"], "lower eval.batch_seqs"),
        (["audit", "run"], "lower eval.batch_seqs"),
        (["data", "tokenize", "x"], "lower --workers"),
        (["doctor"], "use a machine with more"),
    ],
)
def test_out_of_memory_names_the_setting_of_the_command(ending, words, setting):
    status, text = ending(lambda: fail(RuntimeError("DefaultCPUAllocator: can't allocate memory")), *words)
    assert status == 2
    assert text.startswith(f"pgolf: out of memory: {setting}")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_command_in_one_line(ending, number):
    """Without a handler SIGTERM ends the process silently, with half of its temporary files."""
    status, text = ending(lambda: os.kill(os.getpid(), number), "eval", "run")
    assert status == 128 + number
    assert text == "pgolf: interrupted; the same command continues from the state that was saved last\n"


def test_an_interrupt_advises_only_what_is_true(ending):
    assert ending(lambda: fail(KeyboardInterrupt()), "generate", "run")[1] == "pgolf: interrupted\n"
    own = KeyboardInterrupt("stopped by SIGTERM")
    own.status = 143
    assert ending(lambda: fail(own), "train", "tiny") == (
        143,
        "pgolf: stopped by SIGTERM; `pgolf train` resumes with --resume\n",
    )


def test_names_with_line_ends_stay_in_one_line(capsys):
    assert cli.main(["eval", "a\nb\x1b[31m\udcff"]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert r"a\nb\x1b[31m\udcff" in text


def test_errors_of_files_name_them(ending):
    assert ending(lambda: open("/nowhere/x"))[1] == "pgolf: /nowhere/x: No such file or directory\n"  # noqa: SIM115
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert ending(lambda: fail(full))[1] == "pgolf: writing: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "latin-1"])
def test_output_that_the_encoding_lacks_is_escaped(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, "eval", "café 文"], capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert "café 文".encode(encoding, "backslashreplace") in done.stderr


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "| true", "2>&1 | true"]
)
def test_standard_files_that_are_closed_full_or_unread(redirection):
    """Python reports what it cannot flush at exit with status 120."""
    line = f"set -o pipefail; {sys.executable} -m pgolf_fast.cli --help {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "full" in redirection else 0)
    assert done.stderr in ("", "pgolf: writing: No space left on device\n")


def test_files_do_not_become_standard_output():
    """With standard output closed, the next file that is opened would get its number."""
    code = (
        "import os; from pgolf_fast import cli; cli.main(['--version']); print(os.open('/dev/null', 0) > 2)"
    )
    line = f'{sys.executable} -c "{code}" >&-'
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0


def test_every_command_has_a_known_name_for_its_advice():
    assert set(cli._TELL) <= set(commands.COMMANDS)
