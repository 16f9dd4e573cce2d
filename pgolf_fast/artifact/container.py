"""The artifact's container: a configuration and named arrays in compressed sections.

The file holds no pickle, and the reader trusts nothing in it: lengths are checked against the file's size and
fixed limits before memory is allocated, every section has a checksum, the file has a digest, and every byte
must be accounted for. docs/artifact.md describes every byte.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.artifact import codecs
from pgolf_fast.config.checks import need
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path

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
Codecs = Sequence[str] | Mapping[str, Sequence[str]]  # to try, for all sections or by section name

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
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a UTF-16 pair, which UTF-8 cannot hold


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """One named array.

    `kind` fixes the allowed dtypes (`KINDS`): codes are int8, one byte per weight; scales are float16.
    `section` is one of `SECTIONS`; by default that of the kind's name, else "small".
    Raises PgolfError when kind, section and array disagree.
    """

    name: str
    kind: Kind
    array: NDArray[Any]
    section: str | None = None

    def __post_init__(self) -> None:
        name, kind, array = self.name, self.kind, self.array
        cannot = f"tensor {name!r} cannot go into an artifact: "
        valid = isinstance(name, str) and not _SURROGATE.search(name) and 0 < len(name.encode()) < 1 << 16
        need(valid, f"{cannot}its name must be 1 to 65535 bytes of UTF-8")
        need(kind in KINDS, f"{cannot}its kind is {kind!r}, but must be one of {', '.join(KINDS)}")
        dtypes, dtype = KINDS[kind], array.dtype.name
        need(dtype in dtypes, f"{cannot}{kind} are stored as {' or '.join(dtypes)}, not as {dtype}")
        problem = f"it has {array.ndim} dimensions, but at most {MAX_DIMENSIONS} are allowed"
        need(array.ndim <= MAX_DIMENSIONS, cannot + problem)
        problem = f"the product of its shape {array.shape} exceeds the limit of {MAX_RAW_BYTES} bytes"
        need(_span(array.shape, array.itemsize) <= MAX_RAW_BYTES, cannot + problem)
        problem = f"its section is {self.section!r}, but must be one of {', '.join(SECTIONS)}"
        need(self.section is None or self.section in SECTIONS, cannot + problem)
        if self.section is None:
            object.__setattr__(self, "section", self.kind if self.kind in ("codes", "scales") else "small")


@dataclass(frozen=True)
class SectionSize:
    """A section's uncompressed and stored bytes, its codec, and the place and CRC-32 of its stored bytes."""

    name: str
    raw_bytes: int
    stored_bytes: int
    codec: str
    crc32: int = field(repr=False)
    offset: int = field(default=0, compare=False, repr=False)  # in the file


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


def _span(shape: Sequence[int], item_bytes: int) -> int:
    """Return the bytes of the nonzero sizes: an empty tensor may not hide an absurd partial product."""
    return math.prod(filter(None, shape)) * item_bytes


def _codec_shape(shape: Sequence[int], dtype: str) -> codecs.Shape:
    """Return the matrix that a codec sees of a tensor: every dimension but the last counts as rows."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1, np.dtype(dtype).itemsize


def write_container(
    path: Path | str,
    config: dict[str, Any],
    tensors: Sequence[TensorRecord],
    *,
    codecs: Codecs = ("rans", "lzma"),
    preset: int = 9,
) -> ContainerSizes:
    """Write a container atomically; the same input gives the same bytes (for one version of liblzma).

    config: JSON values only. Sections are compressed in parallel, each by the one of `codecs` (for all
    sections, or by section name) that makes it smallest, or stored raw if none does. `preset`, 0 (fast) to
    9 (small), is LZMA's.
    Raises PgolfError for a duplicate name, a config that is not JSON, or more than 1 GiB of tensors.
    """
    header, sections = _encode(config, tensors, codecs, preset)
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for part in (header, *(stored for _, stored in sections)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
    return ContainerSizes(len(header) + DIGEST_BYTES, tuple(s for s, _ in sections), digest.hexdigest())


def container_bytes(
    config: dict[str, Any], tensors: Sequence[TensorRecord], *, codecs: Codecs, preset: int
) -> int:
    """Return the size of the file that `write_container` would write. Raises PgolfError as it does."""
    header, sections = _encode(config, tensors, codecs, preset)
    return len(header) + sum(len(stored) for _, stored in sections) + DIGEST_BYTES


def _encode(
    config: dict[str, Any], tensors: Sequence[TensorRecord], candidates: Codecs, preset: int
) -> tuple[bytes, list[tuple[SectionSize, bytes]]]:
    """Return prefix and header, then every section, as they are stored; only the digest is missing."""
    total, names = sum(record.array.nbytes for record in tensors), Counter(record.name for record in tensors)
    _need_room(len(tensors), MAX_TENSORS, "tensors")
    _need_room(total, MAX_RAW_BYTES, "bytes of tensors")
    if repeated := [name for name, count in names.items() if count > 1]:
        raise PgolfError(f"two tensors are called {repeated[0]!r}: names in an artifact must be unique")

    def encode_section(name: str) -> tuple[SectionSize, bytes]:
        arrays = [record.array for record in tensors if record.section == name]
        raw = b"".join(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes() for a in arrays)
        shapes = [_codec_shape(a.shape, a.dtype.name) for a in arrays]
        tried = candidates[name] if isinstance(candidates, Mapping) else candidates
        codec, stored = codecs.smallest(raw, shapes, tried, preset)
        return SectionSize(name, len(raw), len(stored), codec, zlib.crc32(stored)), stored

    used = [name for name in SECTIONS if any(record.section == name for record in tensors)]
    try:
        with ThreadPoolExecutor(len(SECTIONS)) as pool:
            sections = list(pool.map(encode_section, used))
        raw = _raw_header(_json(config), tensors, [size for size, _ in sections])
        _need_room(len(raw), MAX_HEADER_BYTES, "bytes of header")
        codec, stored = codecs.smallest(raw, [(1, len(raw), 1)], ("lzma",), preset)
    except ValueError as error:
        raise PgolfError(str(error)) from error
    file_bytes = START + len(stored) + sum(len(body) for _, body in sections) + DIGEST_BYTES
    prefix = PREFIX.pack(MAGIC, VERSION, codecs.CODECS[codec], len(stored), len(raw), file_bytes)
    return prefix + CRC.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored, sections


def _need_room(number: int, limit: int, what: str) -> None:
    need(number <= limit, f"{number} {what} do not fit into an artifact: the limit is {limit} {what}")


def _raw_header(config: bytes, tensors: Sequence[TensorRecord], sections: Sequence[SectionSize]) -> bytes:
    raw = bytearray(CONFIG_BYTES.pack(len(config)) + config + SECTION_COUNT.pack(len(sections)))
    for section in sections:
        numbers = SECTIONS.index(section.name), codecs.CODECS[section.codec]
        raw += SECTION.pack(*numbers, section.raw_bytes, section.stored_bytes, section.crc32)
    raw += TENSOR_COUNT.pack(len(tensors))
    for record in tensors:
        assert record.section is not None  # set by TensorRecord
        kind, dtype = KIND_NAMES.index(record.kind), DTYPES.index(record.array.dtype.name)
        shape, name = record.array.shape, record.name.encode("utf-8")
        raw += TENSOR.pack(SECTIONS.index(record.section), kind, dtype, len(shape))
        raw += struct.pack(f"<{len(shape)}I", *shape) + NAME_BYTES.pack(len(name)) + name
    return bytes(raw)


def _json(config: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(config, allow_nan=False, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise PgolfError(f"the configuration cannot be written as JSON: {error}") from error


def read_container(source: Path | str | bytes) -> tuple[dict[str, Any], list[TensorRecord]]:
    """Return the configuration and the tensors in the order written; arrays are writable copies.

    Nothing is decompressed before every checksum matches; sections are then decoded in parallel threads.
    Raises PgolfError that names the file, the section and the byte.
    """
    with _opened(source) as (file, size):
        data = file.read()
        config, sections, tensors = _read_header(data, size)
        stored = {s.name: data[s.offset : s.offset + s.stored_bytes] for s in sections}
        for section in sections:
            _check_crc(section.name, section.offset, zlib.crc32(stored[section.name]), section.crc32)
        digest = hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest()
        problem = "it is not the SHA-256 of the bytes before it"
        _need(digest == data[-DIGEST_BYTES:], problem, "digest", size - DIGEST_BYTES)

        def decode(section: SectionSize) -> bytes:
            shapes = [_codec_shape(t.shape, t.dtype) for t in tensors if t.section == section.name]
            return _decode(section, stored[section.name], shapes)

        with ThreadPoolExecutor(len(SECTIONS)) as pool:
            raw = dict(zip(stored, pool.map(decode, sections), strict=True))
        tree = _parse_config(config)
    return tree, [_record(tensor, raw[tensor.section]) for tensor in tensors]


def sizes(source: Path | str | bytes) -> ContainerSizes:
    """Return byte counts from a container's checked header, not reading sections. Raises PgolfError."""
    with _opened(source) as (file, size):
        head = file.read(START)
        if len(head) == START:
            head += file.read(min(PREFIX.unpack_from(head)[3], MAX_HEADER_BYTES))
        sections = tuple(_read_header(head, size)[1])
        file.seek(size - DIGEST_BYTES)
        digest = file.read()
    return ContainerSizes(size - sum(s.stored_bytes for s in sections), sections, digest.hex())


class _Tensor(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the start of its decoded section."""

    name: str
    section: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    offset: int


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


def _damaged(problem: str, section: str = "header", offset: int = START) -> ValueError:
    why = f"is damaged in section '{section}' at byte {offset}: {problem}; copy it again, or pack it again"
    return ValueError(why)


def _need(holds: bool, problem: str, section: str = "header", offset: int = START) -> None:
    if not holds:
        raise _damaged(problem, section, offset)


def _check_crc(section: str, offset: int, got: int, want: int) -> None:
    _need(got == want, f"its checksum is {got:08x}, but {want:08x} was written", section, offset)


def _decode(section: SectionSize, stored: bytes, shapes: Sequence[codecs.Shape]) -> bytes:
    try:
        return codecs.decode(section.codec, stored, section.raw_bytes, shapes)
    except ValueError as error:
        raise _damaged(str(error), section.name, section.offset) from error


def _record(tensor: _Tensor, raw: bytes) -> TensorRecord:
    little = np.dtype(tensor.dtype).newbyteorder("<")
    stored = np.frombuffer(raw, little, math.prod(tensor.shape), tensor.offset)
    array = stored.reshape(tensor.shape).astype(tensor.dtype)  # in this machine's byte order
    return TensorRecord(tensor.name, tensor.kind, array, tensor.section)


def _parse_config(text: bytes) -> dict[str, Any]:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        tree = json.loads(text.decode("utf-8"), parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its configuration is not JSON ({error})") from error
    _need(isinstance(tree, dict), "its configuration is not a JSON object")
    return tree


def _read_header(head: bytes, size: int) -> tuple[bytes, list[SectionSize], list[_Tensor]]:
    """Return the configuration, still as JSON, the sections and the tensors of a file of `size` bytes.

    `head` reaches at least to the end of the header, or of the file if that is shorter. Raises ValueError
    for a header that contradicts itself or the file's size.
    """
    if head[:8] != MAGIC:
        why = "is not an artifact: it does not start with the bytes 89 'PGOLF'; `pgolf pack` writes artifacts"
        raise ValueError(why)
    _need(size >= START + DIGEST_BYTES, f"the file ends after {size} bytes", offset=8)
    _, version, codec, stored_bytes, raw_bytes, file_bytes = PREFIX.unpack_from(head)
    if version != VERSION:
        hint = "read it with the release of pgolf-fast that wrote it"
        raise ValueError(f"has version {version}, but this program reads version {VERSION}: {hint}")
    _need(file_bytes == size, f"the file has {size} bytes, but {file_bytes} were written", offset=24)
    end, left = START + stored_bytes, size - DIGEST_BYTES - START
    problem = f"it claims {stored_bytes} bytes, but {left} are left"
    _need(stored_bytes <= min(left, MAX_HEADER_BYTES), problem, offset=16)
    stored, (crc32,) = head[START:end], CRC.unpack_from(head, PREFIX.size)
    _check_crc("header", 0, zlib.crc32(stored, zlib.crc32(head[: PREFIX.size])), crc32)
    _need(codec <= 1, f"its codec is {codec}, but must be 0 or 1", offset=12)
    problem = f"it claims {raw_bytes} bytes uncompressed, but the limit is {MAX_HEADER_BYTES}"
    _need(raw_bytes <= MAX_HEADER_BYTES, problem, offset=20)
    section = SectionSize("header", raw_bytes, stored_bytes, CODEC_NAMES[codec], crc32, START)
    cursor = _Cursor(_decode(section, stored, [(1, raw_bytes, 1)]))
    config = cursor.take(cursor.unpack(CONFIG_BYTES, "the configuration")[0], "the configuration")
    sections = _parse_sections(cursor, end, size - DIGEST_BYTES)
    tensors = _parse_tensors(cursor, sections)
    unread = len(cursor.read())
    _need(not unread, f"{unread} bytes follow its last tensor")
    return config, sections, tensors


class _Cursor(io.BytesIO):
    def take(self, count: int, what: str) -> bytes:
        data = self.read(count)
        _need(len(data) == count, f"it ends within {what}")
        return data

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size, what))


def _parse_sections(cursor: _Cursor, offset: int, end: int) -> list[SectionSize]:
    """Parse sections that must fill bytes `offset` to `end` of the file."""
    sections: list[SectionSize] = []
    last, raw_left = -1, MAX_RAW_BYTES
    for index in range(cursor.unpack(SECTION_COUNT, "the number of sections")[0]):
        number, codec, raw, stored, crc32 = cursor.unpack(SECTION, f"section {index}")
        _need(number < len(SECTIONS), f"section {index} has the unknown name {number}")
        label = f"section '{SECTIONS[number]}'"
        _need(number > last, f"{label} is repeated or out of order")
        _need(codec < len(CODEC_NAMES), f"{label} has the unknown codec {codec}")
        problem = f"its sections claim more than the limit of {MAX_RAW_BYTES} bytes uncompressed"
        _need(raw <= raw_left, problem)
        _need(stored <= end - offset, f"{label} claims {stored} bytes, but {end - offset} are left")
        possible = stored <= raw and (stored == raw) == (CODEC_NAMES[codec] == "raw")
        _need(possible, f"{label} stores {raw} bytes in {stored}, which its codec cannot")
        sections.append(SectionSize(SECTIONS[number], raw, stored, CODEC_NAMES[codec], crc32, offset))
        last, raw_left, offset = number, raw_left - raw, offset + stored
    _need(offset == end, f"{end - offset} bytes of the file belong to no section")
    return sections


def _parse_tensors(cursor: _Cursor, sections: list[SectionSize]) -> list[_Tensor]:
    (count,) = cursor.unpack(TENSOR_COUNT, "the number of tensors")
    _need(count <= MAX_TENSORS, f"it claims {count} tensors, but the limit is {MAX_TENSORS}")
    tensors: list[_Tensor] = []
    numbers: dict[str, int] = {}  # by name
    capacity = {section.name: section.raw_bytes for section in sections}
    filled: dict[str, int] = {}
    for number in range(count):
        tensor = _parse_tensor(cursor, f"tensor {number}", capacity, filled)
        first = numbers.setdefault(tensor.name, number)
        _need(first == number, f"tensor {number} has the name of tensor {first}")
        tensors.append(tensor)
    for name, raw in capacity.items():
        _need(filled.get(name) == raw, f"tensors do not fill the {raw} bytes of section '{name}'")
    return tensors


def _parse_tensor(cursor: _Cursor, label: str, capacity: dict[str, int], filled: dict[str, int]) -> _Tensor:
    """Parse the next tensor and add its bytes to those `filled` in its section, at most its `capacity`."""
    number, kind, dtype, dimensions = cursor.unpack(TENSOR, label)
    section = SECTIONS[number] if number < len(SECTIONS) else ""
    _need(section in capacity, f"{label} is in section {number}, which does not exist")
    match = kind < len(KINDS) and dtype < len(DTYPES) and DTYPES[dtype] in KINDS[KIND_NAMES[kind]]
    _need(match, f"{label} has kind {kind} and dtype {dtype}, which do not match")
    problem = f"{label} has {dimensions} dimensions, but the limit is {MAX_DIMENSIONS}"
    _need(dimensions <= MAX_DIMENSIONS, problem)
    shape = struct.unpack(f"<{dimensions}I", cursor.take(4 * dimensions, label))
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    problem = f"{label} has a shape whose product exceeds the limit of {MAX_RAW_BYTES} bytes"
    _need(_span(shape, item_bytes) <= MAX_RAW_BYTES, problem)
    offset = filled.get(section, 0)
    filled[section] = offset + math.prod(shape) * item_bytes
    problem = f"{label} exceeds the {capacity[section]} bytes of section '{section}'"
    _need(filled[section] <= capacity[section], problem)
    name = cursor.take(cursor.unpack(NAME_BYTES, label)[0], label)
    _need(bool(name), f"{label} has no name")
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(f"the name of {label} is not UTF-8") from error
    return _Tensor(text, section, KIND_NAMES[kind], DTYPES[dtype], shape, offset)
