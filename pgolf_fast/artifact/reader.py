"""The artifact's format in plain Python: its numbers, and a reader that believes nothing.

`csrc/container.cpp` is the same reader in C++: same result, same checks in the same order, same messages.
Both take the whole file as bytes and return numbers as they stand in the file; `container.py` names them.
Every refusal is a ValueError that says what the file is or, for a damaged one, the section and the byte.
docs/artifact.md describes every byte.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from pgolf_fast.artifact import codecs

MAGIC = b"\x89PGOLF\r\n"
OLD_MAGIC = b"PGOLFART"
VERSION = 1
SECTIONS = ("codes", "scales", "embeddings", "small")  # by number, which is also their order in the file
Kind = Literal["codes", "scales", "float16", "float32", "integer"]
KINDS: tuple[Kind, ...] = ("codes", "scales", "float16", "float32", "integer")
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "float32")
ITEM_BYTES = (1, 1, 2, 2, 4, 4, 8, 2, 4)
KIND_DTYPES = ((0,), (7,), (7,), (8,), (0, 1, 2, 3, 4, 6))  # which dtypes a kind may have
CODEC_NAMES = tuple(codecs.CODECS)

MAX_RAW_BYTES = 1 << 30  # of all sections together, when unpacked
MAX_HEADER_BYTES = 16 << 20  # stored and unpacked
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8

PREFIX = struct.Struct(
    "<8sIIIIQ"
)  # magic, version, header codec, its stored bytes, its raw bytes, file bytes
CRC = struct.Struct("<I")  # of the prefix and the stored header
START = PREFIX.size + CRC.size  # where the header lies
DIGEST_BYTES = 32  # SHA-256 of everything before, the end of the file
CONFIG_BYTES = struct.Struct("<I")
SECTION_COUNT = struct.Struct("<H")
SECTION = struct.Struct("<BBQQI")  # name, codec, raw bytes, stored bytes, CRC-32 of the stored bytes
TENSOR_COUNT = struct.Struct("<I")
TENSOR = struct.Struct("<BBBB")  # section, kind, dtype, dimensions; then the sizes, then the name
NAME_BYTES = struct.Struct("<H")
MAX_FILE_BYTES = START + MAX_HEADER_BYTES + MAX_RAW_BYTES + DIGEST_BYTES


class SectionEntry(NamedTuple):
    """A section as the header describes it; `offset` is the byte of the file at which it starts."""

    name: int
    codec: int
    raw_bytes: int
    stored_bytes: int
    crc32: int
    offset: int


class TensorEntry(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the start of its unpacked section."""

    name: str
    section: int
    kind: int
    dtype: int
    shape: tuple[int, ...]
    offset: int


class Header(NamedTuple):
    """A header that was checked in itself and against the file's size; `config` is not parsed yet."""

    config: bytes
    sections: list[SectionEntry]
    tensors: list[TensorEntry]


def damaged(section: str, offset: int, problem: str) -> ValueError:
    """What every check raises."""
    return ValueError(
        f"is damaged in section '{section}' at byte {offset}: {problem}; "
        "copy it again from where it came, or pack it again"
    )


def codec_shape(shape: Sequence[int], item_bytes: int) -> codecs.Shape:
    """The matrix that a codec sees of a tensor: all dimensions but the last are rows."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1, item_bytes


def read_container(data: bytes) -> tuple[bytes, list[SectionEntry], list[TensorEntry], list[bytes]]:
    """The configuration's bytes, the sections, the tensors and each section unpacked.

    Nothing is unpacked before every checksum was found right. Raises ValueError.
    """
    config, sections, tensors = read_header(data, len(data))
    view = memoryview(data)
    for entry in sections:
        checksum = zlib.crc32(view[entry.offset : entry.offset + entry.stored_bytes])
        _check_crc(SECTIONS[entry.name], entry.offset, checksum, entry.crc32)
    if hashlib.sha256(view[:-DIGEST_BYTES]).digest() != view[-DIGEST_BYTES:]:
        raise damaged("digest", len(data) - DIGEST_BYTES, "it is not the SHA-256 of the bytes before it")
    with ThreadPoolExecutor(len(SECTIONS)) as pool:
        unpacked = pool.map(lambda entry: unpack_section(data, entry, tensors), sections)
        return config, sections, tensors, list(unpacked)


def unpack_section(data: bytes, entry: SectionEntry, tensors: Sequence[TensorEntry]) -> bytes:
    """The `entry.raw_bytes` bytes of a section of the file `data`. Raises ValueError."""
    stored = data[entry.offset : entry.offset + entry.stored_bytes]
    shapes = [codec_shape(t.shape, ITEM_BYTES[t.dtype]) for t in tensors if t.section == entry.name]
    return _unpacked(SECTIONS[entry.name], entry.offset, entry.codec, stored, entry.raw_bytes, shapes)


def read_header(head: bytes, size: int) -> Header:
    """The checked header of a file of `size` bytes whose first bytes are `head`.

    head reaches at least to the end of the header, or of a file that is shorter. Raises ValueError.
    """
    if head[:8] == OLD_MAGIC:
        raise ValueError("was written before the format was fixed: pack it again (`pgolf pack RUN`)")
    if head[:8] != MAGIC:
        raise ValueError(
            "is none: it does not start with the bytes 89 'PGOLF'; `pgolf pack` writes artifacts"
        )
    if size < START + DIGEST_BYTES:
        raise damaged("header", 8, f"the file ends after {size} bytes")
    _, version, codec, stored_bytes, raw_bytes, file_bytes = PREFIX.unpack_from(head)
    if version != VERSION:
        raise ValueError(
            f"has version {version}, but this program reads version {VERSION}: "
            "read it with the release of pgolf-fast that wrote it"
        )
    if file_bytes != size:
        raise damaged("header", 24, f"the file has {size} bytes, but {file_bytes} were written")
    end = START + stored_bytes
    if end > size - DIGEST_BYTES or stored_bytes > MAX_HEADER_BYTES:
        left = size - DIGEST_BYTES - START
        raise damaged("header", 16, f"it claims {stored_bytes} bytes, but {left} are left")
    stored = head[START:end]
    checksum = zlib.crc32(stored, zlib.crc32(head[: PREFIX.size]))
    _check_crc("header", 0, checksum, CRC.unpack_from(head, PREFIX.size)[0])
    if codec > 1:
        raise damaged("header", 12, f"its codec is {codec}, but 0 or 1 is needed")
    if raw_bytes > MAX_HEADER_BYTES:
        raise damaged(
            "header", 20, f"it claims {raw_bytes} bytes unpacked, but {MAX_HEADER_BYTES} are the limit"
        )
    raw = _unpacked("header", START, codec, stored, raw_bytes, [(1, raw_bytes, 1)])
    return _parse(_Cursor(raw), end, size - DIGEST_BYTES)


def _check_crc(section: str, offset: int, got: int, want: int) -> None:
    if got != want:
        raise damaged(section, offset, f"its checksum is {got:08x}, but {want:08x} was written")


def _unpacked(
    section: str,
    offset: int,
    codec: int,
    stored: bytes,
    raw_bytes: int,
    shapes: Sequence[codecs.Shape],
) -> bytes:
    try:
        return codecs.decode(CODEC_NAMES[codec], stored, raw_bytes, shapes)
    except ValueError as error:
        raise damaged(section, offset, str(error)) from error


def _broken(problem: str) -> ValueError:
    return damaged("header", START, problem)


class _Cursor:
    """Takes the fields of the unpacked header, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int, what: str) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise _broken(f"it ends within {what}")
        return self.data[start : self.position]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size, what))


def _parse(cursor: _Cursor, start: int, end: int) -> Header:
    """The header whose sections must fill bytes `start` to `end` of the file."""
    config = cursor.take(cursor.unpack(CONFIG_BYTES, "the configuration")[0], "the configuration")
    sections = _parse_sections(cursor, start, end)
    tensors = _parse_tensors(cursor, sections)
    if left := len(cursor.data) - cursor.position:
        raise _broken(f"{left} bytes follow its last tensor")
    return Header(config, sections, tensors)


def _parse_sections(cursor: _Cursor, offset: int, end: int) -> list[SectionEntry]:
    sections: list[SectionEntry] = []
    raw_left = MAX_RAW_BYTES
    for number in range(cursor.unpack(SECTION_COUNT, "the number of sections")[0]):
        entry = SectionEntry._make((*cursor.unpack(SECTION, f"section {number}"), offset))
        if entry.name >= len(SECTIONS):
            raise _broken(f"section {number} has the unknown name {entry.name}")
        if sections and entry.name <= sections[-1].name:
            raise _broken(f"section '{SECTIONS[entry.name]}' is there twice or out of order")
        label = f"section '{SECTIONS[entry.name]}'"
        if entry.codec >= len(CODEC_NAMES):
            raise _broken(f"{label} has the unknown codec {entry.codec}")
        if entry.raw_bytes > raw_left:
            raise _broken(f"its sections claim more than the limit of {MAX_RAW_BYTES} bytes unpacked")
        if entry.stored_bytes > end - offset:
            raise _broken(f"{label} claims {entry.stored_bytes} bytes, but {end - offset} are left")
        plain = entry.codec == codecs.CODECS["raw"]
        if entry.stored_bytes > entry.raw_bytes or (entry.stored_bytes == entry.raw_bytes) != plain:
            raise _broken(
                f"{label} stores {entry.raw_bytes} bytes in {entry.stored_bytes}, which its codec cannot"
            )
        sections.append(entry)
        raw_left -= entry.raw_bytes
        offset += entry.stored_bytes
    if offset != end:
        raise _broken(f"{end - offset} bytes of the file belong to no section")
    return sections


def _parse_tensors(cursor: _Cursor, sections: list[SectionEntry]) -> list[TensorEntry]:
    (count,) = cursor.unpack(TENSOR_COUNT, "the number of tensors")
    if count > MAX_TENSORS:
        raise _broken(f"it claims {count} tensors, but {MAX_TENSORS} are the limit")
    tensors: list[TensorEntry] = []
    numbers: dict[str, int] = {}  # of the tensors, by name
    raw_bytes = {entry.name: entry.raw_bytes for entry in sections}
    filled: dict[int, int] = {}  # bytes of each section that belong to a tensor already
    for number in range(count):
        label = f"tensor {number}"
        section, kind, dtype, dimensions = cursor.unpack(TENSOR, label)
        if section not in raw_bytes:
            raise _broken(f"{label} lies in section {section}, which is not there")
        if kind >= len(KINDS) or dtype not in KIND_DTYPES[kind]:
            raise _broken(f"{label} has kind {kind} and dtype {dtype}, which do not go together")
        if dimensions > MAX_DIMENSIONS:
            raise _broken(f"{label} has {dimensions} dimensions, but {MAX_DIMENSIONS} are the limit")
        shape = struct.unpack(f"<{dimensions}I", cursor.take(4 * dimensions, label))
        # Zeros are left out at first, so that no part of the product is beyond the limit either.
        if math.prod(filter(None, shape)) * ITEM_BYTES[dtype] > MAX_RAW_BYTES:
            raise _broken(f"{label} has sizes whose product is beyond the limit of {MAX_RAW_BYTES} bytes")
        offset = filled.get(section, 0)
        filled[section] = offset + math.prod(shape) * ITEM_BYTES[dtype]
        if filled[section] > raw_bytes[section]:
            raise _broken(
                f"{label} goes beyond the {raw_bytes[section]} bytes of section '{SECTIONS[section]}'"
            )
        name = _name(cursor, label)
        if (first := numbers.setdefault(name, number)) != number:
            raise _broken(f"{label} has the name of tensor {first}")
        tensors.append(TensorEntry(name, section, kind, dtype, shape, offset))
    for entry in sections:
        if filled.get(entry.name) != entry.raw_bytes:
            raise _broken(
                f"tensors do not fill the {entry.raw_bytes} bytes of section '{SECTIONS[entry.name]}'"
            )
    return tensors


def _name(cursor: _Cursor, label: str) -> str:
    name = cursor.take(cursor.unpack(NAME_BYTES, label)[0], label)
    if not name:
        raise _broken(f"{label} has no name")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(f"the name of {label} is no UTF-8") from error
