"""Files that appear whole or not at all, locks, and named tensors with metadata."""

from __future__ import annotations

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


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that is flushed to disk and renamed onto it when the block succeeds.

    When the block fails, the temporary file is removed and whatever stood at `path` before is untouched.
    A full disk is reported as a `PgolfError` naming the file.
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
    """Hold the lock file `path`, which stays, for the block; the system frees it if this process is killed.

    Raises PgolfError with the line `busy` while another process holds it.
    """
    import fcntl  # not everywhere, and needed by no other function

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PgolfError(busy) from None
        yield


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects taskset; missing on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def save_tensors(path: Path, tensors: dict[str, Tensor], story: dict[str, Any]) -> None:
    """Write tensors with a JSON `story` in the file's metadata, atomically.

    Raises PgolfError naming the file when the disk is full; what stood there before is unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(ready, temporary, metadata={"story": json.dumps(story)})
        except SafetensorError as error:
            if any(f"os error {code})" in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`. Raises PgolfError for a file that is not one."""
    with _opened(path) as (handle, story):
        return {name: handle.get_tensor(name) for name in handle.keys()}, story  # noqa: SIM118 - not a dict


def load_story(path: Path) -> dict[str, Any]:
    """The story alone, without reading the tensors. Raises PgolfError as `load_tensors`."""
    with _opened(path) as (_, story):
        return story


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            yield handle, json.loads((handle.metadata() or {}).get("story", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise PgolfError(
            f"{path} cannot be read as tensors: it is damaged or another kind of file ({error})"
        ) from error
