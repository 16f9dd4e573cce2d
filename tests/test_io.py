"""Files are written completely or not at all; the previous file survives every failure."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf_fast import io
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import (
    atomic_path,
    load_metadata,
    load_tensors,
    locked,
    read_json,
    save_tensors,
    write_bytes,
    write_json,
    write_text,
)


def fail_with(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_into_new_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "text", "Ünï\n")
    write_bytes(str(tmp_path / "a" / "bytes"), b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "Ünï\n".encode()
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "a") == ["b", "bytes"]


def test_replaces_the_previous_file(tmp_path):
    write_text(tmp_path / "f", "a long first version")
    write_text(tmp_path / "f", "second")
    assert (tmp_path / "f").read_text() == "second"
    assert names(tmp_path) == ["f"]


def test_nothing_is_visible_before_the_end(tmp_path):
    write_text(tmp_path / "f", "old")
    with atomic_path(tmp_path / "f") as temporary:
        assert temporary.parent == tmp_path  # the same file system, so that the rename is atomic
        temporary.write_text("new, but")
        assert (tmp_path / "f").read_text() == "old"
        temporary.write_text("new")
    assert (tmp_path / "f").read_text() == "new"


@pytest.mark.parametrize("previous", ["old", None])
def test_failure_leaves_the_previous_file(tmp_path, previous):
    final = tmp_path / "f"
    if previous:
        write_text(final, previous)

    def half_written():
        with atomic_path(final) as temporary:
            temporary.write_text("half of the n")
            raise KeyError("the work failed")

    with pytest.raises(KeyError, match="the work failed"):
        half_written()
    assert names(tmp_path) == (["f"] if previous else [])
    assert not previous or final.read_text() == previous


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["rename", "flush", "write"])
def test_full_disk_is_explained(tmp_path, monkeypatch, where, number):
    final = tmp_path / "weights.bin"
    write_text(final, "old")
    if where == "write":
        monkeypatch.setattr(Path, "write_bytes", fail_with(number))
    else:
        monkeypatch.setattr(io.os, {"rename": "replace", "flush": "fsync"}[where], fail_with(number))
    with pytest.raises(PgolfError, match=r"cannot write .*weights\.bin: .*free some") as caught:
        write_bytes(final, b"new")
    assert "previous file, if any, is unchanged" in str(caught.value)
    assert final.read_text() == "old"
    assert names(tmp_path) == ["weights.bin"]


def test_other_errors_pass_through(tmp_path, monkeypatch):
    monkeypatch.setattr(io.os, "replace", fail_with(errno.EACCES))
    with pytest.raises(PermissionError):
        write_text(tmp_path / "f", "new")
    assert names(tmp_path) == []


def test_flushed_before_renamed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(io.os, "fsync", lambda fd: (order.append("flush"), fsync(fd)))
    monkeypatch.setattr(io.os, "replace", lambda *a: (order.append("rename"), replace(*a)))
    write_text(tmp_path / "f", "x")
    assert order == ["flush", "rename"]


def test_tensors_come_back_with_their_metadata(tmp_path):
    path, metadata = tmp_path / "x.safetensors", {"step": 3, "names": ["a"], "nothing": None}
    save_tensors(path, {"a": torch.arange(6).view(2, 3).T}, metadata)
    tensors, read = load_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T)
    assert read == load_metadata(path) == metadata
    path.write_bytes(path.read_bytes()[:20])
    for load in (load_tensors, load_metadata):
        with pytest.raises(PgolfError, match=r"x.safetensors cannot be read as tensors: it is damaged or"):
            load(path)


def test_full_disk_names_the_tensor_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.zeros(3)}, {})
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", fail_with(errno.ENOSPC))
    with pytest.raises(PgolfError, match=r"cannot write .*model.safetensors: no space is left"):
        save_tensors(path, {"a": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]


def test_lock_names_its_owner_and_ends_with_it(tmp_path):
    with locked(tmp_path / ".lock", "runs/a is in use"):
        line = rf"runs/a is in use: process {os.getpid()} on {socket.gethostname()} has held its lock for 0 s"
        with pytest.raises(PgolfError, match=line), locked(tmp_path / ".lock", "runs/a is in use"):
            pass
    with locked(tmp_path / ".lock", "busy"):  # free again
        pass


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    program = f"""import os, pathlib, pgolf_fast.io as io
with io.locked(pathlib.Path({str(tmp_path / "l")!r}), ""):
    os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    with locked(tmp_path / "l", "busy"):
        assert (tmp_path / "l").read_text().split()[0] == str(os.getpid())


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_get_the_mode_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "tensors", {"a": torch.ones(1)}, {})
        write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("tensors", "text")} == {0o666 & ~mask}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1', "line 1"),
        (b'{"a": "\xff"}', "not valid JSON in UTF-8: byte 7 is 0xff"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": ' + b"[" * 99999 + b"]" * 99999 + b"}", "nested too deeply"),
        (b"[1]", "holds a JSON list, not a dict"),
        (b"", "line 1"),
    ],
)
def test_what_is_not_json_is_named(tmp_path, content, problem):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PgolfError, match=rf"config\.json .*{problem}"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("value", "name"),
    [({"a": [1.0, {"b": float("nan")}]}, "a.1.b is nan"), (float("inf"), "the value is inf")],
)
def test_json_never_holds_nan(tmp_path, value, name):
    write_json(tmp_path / "scores.json", {"a": 1.5})
    with pytest.raises(PgolfError, match=name):
        write_json(tmp_path / "scores.json", value)
    assert read_json(tmp_path / "scores.json") == {"a": 1.5}


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """The folder need not exist yet; a file in its way, or an ancestor that is read-only, is named."""
    io.need_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(PgolfError, match="file is a file: give another --out FILE"):
        io.need_writable(tmp_path / "file" / "deeper", "--out FILE")

    def refuse(dir):
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PgolfError, match=r"b cannot be written \(Permission denied\): give --out DIR"):
        io.need_writable(tmp_path / "a" / "b")


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """A rename would do that to /dev/null, for root."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PgolfError, match="pipe is a device or a pipe: give the path of a file"):
        io.write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
