"""The artifact file: a configuration and named arrays in LZMA sections. No pickle; see docs/artifact.md.

Whatever is wrong with a file is a `PgolfError` that names the section and the byte where it starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.errors import PgolfError
from pgolf_fast.files import atomic_path
from pgolf_fast.ops.lzma import compress_bytes, decompress_bytes

MAGIC = b"PGOLFART"
VERSION = 1
SECTIONS = ("codes", "scales", "embeddings", "small")
MAX_RAW_BYTES = 1 << 30  # of all sections together, when unpacked
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 8

Kind = Literal["codes", "scales", "float16", "float32", "integer"]
DTYPES: dict[str, tuple[str, ...]] = {
    "codes": ("int8",),
    "scales": ("float16",),
    "float16": ("float16",),
    "float32": ("float32",),
    "integer": ("int8", "uint8", "int16", "uint16", "int32", "int64"),
}
_DEFAULT_SECTION = {"codes": "codes", "scales": "scales"}  # every other kind: "small"

# magic, version, header codec (0 plain, 1 LZMA), header bytes stored, header bytes raw; then the CRC-32 of
# all that and the stored header.
_PREFIX = struct.Struct("<8sIIII")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """One named array.

    kind: what the numbers are; it fixes the dtypes allowed (`DTYPES`). Codes are int8, one byte per weight;
    scales are float16. section: one of `SECTIONS`; None follows from the kind.
    Raises PgolfError when kind, dtype, shape, section and array do not fit together.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    array: NDArray[Any]
    section: str | None = None

    def __post_init__(self) -> None:
        if problem := _record_problem(self):
            raise PgolfError(f"tensor {self.name!r} cannot go into an artifact: {problem}")
        if self.section is None:
            object.__setattr__(self, "section", _DEFAULT_SECTION.get(self.kind, "small"))

    @classmethod
    def of(cls, name: str, kind: Kind, array: NDArray[Any], section: str | None = None) -> TensorRecord:
        """A record whose dtype and shape are the array's own."""
        return cls(name, kind, array.dtype.name, array.shape, array, section)


@dataclass(frozen=True)
class SectionSize:
    """Bytes of one section, unpacked and in the file."""

    name: str
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class ContainerSizes:
    """Bytes of a container: the file's size is `total_bytes`, header and stored sections together."""

    header_bytes: int
    sections: tuple[SectionSize, ...]

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + sum(section.stored_bytes for section in self.sections)


def write_container(
    path: Path | str, config: dict[str, Any], tensors: Sequence[TensorRecord], *, preset: int = 9
) -> ContainerSizes:
    """Write a container, all of it or nothing; the same input gives the same bytes (for one liblzma).

    config: JSON values only. Sections are compressed in parallel, `preset` 0 (fast) to 9 (small).
    Raises PgolfError for a duplicate name, a config that is no JSON, or more than 1 GiB of tensors.
    """
    header, blobs = _lay_out(config, tensors, preset)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for _, _, blob in blobs:
            file.write(blob)
    sections = tuple(SectionSize(name, raw_bytes, len(blob)) for name, raw_bytes, blob in blobs)
    return ContainerSizes(len(header), sections)


def read_container(source: Path | str | bytes) -> tuple[dict[str, Any], list[TensorRecord]]:
    """The configuration and the tensors, in the order in which they were written; arrays are writable copies.

    Nothing is believed: lengths are compared with the file's size before memory is taken for them, every
    section has a checksum, and every byte of the file must be accounted for. Raises PgolfError.
    """
    with _opened(source) as reader:
        header = reader.header()
        raw = {entry["name"]: reader.section(entry, offset) for entry, offset in header.sections()}
    records = []
    for entry in header.tensors:
        array = np.frombuffer(
            raw[entry["section"]], _little_endian(entry["dtype"]), math.prod(entry["shape"]), entry["offset"]
        ).reshape(entry["shape"])
        native = array.astype(entry["dtype"])  # a copy, in this machine's byte order
        records.append(TensorRecord.of(entry["name"], entry["kind"], native, entry["section"]))
    return header.config, records


def sizes(source: Path | str | bytes) -> ContainerSizes:
    """Byte counts of a container from its checked header; sections are not unpacked. Raises PgolfError."""
    with _opened(source) as reader:
        header = reader.header()
    sections = (SectionSize(e["name"], e["raw_bytes"], e["stored_bytes"]) for e, _ in header.sections())
    return ContainerSizes(header.end, tuple(sections))


# Writing


def _record_problem(record: TensorRecord) -> str | None:
    if not isinstance(record.name, str) or not record.name:
        return "its name is not a non-empty text"
    if record.kind not in DTYPES:
        return f"its kind is {record.kind!r}, but one of {', '.join(DTYPES)} is needed"
    if record.dtype not in DTYPES[record.kind]:
        return f"{record.kind} are stored as {' or '.join(DTYPES[record.kind])}, not as {record.dtype}"
    if record.array.dtype.name != record.dtype or record.array.shape != tuple(record.shape):
        found = f"{record.array.dtype.name} {record.array.shape}"
        return f"it says {record.dtype} {tuple(record.shape)}, but its array is {found}"
    if record.array.ndim > MAX_DIMENSIONS:
        return f"it has {record.array.ndim} dimensions, but at most {MAX_DIMENSIONS} are possible"
    if record.section is not None and record.section not in SECTIONS:
        return f"its section is {record.section!r}, but one of {', '.join(SECTIONS)} is needed"
    return None


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _lay_out(
    config: dict[str, Any], tensors: Sequence[TensorRecord], preset: int
) -> tuple[bytes, list[tuple[str, int, bytes]]]:
    """The header's bytes and (name, raw bytes, stored bytes) of every section that holds a tensor."""
    _refuse_duplicates(tensors)
    entries, parts = [], {name: bytearray() for name in SECTIONS}
    for record in tensors:
        assert record.section is not None  # set by TensorRecord
        content = np.ascontiguousarray(record.array, _little_endian(record.dtype)).tobytes()
        part = parts[record.section]
        entries.append(
            {
                "name": record.name,
                "kind": record.kind,
                "dtype": record.dtype,
                "shape": [int(size) for size in record.shape],
                "section": record.section,
                "offset": len(part),
                "nbytes": len(content),
            }
        )
        part += content
    if (total := sum(map(len, parts.values()))) > MAX_RAW_BYTES:
        raise PgolfError(
            f"{total} bytes of tensors do not fit into an artifact: the limit is {MAX_RAW_BYTES} bytes"
        )
    used = [name for name in SECTIONS if any(record.section == name for record in tensors)]
    with ThreadPoolExecutor() as pool:
        packed = list(pool.map(lambda name: _shorter(bytes(parts[name]), preset), used))
    sections = [
        {
            "name": name,
            "codec": codec,
            "raw_bytes": len(parts[name]),
            "stored_bytes": len(blob),
            "crc32": zlib.crc32(blob),
        }
        for name, (codec, blob) in zip(used, packed, strict=True)
    ]
    header = _encode_header({"config": config, "tensors": entries, "sections": sections}, preset)
    return header, [(name, len(parts[name]), blob) for name, (_, blob) in zip(used, packed, strict=True)]


def _refuse_duplicates(tensors: Iterable[TensorRecord]) -> None:
    seen: set[str] = set()
    for record in tensors:
        if record.name in seen:
            raise PgolfError(
                f"two tensors are called {record.name!r}: every name may go into an artifact once"
            )
        seen.add(record.name)


def _shorter(raw: bytes, preset: int) -> tuple[str, bytes]:
    try:
        packed = compress_bytes(raw, preset)
    except ValueError as error:
        raise PgolfError(str(error)) from error
    return ("lzma", packed) if len(packed) < len(raw) else ("raw", raw)


def _encode_header(header: dict[str, Any], preset: int) -> bytes:
    try:
        text = json.dumps(header, allow_nan=False, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        raw = text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise PgolfError(f"the configuration cannot be written as JSON: {error}") from error
    if len(raw) > MAX_HEADER_BYTES:
        raise PgolfError(
            f"the artifact's header would be {len(raw)} bytes: the limit is {MAX_HEADER_BYTES} bytes"
        )
    codec, stored = _shorter(raw, preset)
    prefix = _PREFIX.pack(MAGIC, VERSION, int(codec == "lzma"), len(stored), len(raw))
    return prefix + _CRC.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored


# Reading


@dataclass(frozen=True)
class _Header:
    """A header that was checked against the file's size and in itself."""

    config: dict[str, Any]
    tensors: list[dict[str, Any]]
    section_entries: list[dict[str, Any]]
    end: int  # where the first section starts

    def sections(self) -> list[tuple[dict[str, Any], int]]:
        """Every section's entry with the byte of the file at which it starts."""
        placed, offset = [], self.end
        for entry in self.section_entries:
            placed.append((entry, offset))
            offset += entry["stored_bytes"]
        return placed


@contextlib.contextmanager
def _opened(source: Path | str | bytes) -> Iterator[_Reader]:
    if isinstance(source, bytes):
        yield _Reader("(in memory)", io.BytesIO(source))
        return
    try:
        with open(source, "rb") as file:
            yield _Reader(str(source), file)
    except OSError as error:
        raise PgolfError(f"artifact {source} cannot be read: {error.strerror}") from error


class _Reader:
    """Reads the parts of one container and knows what to call it in messages."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self.file = name, file
        self.size = file.seek(0, io.SEEK_END)

    def damaged(self, section: str, offset: int, problem: str) -> NoReturn:
        raise PgolfError(
            f"artifact {self.name} is damaged in section '{section}' at byte {offset}: {problem}; "
            "copy it again from where it came, or pack it again"
        )

    def read(self, offset: int, count: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(count)

    def header(self) -> _Header:
        start = _PREFIX.size + _CRC.size
        prefix = self.read(0, start)
        if prefix[: len(MAGIC)] != MAGIC:
            raise PgolfError(
                f"artifact {self.name} is none: it does not start with {MAGIC.decode()}; "
                "`pgolf pack` writes artifacts"
            )
        if len(prefix) < start:
            self.damaged("header", len(MAGIC), f"the file ends after {self.size} bytes")
        _, version, codec, stored_bytes, raw_bytes = _PREFIX.unpack(prefix[: _PREFIX.size])
        if version != VERSION:
            raise PgolfError(
                f"artifact {self.name} has version {version}, but this program reads version {VERSION}: "
                "read it with the release of pgolf-fast that wrote it"
            )
        if stored_bytes > self.size - start or max(stored_bytes, raw_bytes) > MAX_HEADER_BYTES:
            self.damaged("header", 16, f"it claims {stored_bytes} bytes, but {self.size - start} are left")
        stored = self.read(start, stored_bytes)
        self.check_crc(
            "header", start, stored, _CRC.unpack(prefix[_PREFIX.size :])[0], prefix[: _PREFIX.size]
        )
        if codec not in (0, 1):
            self.damaged("header", 12, f"its codec is {codec}, but 0 or 1 is needed")
        raw = self.unpacked("header", start, stored, "lzma" if codec else "raw", raw_bytes)
        return self.parse_header(raw, start, start + stored_bytes)

    def parse_header(self, raw: bytes, start: int, end: int) -> _Header:
        try:
            tree = json.loads(raw.decode("utf-8"))
            problem = _header_problem(tree, self.size - end)
        except (ValueError, RecursionError) as error:
            problem = f"it is no JSON text ({error})"
        if problem:
            self.damaged("header", start, problem)
        return _Header(tree["config"], tree["tensors"], tree["sections"], end)

    def section(self, entry: dict[str, Any], offset: int) -> bytes:
        stored = self.read(offset, entry["stored_bytes"])
        self.check_crc(entry["name"], offset, stored, entry["crc32"])
        return self.unpacked(entry["name"], offset, stored, entry["codec"], entry["raw_bytes"])

    def check_crc(self, section: str, offset: int, stored: bytes, want: int, before: bytes = b"") -> None:
        got = zlib.crc32(stored, zlib.crc32(before))
        if got != want:
            self.damaged(section, offset, f"its checksum is {got:08x}, but {want:08x} was written")

    def unpacked(self, section: str, offset: int, stored: bytes, codec: str, raw_bytes: int) -> bytes:
        if codec == "raw":
            if len(stored) != raw_bytes:
                self.damaged(section, offset, f"it holds {len(stored)} bytes, but {raw_bytes} were stated")
            return stored
        try:
            return decompress_bytes(stored, raw_bytes)
        except ValueError as error:
            self.damaged(section, offset, str(error))


_SECTION_FIELDS = {"name": str, "codec": str, "raw_bytes": int, "stored_bytes": int, "crc32": int}
_TENSOR_FIELDS = {
    "name": str,
    "kind": str,
    "dtype": str,
    "shape": list,
    "section": str,
    "offset": int,
    "nbytes": int,
}


def _header_problem(tree: Any, bytes_left: int) -> str | None:
    """What is wrong with a parsed header whose sections must fill `bytes_left`, or None."""
    if not _has_fields(tree, {"config": dict, "tensors": list, "sections": list}):
        return "it has not exactly the fields config, tensors and sections"
    return _sections_problem(tree["sections"], bytes_left) or _tensors_problem(
        tree["tensors"], tree["sections"]
    )


def _has_fields(entry: Any, fields: dict[str, type]) -> bool:
    """Whether `entry` is a dict of exactly these fields and types, its numbers whole and not negative."""
    if not isinstance(entry, dict) or entry.keys() != fields.keys():
        return False
    return all(
        type(entry[name]) is kind and (kind is not int or entry[name] >= 0) for name, kind in fields.items()
    )


def _sections_problem(sections: list[Any], bytes_left: int) -> str | None:
    for number, entry in enumerate(sections):
        if not _has_fields(entry, _SECTION_FIELDS):
            return f"section {number} has not exactly the fields {', '.join(_SECTION_FIELDS)}"
        if entry["name"] not in SECTIONS:
            return f"section {number} has the unknown name {entry['name']!r}"
        if entry["codec"] not in ("lzma", "raw"):
            return f"section '{entry['name']}' has the unknown codec {entry['codec']!r}"
    names = [entry["name"] for entry in sections]
    if len(set(names)) < len(names):
        return "two sections have one name"
    if (raw := sum(entry["raw_bytes"] for entry in sections)) > MAX_RAW_BYTES:
        return f"its sections claim {raw} bytes when unpacked, but {MAX_RAW_BYTES} are the limit"
    if (stored := sum(entry["stored_bytes"] for entry in sections)) != bytes_left:
        return f"its sections claim {stored} bytes, but {bytes_left} follow the header"
    return None


def _tensors_problem(tensors: list[Any], sections: list[dict[str, Any]]) -> str | None:
    filled = {entry["name"]: 0 for entry in sections}
    names: set[str] = set()
    for number, entry in enumerate(tensors):
        if not _has_fields(entry, _TENSOR_FIELDS):
            return f"tensor {number} has not exactly the fields {', '.join(_TENSOR_FIELDS)}"
        label = f"tensor {entry['name']!r}"
        if entry["name"] in names or not entry["name"]:
            return f"the name of {label} is empty or occurs twice"
        names.add(entry["name"])
        if entry["dtype"] not in DTYPES.get(entry["kind"], ()):
            return f"{label} has kind {entry['kind']!r} and dtype {entry['dtype']!r}"
        if not _is_shape(entry["shape"]):
            return f"the shape of {label} is no list of at most {MAX_DIMENSIONS} sizes"
        if math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize != entry["nbytes"]:
            return f"{label} of shape {entry['shape']} does not take {entry['nbytes']} bytes"
        if filled.get(entry["section"]) != entry["offset"]:
            return f"{label} does not follow the tensor before it in section {entry['section']!r}"
        filled[entry["section"]] += entry["nbytes"]
    for entry in sections:
        if filled[entry["name"]] != entry["raw_bytes"]:
            return f"the tensors of section '{entry['name']}' do not fill its {entry['raw_bytes']} bytes"
    return None


def _is_shape(shape: list[Any]) -> bool:
    limit = 1 << 40  # keeps products small; far above any size that passes the byte limits
    return len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < limit for n in shape)
