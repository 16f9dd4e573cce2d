"""JSON, atomic writes, file locks, and named tensors with metadata."""

import contextlib
import errno
import json
import math
import os
import re
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    from torch import Tensor

_FULL = {
    errno.ENOSPC: "no space is left; free some there or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "it is larger than this process may write; raise `ulimit -f` or choose another folder",
}


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which is flushed and renamed to `path` if the block succeeds.

    Otherwise it is removed, and `path` is unchanged. Raises PgolfError naming the file if the disk is full.
    """
    final = Path(path)
    if final.exists() and not (final.is_file() or final.is_dir()):  # root would replace /dev/null
        raise PgolfError(f"{final} is a device or a pipe: give the path of a file")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors would make it readable by its owner only
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(mode)
        os.replace(temporary, final)
    except OSError as error:
        if error.errno in _FULL:
            problem = f"{cannot_write(final, error)}; the previous file, if any, is unchanged"
            raise PgolfError(problem) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> PgolfError:
    """Return the error of a failed write: the file, the reason and, if the disk is full, what to do."""
    return PgolfError(f"cannot write {path}: {_FULL.get(error.errno or 0, error.strerror)}")


def need_writable(folder: Path, option: str = "--out DIR") -> None:
    """Raise PgolfError naming `option` unless `folder` is writable or can be created."""
    place = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not place.is_dir():
        raise PgolfError(f"{place} is a file: give another {option}")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if error.errno in _FULL:  # what is written later may replace larger files
            return
        reason = os.strerror(error.errno or 0)
        raise PgolfError(f"{folder} cannot be written ({reason}): give {option} for the results") from error


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes in `folder`. The caller holds the folder's lock."""
    for file in folder.glob(".*.[0-9]*.tmp"):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` during the block. The system releases the lock of a process that dies.

    If another process holds it, wait or, with `busy`, raise PgolfError with that text, process, host and age.
    """
    import fcntl  # not available on Windows, and only needed here

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.seek(0)
            pid, _, host = handle.read().strip().partition(" ")
            owner = f"process {pid} on {host}" if host else "another process"
            age = max(0.0, time.time() - os.fstat(handle.fileno()).st_mtime)
            raise PgolfError(f"{busy}: {owner} has held its lock for {age:.0f} s") from None
        handle.truncate(0)
        handle.write(f"{os.getpid()} {socket.gethostname()}\n")
        handle.flush()
        yield


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value of JSON `text`. Raises PgolfError naming `where`, a file or a line of one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"(line {error.lineno}): {error.msg}"
    except UnicodeDecodeError as error:
        reason = f"in UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
    except RecursionError:
        reason = "that can be read: it is nested too deeply"
    except ValueError:  # Python refuses integers of more than 4,300 digits
        reason = "that can be read: an integer has too many digits"
    raise PgolfError(f"{where} is not valid JSON {reason}")


def read_json(path: Path) -> Any:
    """Return the object in a JSON file. Raises PgolfError if it is not JSON, or its value not an object."""
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise PgolfError(f"{path} holds a JSON {type(value).__name__}, not a dict: it was changed")
    return value


@contextlib.contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Raise PgolfError if the block, which reads `path`, finds missing parts or wrong types."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PgolfError(f"{path} was damaged or changed after it was written ({reason})") from error


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically. Raises PgolfError naming the entry that is NaN or infinite."""
    if wrong := _not_finite(value):
        raise PgolfError(f"{path} is not written: {wrong[0]} is {wrong[1]}")
    write_text(path, json.dumps(value, indent=indent) + "\n")


def _not_finite(value: Any, name: str = "") -> tuple[str, float] | None:
    """Return the dotted name and the value of the first number in a tree that is NaN or infinite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (name or "the value", value)
    if not isinstance(value, dict | list | tuple):
        return None
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = (_not_finite(item, f"{name}.{key}" if name else str(key)) for key, item in items)
    return next(filter(None, found), None)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def save_tensors(path: Path, tensors: dict[str, "Tensor"], metadata: dict[str, Any]) -> None:
    """Write tensors, JSON `metadata` and a checksum of both as a safetensors file, as `atomic_path` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    text = json.dumps(metadata)
    with atomic_path(path) as temporary:
        try:
            # a safetensors file holds strings only, so the metadata is one JSON string
            save_file(ready, temporary, metadata={"metadata": text, "crc32": _checksum(ready, text)})
        except SafetensorError as error:
            # safetensors reports the system's error number in its text only
            if code := re.search(r"os error (\d+)\)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
            raise


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return what `save_tensors` wrote. Raises PgolfError if the file is damaged or of another kind."""
    with _opened(path) as (handle, metadata):
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        stored = handle.metadata() or {}
    if "crc32" in stored and stored["crc32"] != _checksum(tensors, stored.get("metadata", "")):
        raise PgolfError(f"{path} is damaged: its contents do not match their checksum")
    return tensors, metadata


def _checksum(tensors: dict[str, "Tensor"], text: str) -> str:
    """Return the CRC-32 of a text and of names, dtypes, shapes and values of tensors on the CPU."""
    import torch

    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def load_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata without reading the tensors. Raises PgolfError as `load_tensors` does."""
    with _opened(path) as (_, metadata):
        return metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            yield handle, parse_json((handle.metadata() or {}).get("metadata", "{}"), f"metadata of {path}")
    except (SafetensorError, OSError) as error:
        problem = f"it is damaged or another kind of file ({error})"
        raise PgolfError(f"{path} cannot be read as tensors: {problem}") from error
