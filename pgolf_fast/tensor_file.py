"""Named tensors and their story (JSON) in one safetensors file, written whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast.errors import PgolfError
from pgolf_fast.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            yield handle, json.loads((handle.metadata() or {}).get("story", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise PgolfError(
            f"{path} cannot be read as tensors: it is damaged or another kind of file ({error})"
        ) from error
