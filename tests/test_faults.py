"""Every row of docs/faults.md: a fault in a command, what it says, what it keeps, and how to go on."""

import ctypes
import errno
import hashlib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import make_dataset, run_config, words

from pgolf_fast import cli, io
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.io import load_tensors, save_tensors
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.state import QuantizedState
from pgolf_fast.train.checkpoint import newest_whole

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
COMMANDS = ("train", "quantize", "pack", "eval", "submit", "report")
FAULTS = (
    *("SIGINT", "SIGTERM", "SIGKILL", "disk full", "read-only", "truncation", "bit flip", "two processes"),
    *("NaN", "out of memory", "moved data", "hostile file"),
)
QUICK = {("train", "SIGINT"), ("eval", "NaN")}


@dataclass(frozen=True)
class Row:
    """One line of a table of the page."""

    command: str
    fault: str
    status: int
    says: tuple[str, ...]
    kept: tuple[str, ...]
    then: tuple[str, ...]


def rows():
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        command, *lines = section.splitlines()
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 5 and cells[0] in FAULTS:
                quoted = [tuple(re.findall("`([^`]+)`", cell)) for cell in cells[2:]]
                found.append(Row(command, cells[0], int(cells[1]), *quoted))
    return found


class Place:
    """A finished run of its own for one row, its data, and the arguments of the command."""

    def __init__(self, row, made, folder):
        self.row, self.data, self.run = row, folder / "data", folder / "run"
        self.new, self.moved = folder / "new", folder / "moved"
        shutil.copytree(made / "data", self.data)
        shutil.copytree(made / "run", self.run, symlinks=True)
        config = self.run / "config.json"  # names its data by an absolute path
        config.write_text(config.read_text().replace(str(made / "data"), str(self.data)))
        self.folder = RunFolder(self.run)

    def arguments(self, text):
        """The words of a command of the page."""
        names = {"RUN": [self.run], "NEW": [self.new], "DATA": [self.data], "MOVED": [self.moved]}
        options = [*words(run_config(self.data)), "--train.checkpoint-minutes", "0"]
        names["OPTIONS"] = options
        return [str(w) for word in shlex.split(text)[1:] for w in names.get(word, [word])]

    def command(self):
        name = self.row.command
        if name == "train":
            return self.arguments("pgolf train --resume RUN --train.steps 12")
        return self.arguments(f"pgolf {name} RUN" + (" --out NEW" if name == "submit" else ""))

    def input(self):
        """The file that the command starts from."""
        f = self.folder
        newest = max(f.checkpoints.glob("step_*"))
        of = {"train": newest, "quantize": f.model_file, "pack": f.quantized_file, "eval": f.artifact_file}
        if self.row.command == "submit" and self.row.fault in ("truncation", "bit flip"):
            return f.artifact_file
        return of.get(self.row.command, f.scores_file("artifact"))

    def digest(self):
        """The content of every kept file."""
        paths = [self.run / name for name in self.row.kept if name != "checkpoints/"]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


PRODUCT = {  # a pattern of the name of the file that the command ends by writing
    "train": "step_",
    "quantize": "quantized",
    "pack": "model.pgolf",
    "eval": "scores_",
    "submit": "submission.json",
    "report": "report.html",
}


def at_product(row, act):
    """Do `act` when the product of the row's command is on the disk but has not its name yet."""
    replace = io.os.replace

    def hooked(source, target):
        if PRODUCT[row.command] in Path(target).name:
            io.os.replace = replace
            act()
        replace(source, target)

    io.os.replace = hooked


def send(number):
    os.kill(os.getpid(), number)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def without_root_powers():
    """Lose CAP_DAC_OVERRIDE: permissions hold for this process even if it is root's."""
    libc, header, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[0] &= ~2
    assert libc.capset(header, data) == 0


def with_nan(path):
    tensors, metadata = load_tensors(path)
    name = max(tensors, key=lambda n: tensors[n].numel() * tensors[n].is_floating_point())
    tensors[name].view(-1)[7] = float("nan")
    save_tensors(path, tensors, metadata)


def before(place):
    """Make the faults that lie in files, before the command starts."""
    row, source = place.row, place.input()
    if row.fault == "truncation":
        os.truncate(source, source.stat().st_size // 2)
    elif row.fault == "bit flip":
        content = bytearray(source.read_bytes())
        content[len(content) * 3 // 4] ^= 16
        source.write_bytes(content)
    elif row.fault == "moved data":
        place.data.rename(place.moved)
    elif row.fault == "read-only":
        for path in (place.run, place.folder.checkpoints):
            path.chmod(0o555)
    elif row.fault == "NaN" and row.command in ("quantize", "pack"):
        with_nan(source)
    elif row.fault == "NaN" and row.command in ("submit", "report"):
        source.write_text(re.sub(r'"bpb": [0-9.]+', '"bpb": NaN', source.read_text()))
    elif row.fault == "NaN" and row.command == "eval":
        with_nan(place.folder.quantized_file)
    elif row.fault == "hostile file":
        hostile = {
            "train": b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR.",
            "quantize": b"<!DOCTYPE html><title>Not found</title>",
            "pack": b"version https://git-lfs.github.com/spec/v1\n",
            "eval": b"\x89PGOLF\r\n" + bytes(range(256)) * 16,
            "submit": b'{"sliding": ' + b"[" * 99999 + b"]" * 99999 + b"}",
            "report": b'{"kind": "step", "step": "abc"}\n\xff\xfe\n',
        }
        source = place.folder.metrics_file if row.command == "report" else source
        for old in source.parent.glob("step_*") if row.command == "train" else [source]:
            old.write_bytes(hostile[row.command])


def inside(place):
    """Make the faults that come while the command runs, in its process."""
    row = place.row
    if row.fault.startswith("SIG"):
        at_product(row, lambda: send(signal.Signals[row.fault]))
    elif row.fault == "disk full":
        at_product(row, full)
    elif row.fault == "read-only":
        without_root_powers()
    elif row.fault == "NaN":  # in the artifact, which `pgolf pack` would not write
        QuantizedState.check = lambda state: state
    elif row.fault == "out of memory":
        if row.command == "train":
            torch.Tensor.backward = no_memory
        elif row.command == "eval":
            GPT.token_losses = no_memory
        else:
            at_product(row, no_memory)


def no_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def child(arguments, log, place):
    """Run one command in this forked process, with its output in `log`."""
    os.chdir(log.parent)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    if place is not None:
        inside(place)
    status = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "pgolf_fast.train.loop", "pgolf_fast.cli.run"])
    return context


def run(forks, arguments, log, place=None):
    process = forks.Process(target=child, args=(arguments, log, place))
    process.start()
    process.join(120)
    assert process.exitcode is not None, f"{arguments} did not end: {log.read_text()}"
    return process.exitcode


@pytest.fixture(scope="module")
def made(tmp_path_factory, forks):
    """A run that went through every command."""
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "data")
    options = [*words(run_config(folder / "data")), "--train.checkpoint-minutes", "0"]
    log, run_folder = folder / "log", folder / "run"
    assert run(forks, ["train", "tiny", *options, "--out", str(run_folder)], log) == 0, log.read_text()
    for name in COMMANDS[1:]:
        out = ["--out", str(folder / "out")] if name == "submit" else []
        assert run(forks, [name, str(run_folder), *out], log) == 0, log.read_text()
    return folder


def test_the_page_has_every_fault_of_every_command():
    assert [(row.command, row.fault) for row in rows()] == [(c, f) for c in COMMANDS for f in FAULTS]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            r, id=f"{r.command}-{r.fault}", marks=[] if (r.command, r.fault) in QUICK else [pytest.mark.slow]
        )
        for r in rows()
    ],
)
def test_fault(row, made, forks, tmp_path):
    place = Place(row, made, tmp_path)
    before(place)
    kept, log = place.digest(), tmp_path / "log"
    if row.fault == "two processes":
        with place.folder.lock():
            status = run(forks, place.command(), log, place)
    else:
        if row.fault == "NaN" and row.command == "eval":
            assert run(forks, place.arguments("pgolf pack RUN"), tmp_path / "pack.log", place) == 0
        more = ["--optim.matrix-lr", "1e30"] if (row.command, row.fault) == ("train", "NaN") else []
        status = run(forks, [*place.command(), *more], log, None if row.fault == "NaN" else place)
    said = log.read_text() if log.is_file() else ""
    assert status == row.status, said
    assert "Traceback" not in said
    for text in row.says:
        assert text in said
    assert place.digest() == kept, said
    if "checkpoints/" in row.kept:
        assert newest_whole(place.folder, place.folder.read_config()) is not None
    still, then = place if row.fault == "read-only" else None, tmp_path / "then.log"
    for text in row.then:
        assert run(forks, place.arguments(text), then, still) == 0, then.read_text()
    with place.folder.lock():  # whoever writes next removes what a killed process left
        assert not list(place.run.rglob(".*.tmp"))
