"""Hand-made artifacts, valid or forged, all with correct checksums."""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from pgolf_fast.artifact import container


@dataclass
class Section:
    """A section's entry in the header; None: the value that fits `body`."""

    name: int = 0
    codec: int = 0
    body: bytes = bytes(range(6))
    raw_bytes: int | None = None
    stored_bytes: int | None = None

    def entry(self) -> bytes:
        stored = len(self.body) if self.stored_bytes is None else self.stored_bytes
        raw = stored if self.raw_bytes is None else self.raw_bytes
        return container.SECTION.pack(self.name, self.codec, raw, stored, zlib.crc32(self.body))


@dataclass
class Tensor:
    """A tensor's entry in the header; dimensions, name_bytes None: those of `shape` and `name`."""

    section: int = 0
    kind: int = 0
    dtype: int = 0
    shape: Sequence[int] = (2, 3)
    name: bytes = b"w"
    dimensions: int | None = None
    name_bytes: int | None = None

    def entry(self) -> bytes:
        dimensions = len(self.shape) if self.dimensions is None else self.dimensions
        name_bytes = len(self.name) if self.name_bytes is None else self.name_bytes
        sizes = b"".join(size.to_bytes(4, "little") for size in self.shape)
        head = container.TENSOR.pack(self.section, self.kind, self.dtype, dimensions)
        return head + sizes + container.NAME_BYTES.pack(name_bytes) + self.name


@dataclass
class Artifact:
    """Every field of a file; None: the correct value."""

    config: bytes = b"{}"
    sections: list[Section] = field(default_factory=lambda: [Section()])
    tensors: list[Tensor] = field(default_factory=lambda: [Tensor()])
    config_bytes: int | None = None
    section_count: int | None = None
    tensor_count: int | None = None
    after_header: bytes = b""  # belongs to the header
    after_sections: bytes = b""

    def header(self) -> bytes:
        def number(value: int | None, correct: int) -> int:
            return correct if value is None else value

        return b"".join(
            [
                container.CONFIG_BYTES.pack(number(self.config_bytes, len(self.config))),
                self.config,
                container.SECTION_COUNT.pack(number(self.section_count, len(self.sections))),
                *(section.entry() for section in self.sections),
                container.TENSOR_COUNT.pack(number(self.tensor_count, len(self.tensors))),
                *(tensor.entry() for tensor in self.tensors),
                self.after_header,
            ]
        )

    def file(self, **prefix: int) -> bytes:
        body = b"".join(section.body for section in self.sections) + self.after_sections
        return file_of(self.header(), body, **prefix)


def file_of(
    header: bytes,
    body: bytes,
    *,
    version: int = container.VERSION,
    codec: int = 0,
    stored: int | None = None,
    raw: int | None = None,
    file_bytes: int | None = None,
) -> bytes:
    """Return a file of a stored header and a body; prefix fields that are None are correct."""
    stored = len(header) if stored is None else stored
    raw = len(header) if raw is None else raw
    size = container.START + len(header) + len(body) + container.DIGEST_BYTES
    prefix = container.PREFIX.pack(
        container.MAGIC, version, codec, stored, raw, size if file_bytes is None else file_bytes
    )
    front = prefix + container.CRC.pack(zlib.crc32(prefix + header)) + header + body
    return front + hashlib.sha256(front).digest()


def with_plain_header(data: bytes) -> bytes:
    """Return the same artifact with its header stored raw, so that single fields can be changed."""
    _, _, codec, stored, _, _ = container.PREFIX.unpack_from(data)
    header = data[container.START : container.START + stored]
    body = data[container.START + stored : -container.DIGEST_BYTES]
    return file_of(lzma.decompress(header) if codec else header, body)


def fix_checksums(data: bytes) -> bytes:
    """Return the file with length, checksums and digest corrected, as far as its raw header shows them."""
    file = bytearray(data)
    if len(file) < container.START + container.DIGEST_BYTES:
        return data
    file[24:32] = len(file).to_bytes(8, "little")
    end = container.START + int.from_bytes(file[16:20], "little")
    if end <= len(file) - container.DIGEST_BYTES:
        _fix_section_checksums(file, end)
        checksum = zlib.crc32(file[container.START : end], zlib.crc32(file[: container.PREFIX.size]))
        file[container.PREFIX.size : container.START] = container.CRC.pack(checksum)
    file[-container.DIGEST_BYTES :] = hashlib.sha256(file[: -container.DIGEST_BYTES]).digest()
    return bytes(file)


def _fix_section_checksums(file: bytearray, header_end: int) -> None:
    place = container.START + 4 + int.from_bytes(file[container.START : container.START + 4], "little")
    count, offset = int.from_bytes(file[place : place + 2], "little"), header_end
    for entry in range(
        place + 2, min(place + 2 + count * container.SECTION.size, header_end), container.SECTION.size
    ):
        stored = int.from_bytes(file[entry + 10 : entry + 18], "little")
        if (
            entry + container.SECTION.size > header_end
            or offset + stored > len(file) - container.DIGEST_BYTES
        ):
            return
        file[entry + 18 : entry + 22] = container.CRC.pack(zlib.crc32(file[offset : offset + stored]))
        offset += stored
