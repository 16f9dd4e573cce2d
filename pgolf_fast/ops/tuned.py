"""Launch rows that were measured on this machine: where they are kept, and how they replace the table's.

One JSON file, written by `pgolf tune`, in $PGOLF_FAST_CACHE or the user's cache folder. A row counts for one
kernel, dtype, GPU, Triton version and kernel source, and for every number of tokens. PGOLF_FAST_TUNE=off
ignores the file. Loading never measures anything.
"""

from __future__ import annotations

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
from pgolf_fast.io import write_text
from pgolf_fast.ops import launch
from pgolf_fast.ops.launch import Launch

FILE_NAME = "launches.json"


@dataclass(frozen=True)
class Tuned:
    """The best row found for a kernel, and the two times that say so (of the whole op, in milliseconds)."""

    kernel: str
    dtype: str
    gpu: str
    triton: str
    source: str
    row: Launch
    ms: float
    table_ms: float
    measured: str

    @property
    def key(self) -> str:
        return "|".join((self.kernel, self.dtype, self.gpu, self.triton, self.source))


def cache_file() -> Path:
    """Where rows are kept."""
    folder = os.environ.get("PGOLF_FAST_CACHE")
    if folder is not None:
        return Path(folder) / FILE_NAME
    try:
        import platformdirs
    except ImportError:  # a checkout that runs without being installed
        return Path.home() / ".cache" / "pgolf_fast" / FILE_NAME
    return Path(platformdirs.user_cache_dir("pgolf_fast")) / FILE_NAME


def triton_version() -> str:
    """Of the installed Triton; 'none' without it."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def source_hash(kernel: str) -> str:
    """Over the files of kernels/ that begin with the kernel's first word, and the files those import.

    A kernel whose name matches no file is hashed over all of them.
    """
    spec = util.find_spec("pgolf_fast.kernels")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ()) if spec] if spec else []
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}
    word = kernel.split("_")[0]
    wanted = [stem for stem in files if stem.split("_")[0] == word] or list(files)
    seen: set[str] = set()
    while wanted:
        stem = wanted.pop()
        if stem not in seen and stem in files:
            seen.add(stem)
            wanted += _imported(files[stem])
    digest = hashlib.sha256()
    for stem in sorted(seen):
        digest.update(stem.encode() + b"\0" + files[stem].read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _imported(path: Path) -> list[str]:
    """Modules of pgolf_fast.kernels that a kernel file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return [m.split(".")[2] for m in modules if m.startswith("pgolf_fast.kernels.")]


def read_rows(path: Path) -> list[Tuned]:
    """All rows of a file; none when it does not exist. A file that cannot be read is reported and ignored."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_row(entry) for entry in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        console.logger.warning(
            "%s is not a file of `pgolf tune` (%s): its launch rows are ignored", path, error
        )
        return []


def _row(entry: dict[str, object]) -> Tuned:
    given = entry["row"]
    names = {f.name for f in fields(Launch)}
    if not isinstance(given, dict) or set(given) != names:
        raise ValueError(f"a row has fields {given!r}")
    if not all(isinstance(value, int) and 0 < value <= 65_536 for value in given.values()):
        raise ValueError(f"a row is {given!r}")
    return Tuned(**{**entry, "row": Launch(**given)})  # type: ignore[arg-type]  # fields are checked by name


def save_rows(path: Path, rows: Sequence[Tuned]) -> None:
    """Add rows to the file, in place of those with the same key. Written whole or not at all."""
    known = {row.key: row for row in (*read_rows(path), *rows)}
    entries = [asdict(row) for _, row in sorted(known.items())]
    write_text(path, json.dumps({"rows": entries}, indent=1) + "\n")


def load_tuned(device: torch.device | None = None, path: Path | None = None) -> int:
    """Put this GPU's rows into the launch table; returns how many. Nothing happens without a GPU.

    The table is written for 16-bit elements, so rows measured in bfloat16 are the ones that count.
    """
    if os.environ.get("PGOLF_FAST_TUNE") == "off" or not torch.cuda.is_available():
        return 0
    device = device or torch.device("cuda", torch.cuda.current_device())
    rows = matching(read_rows(path or cache_file()), torch.cuda.get_device_name(device))
    arch = launch.architecture(device)
    launch.set_launches({row.kernel: {arch: row.row} for row in rows})
    if rows:
        console.logger.info("%d launch rows measured on this GPU", len(rows))
    return len(rows)


def matching(rows: Sequence[Tuned], gpu: str) -> list[Tuned]:
    """Rows for that GPU, the installed Triton and the kernels as they are now."""
    version, known = triton_version(), set(launch.kernels())
    return [
        row
        for row in rows
        if (row.gpu, row.triton, row.dtype) == (gpu, version, "bfloat16")
        and row.kernel in known
        and row.source == source_hash(row.kernel)
    ]
