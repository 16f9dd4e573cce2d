"""The artifact's container: a configuration and named arrays in compressed sections.

The file holds no pickle, and the reader trusts nothing in it: lengths are checked against the file's size and
fixed limits before memory is allocated, every section has a checksum, the file has a digest, and every byte
must be accounted for. `writer.py` writes it; docs/artifact.md describes every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.artifact import codecs
from pgolf_fast.errors import PgolfError

# The file stores positions in SECTIONS, KINDS, DTYPES and codecs.CODECS: append to them, never reorder.
SECTIONS = ("codes", "scales", "embeddings", "small")  # also their order in the file
Kind = Literal["codes", "scales", "float16", "float32", "integer"]
KINDS: dict[Kind, tuple[str, ...]] = {  # and the dtypes each may have
    "codes": ("int8",),
    "scales": ("float16",),
    "float16": ("float16",),
    "float32": ("float32",),
    "integer": ("int8", "uint8", "int16", "uint16", "int32", "int64"),
}
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "float32")
KIND_NAMES, CODEC_NAMES = tuple(KINDS), tuple(codecs.CODECS)
_DEFAULT_SECTION = {"codes": "codes", "scales": "scales"}  # every other kind: "small"

MAGIC = b"\x89PGOLF\r\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIIIQ")  # magic, version, header codec, stored and raw header bytes, file bytes
CRC = struct.Struct("<I")  # of the prefix and the stored header
START = PREFIX.size + CRC.size  # offset of the header
CONFIG_BYTES = struct.Struct("<I")
SECTION_COUNT = struct.Struct("<H")
SECTION = struct.Struct("<BBQQI")  # name, codec, raw bytes, stored bytes, CRC-32 of the stored bytes
TENSOR_COUNT = struct.Struct("<I")
TENSOR = struct.Struct("<BBBB")  # section, kind, dtype, dimensions; then the shape, then the name
NAME_BYTES = struct.Struct("<H")
DIGEST_BYTES = 32  # SHA-256 of everything before it; the end of the file

MAX_RAW_BYTES = 1 << 30  # of all sections together, uncompressed
MAX_HEADER_BYTES = 16 << 20  # stored and uncompressed
MAX_FILE_BYTES = START + MAX_HEADER_BYTES + MAX_RAW_BYTES + DIGEST_BYTES
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """One named array.

    `kind` fixes the allowed dtypes (`KINDS`): codes are int8, one byte per weight; scales are float16.
    `section` is one of `SECTIONS`; None derives it from the kind.
    Raises PgolfError when kind, dtype, shape, section and array disagree.
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
        """Return a record with the array's own dtype and shape."""
        return cls(name, kind, array.dtype.name, array.shape, array, section)


@dataclass(frozen=True)
class SectionSize:
    """A section's uncompressed and stored bytes, and its codec."""

    name: str
    raw_bytes: int
    stored_bytes: int
    codec: str


@dataclass(frozen=True)
class ContainerSizes:
    """A container's byte counts: header (with prefix and digest) plus sections equals `total_bytes`.

    sha256: the digest at the end of the file, in hexadecimal; it identifies the artifact.
    """

    header_bytes: int
    sections: tuple[SectionSize, ...]
    sha256: str

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + sum(section.stored_bytes for section in self.sections)


def _record_problem(record: TensorRecord) -> str | None:
    if not isinstance(record.name, str) or not 0 < len(_utf8(record.name)) < 1 << 16:
        return "its name must be 1 to 65535 bytes of UTF-8"
    if record.kind not in KINDS:
        return f"its kind is {record.kind!r}, but must be one of {', '.join(KINDS)}"
    if record.dtype not in KINDS[record.kind]:
        return f"{record.kind} are stored as {' or '.join(KINDS[record.kind])}, not as {record.dtype}"
    array = record.array
    if array.dtype.name != record.dtype or array.shape != tuple(record.shape):
        stated = f"{record.dtype} {tuple(record.shape)}"
        return f"the record says {stated}, but its array is {array.dtype.name} {array.shape}"
    if array.ndim > MAX_DIMENSIONS:
        return f"it has {array.ndim} dimensions, but at most {MAX_DIMENSIONS} are allowed"
    if _span(array.shape, array.itemsize) > MAX_RAW_BYTES:
        return f"the product of its shape {array.shape} exceeds the limit of {MAX_RAW_BYTES} bytes"
    if record.section is not None and record.section not in SECTIONS:
        return f"its section is {record.section!r}, but must be one of {', '.join(SECTIONS)}"
    return None


def _utf8(text: str) -> bytes:
    """Return the text's bytes, or none if it contains a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return b""


def _span(shape: Sequence[int], item_bytes: int) -> int:
    """Return the bytes of the nonzero sizes: an empty tensor may not hide an absurd partial product."""
    return math.prod(filter(None, shape)) * item_bytes


def codec_shape(shape: Sequence[int], dtype: str) -> codecs.Shape:
    """Return the matrix that a codec sees of a tensor: every dimension but the last counts as rows."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1, np.dtype(dtype).itemsize


def little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def read_container(source: Path | str | bytes) -> tuple[dict[str, Any], list[TensorRecord]]:
    """Return the configuration and the tensors in the order written; arrays are writable copies.

    Nothing is decompressed before every checksum matches; sections are then decoded in parallel threads.
    Raises PgolfError that names the file, the section and the byte.
    """
    with _opened(source) as (file, size):
        data = file.read()
        header = _read_header(data, size)
        _check_sums(data, header.sections)
        with ThreadPoolExecutor(len(SECTIONS)) as pool:
            decoded = pool.map(
                lambda section: _decode_section(data, section, header.tensors), header.sections
            )
            raw = {section.name: part for section, part in zip(header.sections, decoded, strict=True)}
        config = _parse_config(header.config)
    return config, [_record(tensor, raw[tensor.section]) for tensor in header.tensors]


def sizes(source: Path | str | bytes) -> ContainerSizes:
    """Return a container's byte counts from its checked header, without reading sections.

    Raises PgolfError.
    """
    with _opened(source) as (file, size):
        head = file.read(START)
        if len(head) == START:
            head += file.read(min(PREFIX.unpack_from(head)[3], MAX_HEADER_BYTES))
        sections = _read_header(head, size).sections
        file.seek(size - DIGEST_BYTES)
        digest = file.read()
    header_bytes = size - sum(section.stored_bytes for section in sections)
    counts = tuple(SectionSize(s.name, s.raw_bytes, s.stored_bytes, s.codec) for s in sections)
    return ContainerSizes(header_bytes, counts, digest.hex())


class _Section(NamedTuple):
    """A section as the header describes it; `offset` counts from the start of the file."""

    name: str
    codec: str
    raw_bytes: int
    stored_bytes: int
    crc32: int
    offset: int


class _Tensor(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the start of its decoded section."""

    name: str
    section: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Header(NamedTuple):
    """A header checked against itself and the file's size; `config` is not parsed yet."""

    config: bytes
    sections: list[_Section]
    tensors: list[_Tensor]


@contextlib.contextmanager
def _opened(source: Path | str | bytes) -> Iterator[tuple[BinaryIO, int]]:
    """Yield the artifact as a file, and its size; errors inside become PgolfErrors that name the artifact."""
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


def _damaged(section: str, offset: int, problem: str) -> ValueError:
    return ValueError(
        f"is damaged in section '{section}' at byte {offset}: {problem}; copy it again, or pack it again"
    )


def _bad_header(problem: str) -> ValueError:
    return _damaged("header", START, problem)


def _check_crc(section: str, offset: int, got: int, want: int) -> None:
    if got != want:
        raise _damaged(section, offset, f"its checksum is {got:08x}, but {want:08x} was written")


def _check_sums(data: bytes, sections: Sequence[_Section]) -> None:
    view = memoryview(data)
    for section in sections:
        stored = view[section.offset : section.offset + section.stored_bytes]
        _check_crc(section.name, section.offset, zlib.crc32(stored), section.crc32)
    if hashlib.sha256(view[:-DIGEST_BYTES]).digest() != view[-DIGEST_BYTES:]:
        raise _damaged("digest", len(data) - DIGEST_BYTES, "it is not the SHA-256 of the bytes before it")


def _decode(section: _Section, stored: bytes, shapes: Sequence[codecs.Shape]) -> bytes:
    try:
        return codecs.decode(section.codec, stored, section.raw_bytes, shapes)
    except ValueError as error:
        raise _damaged(section.name, section.offset, str(error)) from error


def _decode_section(data: bytes, section: _Section, tensors: Sequence[_Tensor]) -> bytes:
    stored = data[section.offset : section.offset + section.stored_bytes]
    return _decode(
        section, stored, [codec_shape(t.shape, t.dtype) for t in tensors if t.section == section.name]
    )


def _record(tensor: _Tensor, raw: bytes) -> TensorRecord:
    stored = np.frombuffer(raw, little_endian(tensor.dtype), math.prod(tensor.shape), tensor.offset)
    array = stored.reshape(tensor.shape).astype(tensor.dtype)  # in this machine's byte order
    return TensorRecord.of(tensor.name, tensor.kind, array, tensor.section)


def _parse_config(text: bytes) -> dict[str, Any]:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        tree = json.loads(text.decode("utf-8"), parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise _bad_header(f"its configuration is not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _bad_header("its configuration is not a JSON object")
    return tree


def _read_header(head: bytes, size: int) -> _Header:
    """Return the checked header of a file of `size` bytes.

    `head` reaches at least to the end of the header, or of the file if that is shorter. Raises ValueError.
    """
    if head[:8] != MAGIC:
        raise ValueError(
            "is not an artifact: it does not start with the bytes 89 'PGOLF'; `pgolf pack` writes artifacts"
        )
    if size < START + DIGEST_BYTES:
        raise _damaged("header", 8, f"the file ends after {size} bytes")
    _, version, codec, stored_bytes, raw_bytes, file_bytes = PREFIX.unpack_from(head)
    if version != VERSION:
        raise ValueError(
            f"has version {version}, but this program reads version {VERSION}: "
            "read it with the release of pgolf-fast that wrote it"
        )
    if file_bytes != size:
        raise _damaged("header", 24, f"the file has {size} bytes, but {file_bytes} were written")
    end = START + stored_bytes
    if end > size - DIGEST_BYTES or stored_bytes > MAX_HEADER_BYTES:
        left = size - DIGEST_BYTES - START
        raise _damaged("header", 16, f"it claims {stored_bytes} bytes, but {left} are left")
    stored = head[START:end]
    checksum = zlib.crc32(stored, zlib.crc32(head[: PREFIX.size]))
    _check_crc("header", 0, checksum, CRC.unpack_from(head, PREFIX.size)[0])
    if codec > 1:
        raise _damaged("header", 12, f"its codec is {codec}, but must be 0 or 1")
    if raw_bytes > MAX_HEADER_BYTES:
        problem = f"it claims {raw_bytes} bytes uncompressed, but the limit is {MAX_HEADER_BYTES}"
        raise _damaged("header", 20, problem)
    section = _Section("header", CODEC_NAMES[codec], raw_bytes, stored_bytes, checksum, START)
    return _parse_header(_decode(section, stored, [(1, raw_bytes, 1)]), end, size - DIGEST_BYTES)


class _Cursor:
    """A reader of consecutive fields of the uncompressed header."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int, what: str) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise _bad_header(f"it ends within {what}")
        return self.data[start : self.position]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size, what))


def _parse_header(raw: bytes, start: int, end: int) -> _Header:
    """Parse a header whose sections must fill bytes `start` to `end` of the file."""
    cursor = _Cursor(raw)
    config = cursor.take(cursor.unpack(CONFIG_BYTES, "the configuration")[0], "the configuration")
    sections = _parse_sections(cursor, start, end)
    tensors = _parse_tensors(cursor, sections)
    if left := len(raw) - cursor.position:
        raise _bad_header(f"{left} bytes follow its last tensor")
    return _Header(config, sections, tensors)


def _parse_sections(cursor: _Cursor, offset: int, end: int) -> list[_Section]:
    sections: list[_Section] = []
    last, raw_left = -1, MAX_RAW_BYTES
    for index in range(cursor.unpack(SECTION_COUNT, "the number of sections")[0]):
        number, codec, raw, stored, crc32 = cursor.unpack(SECTION, f"section {index}")
        if number >= len(SECTIONS):
            raise _bad_header(f"section {index} has the unknown name {number}")
        label = f"section '{SECTIONS[number]}'"
        if number <= last:
            raise _bad_header(f"{label} is repeated or out of order")
        if codec >= len(CODEC_NAMES):
            raise _bad_header(f"{label} has the unknown codec {codec}")
        if raw > raw_left:
            raise _bad_header(f"its sections claim more than the limit of {MAX_RAW_BYTES} bytes uncompressed")
        if stored > end - offset:
            raise _bad_header(f"{label} claims {stored} bytes, but {end - offset} are left")
        if stored > raw or (stored == raw) != (CODEC_NAMES[codec] == "raw"):
            raise _bad_header(f"{label} stores {raw} bytes in {stored}, which its codec cannot")
        sections.append(_Section(SECTIONS[number], CODEC_NAMES[codec], raw, stored, crc32, offset))
        last, raw_left, offset = number, raw_left - raw, offset + stored
    if offset != end:
        raise _bad_header(f"{end - offset} bytes of the file belong to no section")
    return sections


def _parse_tensors(cursor: _Cursor, sections: list[_Section]) -> list[_Tensor]:
    (count,) = cursor.unpack(TENSOR_COUNT, "the number of tensors")
    if count > MAX_TENSORS:
        raise _bad_header(f"it claims {count} tensors, but the limit is {MAX_TENSORS}")
    tensors: list[_Tensor] = []
    numbers: dict[str, int] = {}  # by name
    capacity = {section.name: section.raw_bytes for section in sections}
    filled: dict[str, int] = {}
    for number in range(count):
        tensor = _parse_tensor(cursor, f"tensor {number}", capacity, filled)
        if (first := numbers.setdefault(tensor.name, number)) != number:
            raise _bad_header(f"tensor {number} has the name of tensor {first}")
        tensors.append(tensor)
    for name, raw_bytes in capacity.items():
        if filled.get(name) != raw_bytes:
            raise _bad_header(f"tensors do not fill the {raw_bytes} bytes of section '{name}'")
    return tensors


def _parse_tensor(cursor: _Cursor, label: str, capacity: dict[str, int], filled: dict[str, int]) -> _Tensor:
    """Parse the next tensor and add its bytes to those `filled` in its section, at most its `capacity`."""
    number, kind, dtype, dimensions = cursor.unpack(TENSOR, label)
    section = SECTIONS[number] if number < len(SECTIONS) else ""
    if section not in capacity:
        raise _bad_header(f"{label} is in section {number}, which does not exist")
    if kind >= len(KINDS) or dtype >= len(DTYPES) or DTYPES[dtype] not in KINDS[KIND_NAMES[kind]]:
        raise _bad_header(f"{label} has kind {kind} and dtype {dtype}, which do not match")
    if dimensions > MAX_DIMENSIONS:
        raise _bad_header(f"{label} has {dimensions} dimensions, but the limit is {MAX_DIMENSIONS}")
    shape = struct.unpack(f"<{dimensions}I", cursor.take(4 * dimensions, label))
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    if _span(shape, item_bytes) > MAX_RAW_BYTES:
        raise _bad_header(f"{label} has a shape whose product exceeds the limit of {MAX_RAW_BYTES} bytes")
    offset = filled.get(section, 0)
    filled[section] = offset + math.prod(shape) * item_bytes
    if filled[section] > capacity[section]:
        raise _bad_header(f"{label} exceeds the {capacity[section]} bytes of section '{section}'")
    name = cursor.take(cursor.unpack(NAME_BYTES, label)[0], label)
    if not name:
        raise _bad_header(f"{label} has no name")
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_header(f"the name of {label} is not UTF-8") from error
    return _Tensor(text, section, KIND_NAMES[kind], DTYPES[dtype], shape, offset)
