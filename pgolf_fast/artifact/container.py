"""The artifact file: a configuration and named arrays in sections, each coded by what makes it smallest.

There is no pickle in it; docs/artifact.md describes every byte. Whatever is wrong with a file is a
`PgolfError` that names the file, the section and the byte where that starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.artifact import codecs, reader
from pgolf_fast.artifact.reader import (
    MAX_DIMENSIONS,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_RAW_BYTES,
    MAX_TENSORS,
    SECTIONS,
    Kind,
)
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path
from pgolf_fast.ops import native

DTYPES: dict[str, tuple[str, ...]] = {
    kind: tuple(reader.DTYPES[number] for number in numbers)
    for kind, numbers in zip(reader.KINDS, reader.KIND_DTYPES, strict=True)
}
Codecs = Sequence[str] | Mapping[str, Sequence[str]]  # for all sections, or by the name of each
_DEFAULT_SECTION = {"codes": "codes", "scales": "scales"}  # every other kind: "small"


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
    """Bytes of one section, unpacked and in the file, and the codec between them."""

    name: str
    raw_bytes: int
    stored_bytes: int
    codec: str


@dataclass(frozen=True)
class ContainerSizes:
    """Bytes of a container: the file's size is `total_bytes`, of which `header_bytes` are no section's.

    sha256: the artifact's identity, in hexadecimal: the digest that ends the file.
    """

    header_bytes: int
    sections: tuple[SectionSize, ...]
    sha256: str

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + sum(section.stored_bytes for section in self.sections)


def write_container(
    path: Path | str,
    config: dict[str, Any],
    tensors: Sequence[TensorRecord],
    *,
    codecs: Codecs = ("rans", "lzma"),
    preset: int = 9,
) -> ContainerSizes:
    """Write a container, all of it or nothing; the same input gives the same bytes (for one liblzma).

    config: JSON values only. Sections are coded in parallel, each by the one of `codecs` (for all sections,
    or by the name of each) that makes it smallest, or stored plain if none does; `preset`, 0 (fast) to 9
    (small), is that of LZMA.
    Raises PgolfError for a duplicate name, a config that is no JSON, or more than 1 GiB of tensors.
    """
    parts = _lay_out(config, tensors, codecs, preset)
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for part in (parts.header, *(blob for _, blob in parts.sections)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
    header_bytes = len(parts.header) + reader.DIGEST_BYTES
    return ContainerSizes(header_bytes, tuple(size for size, _ in parts.sections), digest.hexdigest())


def container_bytes(
    config: dict[str, Any],
    tensors: Sequence[TensorRecord],
    *,
    codecs: Codecs = ("rans", "lzma"),
    preset: int = 9,
) -> int:
    """Bytes of the file that `write_container` would write. Raises PgolfError as that does."""
    parts = _lay_out(config, tensors, codecs, preset)
    return len(parts.header) + sum(len(blob) for _, blob in parts.sections) + reader.DIGEST_BYTES


def read_container(source: Path | str | bytes) -> tuple[dict[str, Any], list[TensorRecord]]:
    """The configuration and the tensors, in the order in which they were written; arrays are writable copies.

    Nothing is believed: lengths are compared with the file's size and the limits before memory is taken for
    them, every section has a checksum and the file a digest, and every byte must be accounted for. The C++
    extension reads where it is there, else plain Python does. Raises PgolfError.
    """
    with _opened(source) as (file, _):
        data = source if isinstance(source, bytes) else file.read()
        config, sections, tensors, unpacked = (native.lzma_extension() or reader).read_container(data)
        tensors = [reader.TensorEntry(*entry) for entry in tensors]
        raw = {}
        for section, part in zip(itertools.starmap(reader.SectionEntry, sections), unpacked, strict=True):
            raw[section.name] = reader.unpack_section(data, section, tensors) if part is None else part
        tree = _parse_config(config)
    return tree, [_record(entry, raw) for entry in tensors]


def sizes(source: Path | str | bytes) -> ContainerSizes:
    """Byte counts of a container from its checked header; sections are not looked at. Raises PgolfError."""
    with _opened(source) as (file, size):
        head = file.read(reader.START)
        if len(head) == reader.START:
            head += file.read(min(reader.PREFIX.unpack_from(head)[3], MAX_HEADER_BYTES))
        sections = reader.read_header(head, size).sections
        file.seek(size - reader.DIGEST_BYTES)
        digest = file.read()
    header_bytes = size - sum(entry.stored_bytes for entry in sections)
    names = ((SECTIONS[entry.name], entry, reader.CODEC_NAMES[entry.codec]) for entry in sections)
    return ContainerSizes(
        header_bytes,
        tuple(SectionSize(name, entry.raw_bytes, entry.stored_bytes, codec) for name, entry, codec in names),
        digest.hex(),
    )


# Writing


def _record_problem(record: TensorRecord) -> str | None:
    if not isinstance(record.name, str) or not 0 < len(_utf8(record.name)) < 1 << 16:
        return "its name is not a text of 1 to 65535 bytes of UTF-8"
    if record.kind not in DTYPES:
        return f"its kind is {record.kind!r}, but one of {', '.join(DTYPES)} is needed"
    if record.dtype not in DTYPES[record.kind]:
        return f"{record.kind} are stored as {' or '.join(DTYPES[record.kind])}, not as {record.dtype}"
    if record.array.dtype.name != record.dtype or record.array.shape != tuple(record.shape):
        found = f"{record.array.dtype.name} {record.array.shape}"
        return f"it says {record.dtype} {tuple(record.shape)}, but its array is {found}"
    if record.array.ndim > MAX_DIMENSIONS:
        return f"it has {record.array.ndim} dimensions, but at most {MAX_DIMENSIONS} are possible"
    if math.prod(filter(None, record.array.shape)) * record.array.itemsize > MAX_RAW_BYTES:
        return f"the product of its sizes {record.array.shape} is beyond the limit of {MAX_RAW_BYTES} bytes"
    if record.section is not None and record.section not in SECTIONS:
        return f"its section is {record.section!r}, but one of {', '.join(SECTIONS)} is needed"
    return None


def _utf8(text: str) -> bytes:
    """The text's bytes, none at all when it has half a surrogate pair in it."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return b""


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


@dataclass(frozen=True)
class _Parts:
    """A container but for its digest: prefix and header, then the sections."""

    header: bytes
    sections: list[tuple[SectionSize, bytes]]


def _lay_out(
    config: dict[str, Any], tensors: Sequence[TensorRecord], candidates: Codecs, preset: int
) -> _Parts:
    _refuse_too_much(tensors)

    def coded(section: str) -> tuple[SectionSize, bytes]:
        arrays = [r.array for r in tensors if r.section == section]
        raw = b"".join(np.ascontiguousarray(a, _little_endian(a.dtype.name)).tobytes() for a in arrays)
        shapes = [reader.codec_shape(a.shape, a.itemsize) for a in arrays]
        tried = candidates[section] if isinstance(candidates, Mapping) else candidates
        codec, stored = codecs.smallest(raw, shapes, tried, {"lzma": {"preset": preset}})
        return SectionSize(section, len(raw), len(stored), codec), stored

    used = [name for name in SECTIONS if any(record.section == name for record in tensors)]
    try:
        with ThreadPoolExecutor(len(SECTIONS)) as pool:
            sections = list(pool.map(coded, used))
        return _Parts(_header(config, tensors, sections, preset), sections)
    except ValueError as error:
        raise PgolfError(str(error)) from error


def _refuse_too_much(tensors: Sequence[TensorRecord]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise PgolfError(f"{len(tensors)} tensors do not fit into an artifact: the limit is {MAX_TENSORS}")
    if (total := sum(record.array.nbytes for record in tensors)) > MAX_RAW_BYTES:
        raise PgolfError(
            f"{total} bytes of tensors do not fit into an artifact: the limit is {MAX_RAW_BYTES} bytes"
        )
    seen: set[str] = set()
    for record in tensors:
        if record.name in seen:
            raise PgolfError(
                f"two tensors are called {record.name!r}: every name may go into an artifact once"
            )
        seen.add(record.name)


def _header(
    config: dict[str, Any],
    tensors: Iterable[TensorRecord],
    sections: Sequence[tuple[SectionSize, bytes]],
    preset: int,
) -> bytes:
    """Prefix, checksum and header as they are stored."""
    raw = _raw_header(_json(config), tensors, sections)
    if len(raw) > MAX_HEADER_BYTES:
        raise PgolfError(
            f"the artifact's header would be {len(raw)} bytes: the limit is {MAX_HEADER_BYTES} bytes"
        )
    codec, stored = codecs.smallest(raw, [(1, len(raw), 1)], ("lzma",), {"lzma": {"preset": preset}})
    end = reader.START + len(stored) + sum(len(blob) for _, blob in sections)
    prefix = reader.PREFIX.pack(
        reader.MAGIC,
        reader.VERSION,
        codecs.CODECS[codec],
        len(stored),
        len(raw),
        end + reader.DIGEST_BYTES,
    )
    return prefix + reader.CRC.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored


def _raw_header(
    config: bytes, tensors: Iterable[TensorRecord], sections: Sequence[tuple[SectionSize, bytes]]
) -> bytes:
    raw = bytearray(reader.CONFIG_BYTES.pack(len(config)) + config)
    raw += reader.SECTION_COUNT.pack(len(sections))
    for size, blob in sections:
        numbers = SECTIONS.index(size.name), codecs.CODECS[size.codec]
        raw += reader.SECTION.pack(*numbers, size.raw_bytes, size.stored_bytes, zlib.crc32(blob))
    records = list(tensors)
    raw += reader.TENSOR_COUNT.pack(len(records))
    for record in records:
        assert record.section is not None  # set by TensorRecord
        kind, dtype = reader.KINDS.index(record.kind), reader.DTYPES.index(record.dtype)
        shape, name = record.array.shape, record.name.encode("utf-8")
        raw += reader.TENSOR.pack(SECTIONS.index(record.section), kind, dtype, len(shape))
        raw += np.array(shape, "<u4").tobytes() + reader.NAME_BYTES.pack(len(name)) + name
    return bytes(raw)


def _json(config: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(config, allow_nan=False, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise PgolfError(f"the configuration cannot be written as JSON: {error}") from error


# Reading


@contextlib.contextmanager
def _opened(source: Path | str | bytes) -> Iterator[tuple[BinaryIO, int]]:
    """The artifact as a file, and its size; every error inside becomes one that names it."""
    name = "(in memory)" if isinstance(source, bytes) else str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            if size > MAX_FILE_BYTES:
                raise ValueError(f"has {size} bytes, but no artifact has more than {MAX_FILE_BYTES}")
            file.seek(0)
            yield file, size
    except OSError as error:
        raise PgolfError(f"artifact {name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PgolfError(f"artifact {name} {error}") from error


def _parse_config(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        tree = json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise reader.damaged("header", reader.START, f"its configuration is no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise reader.damaged("header", reader.START, "its configuration is no JSON object")
    return tree


def _record(entry: reader.TensorEntry, raw: dict[int, bytes]) -> TensorRecord:
    dtype = reader.DTYPES[entry.dtype]
    array = np.frombuffer(raw[entry.section], _little_endian(dtype), math.prod(entry.shape), entry.offset)
    native_copy = array.reshape(entry.shape).astype(dtype)  # in this machine's byte order
    return TensorRecord.of(entry.name, reader.KINDS[entry.kind], native_copy, SECTIONS[entry.section])
