"""Files are written completely or not at all; the previous file survives every failure."""

import errno
import os
from pathlib import Path

import pytest
import torch

from pgolf_fast import io
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import (
    atomic_path,
    available_cores,
    load_metadata,
    load_tensors,
    save_tensors,
    write_bytes,
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
    with pytest.raises(
        PgolfError, match=r"no space left while writing .*weights\.bin: free some space"
    ) as caught:
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
    with pytest.raises(PgolfError, match=r"no space left while writing .*model.safetensors"):
        save_tensors(path, {"a": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_available_cores_respects_the_affinity():
    allowed = os.sched_getaffinity(0)
    assert available_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
