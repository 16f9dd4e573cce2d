"""Atomic writes, file locks, named tensors with metadata, and the CPU cores of this process."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    from torch import Tensor


def available_cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only; respects taskset and container limits
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which is flushed and renamed to `path` if the block succeeds.

    If the block fails, the temporary file is removed and the previous file at `path` is unchanged. Raises
    PgolfError naming the file if the disk is full.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PgolfError(
                f"no space left while writing {final}: free some space there or choose another folder; "
                "the previous file, if any, is unchanged"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` during the block. The system releases the lock of a process that dies.

    Raises PgolfError with the message `busy` if another process holds the lock.
    """
    import fcntl  # not available on Windows, and only needed here

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PgolfError(busy) from None
        yield


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def save_tensors(path: Path, tensors: dict[str, "Tensor"], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON `metadata` as a safetensors file, atomically, as `atomic_path` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            # a safetensors file holds strings only, so the metadata is one JSON string
            save_file(ready, temporary, metadata={"metadata": json.dumps(metadata)})
        except SafetensorError as error:
            # safetensors reports the system's error number in its text only
            if any(f"os error {code})" in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return what `save_tensors` wrote. Raises PgolfError if the file is damaged or of another kind."""
    with _opened(path) as (handle, metadata):
        return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118


def load_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata without reading the tensors. Raises PgolfError as `load_tensors` does."""
    with _opened(path) as (_, metadata):
        return metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            yield handle, json.loads((handle.metadata() or {}).get("metadata", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise PgolfError(
            f"{path} cannot be read as tensors: it is damaged or another kind of file ({error})"
        ) from error
