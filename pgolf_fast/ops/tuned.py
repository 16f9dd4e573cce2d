"""Tiles measured on this machine by `pgolf tune`, kept in one JSON file.

The file is in $PGOLF_FAST_CACHE or the user's cache folder. A tile is valid for one kernel, dtype, GPU,
Triton version and kernel source, and for any number of tokens. PGOLF_FAST_TUNE=off ignores the file. Loading
never measures.
"""

import ast
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata, util
from pathlib import Path

import torch

from pgolf_fast import console
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import read_json, write_text
from pgolf_fast.ops import tiles
from pgolf_fast.ops.tiles import Tile

FILE_NAME = "tiles.json"


@dataclass(frozen=True)
class Tuned:
    """The fastest tile of a kernel, and the time of the whole op with it and with the table's, in ms."""

    kernel: str
    dtype: str
    gpu: str
    triton: str
    source: str
    tile: Tile
    ms: float
    table_ms: float
    measured: str

    @property
    def key(self) -> str:
        """Return everything that the tile is valid for."""
        return "|".join((self.kernel, self.dtype, self.gpu, self.triton, self.source))


def cache_file() -> Path:
    """Return the file that tiles are kept in."""
    folder = os.environ.get("PGOLF_FAST_CACHE")
    if folder is not None:
        return Path(folder) / FILE_NAME
    try:
        import platformdirs
    except ImportError:  # a checkout that runs without being installed
        return Path.home() / ".cache" / "pgolf_fast" / FILE_NAME
    return Path(platformdirs.user_cache_dir("pgolf_fast")) / FILE_NAME


def triton_version() -> str:
    """Return the version of the installed Triton, or "none"."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def kernel_files() -> list[Path]:
    """Return the source files of the kernels; none if they are not installed."""
    spec = util.find_spec("pgolf_fast.kernels")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [path for folder in folders for path in sorted(Path(folder).glob("*.py"))]


def source_hash(kernel: str) -> str:
    """Hash the kernel files that begin with the kernel's first word, and of the files they import.

    A kernel whose name matches no file is hashed over all files.
    """
    files = {path.stem: path for path in kernel_files()}
    word = kernel.split("_")[0]
    waiting = [stem for stem in files if stem.split("_")[0] == word] or list(files)
    seen: set[str] = set()
    while waiting:
        stem = waiting.pop()
        if stem not in seen and stem in files:
            seen.add(stem)
            nodes = ast.walk(ast.parse(files[stem].read_text(encoding="utf-8")))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            waiting += [m.split(".")[2] for m in modules if m.startswith("pgolf_fast.kernels.")]
    digest = hashlib.sha256()
    for stem in sorted(seen):
        digest.update(stem.encode() + b"\0" + files[stem].read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_rows(path: Path) -> list[Tuned]:
    """Return all tiles of a file; none if it does not exist. An unreadable file is ignored with a warning."""
    if not path.is_file():
        return []
    try:
        return [_parse(entry) for entry in read_json(path)["tiles"]]
    except (OSError, PgolfError, ValueError, KeyError, TypeError, AttributeError) as error:
        console.logger.warning("%s was not written by `pgolf tune` (%s): its tiles are ignored", path, error)
        return []


def _parse(entry: dict[str, object]) -> Tuned:
    given = entry["tile"]
    if not isinstance(given, dict) or set(given) != {field.name for field in fields(Tile)}:
        raise ValueError(f"a tile has fields {given!r}")
    if not all(isinstance(value, int) and 0 < value <= 65_536 for value in given.values()):
        raise ValueError(f"a tile is {given!r}")
    return Tuned(**{**entry, "tile": Tile(**given)})  # type: ignore[arg-type]  # fields are checked by name


def save_rows(path: Path, found: Sequence[Tuned]) -> None:
    """Add tiles to the file, replacing those with the same key. The file is written whole or not at all."""
    known = {one.key: one for one in (*read_rows(path), *found)}
    entries = [asdict(one) for _, one in sorted(known.items())]
    write_text(path, json.dumps({"tiles": entries}, indent=1) + "\n")


def load_tuned(device: torch.device | None = None, path: Path | None = None) -> int:
    """Put this GPU's tiles into the table and return how many there are; 0 without a GPU.

    The table is written for 16-bit elements, so only tiles measured in bfloat16 are used.
    """
    if os.environ.get("PGOLF_FAST_TUNE") == "off" or not torch.cuda.is_available():
        return 0
    device = device or torch.device("cuda", torch.cuda.current_device())
    found = matching(read_rows(path or cache_file()), torch.cuda.get_device_name(device))
    arch = tiles.architecture(device)
    tiles.set_tiles({one.kernel: {arch: one.tile} for one in found})
    if found:
        console.logger.info("%d tiles measured on this GPU", len(found))
    return len(found)


def matching(found: Sequence[Tuned], gpu: str) -> list[Tuned]:
    """Return the tiles for that GPU, the installed Triton and the kernels' present source."""
    version, known = triton_version(), set(tiles.kernels())
    return [
        one
        for one in found
        if (one.gpu, one.triton, one.dtype) == (gpu, version, "bfloat16")
        and one.kernel in known
        and one.source == source_hash(one.kernel)
    ]
