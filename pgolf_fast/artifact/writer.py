"""Writing the artifact's container (see `container.py`)."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_fast.artifact import codecs
from pgolf_fast.artifact import container as layout
from pgolf_fast.artifact.container import SECTIONS, ContainerSizes, SectionSize, TensorRecord
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path

Codecs = Sequence[str] | Mapping[str, Sequence[str]]  # for all sections, or by section name


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
    counts = tuple(size for size, _ in sections)
    return ContainerSizes(len(header) + layout.DIGEST_BYTES, counts, digest.hexdigest())


def container_bytes(
    config: dict[str, Any],
    tensors: Sequence[TensorRecord],
    *,
    codecs: Codecs = ("rans", "lzma"),
    preset: int = 9,
) -> int:
    """Return the size of the file that `write_container` would write. Raises PgolfError as it does."""
    header, sections = _encode(config, tensors, codecs, preset)
    return len(header) + sum(len(stored) for _, stored in sections) + layout.DIGEST_BYTES


def _encode(
    config: dict[str, Any], tensors: Sequence[TensorRecord], candidates: Codecs, preset: int
) -> tuple[bytes, list[tuple[SectionSize, bytes]]]:
    """Return prefix and header, then every section, as they are stored; only the digest is missing."""
    _check_limits(tensors)

    def encode_section(name: str) -> tuple[SectionSize, bytes]:
        arrays = [record.array for record in tensors if record.section == name]
        raw = b"".join(np.ascontiguousarray(a, layout.little_endian(a.dtype.name)).tobytes() for a in arrays)
        shapes = [layout.codec_shape(a.shape, a.dtype.name) for a in arrays]
        tried = candidates[name] if isinstance(candidates, Mapping) else candidates
        codec, stored = codecs.smallest(raw, shapes, tried, {"lzma": {"preset": preset}})
        return SectionSize(name, len(raw), len(stored), codec), stored

    used = [name for name in SECTIONS if any(record.section == name for record in tensors)]
    try:
        with ThreadPoolExecutor(len(SECTIONS)) as pool:
            sections = list(pool.map(encode_section, used))
        return _encode_header(_raw_header(_json(config), tensors, sections), sections, preset), sections
    except ValueError as error:
        raise PgolfError(str(error)) from error


def _check_limits(tensors: Sequence[TensorRecord]) -> None:
    if len(tensors) > layout.MAX_TENSORS:
        raise PgolfError(
            f"{len(tensors)} tensors do not fit into an artifact: the limit is {layout.MAX_TENSORS}"
        )
    if (total := sum(record.array.nbytes for record in tensors)) > layout.MAX_RAW_BYTES:
        raise PgolfError(
            f"{total} bytes of tensors do not fit into an artifact: the limit is {layout.MAX_RAW_BYTES} bytes"
        )
    seen: set[str] = set()
    for record in tensors:
        if record.name in seen:
            raise PgolfError(f"two tensors are called {record.name!r}: names in an artifact must be unique")
        seen.add(record.name)


def _encode_header(raw: bytes, sections: Sequence[tuple[SectionSize, bytes]], preset: int) -> bytes:
    """Return prefix, checksum and header as they are stored."""
    if len(raw) > layout.MAX_HEADER_BYTES:
        raise PgolfError(
            f"the artifact's header would be {len(raw)} bytes: the limit is {layout.MAX_HEADER_BYTES} bytes"
        )
    codec, stored = codecs.smallest(raw, [(1, len(raw), 1)], ("lzma",), {"lzma": {"preset": preset}})
    file_bytes = layout.START + len(stored) + sum(len(body) for _, body in sections) + layout.DIGEST_BYTES
    prefix = layout.PREFIX.pack(
        layout.MAGIC, layout.VERSION, codecs.CODECS[codec], len(stored), len(raw), file_bytes
    )
    return prefix + layout.CRC.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored


def _raw_header(
    config: bytes, tensors: Sequence[TensorRecord], sections: Sequence[tuple[SectionSize, bytes]]
) -> bytes:
    raw = bytearray(layout.CONFIG_BYTES.pack(len(config)) + config)
    raw += layout.SECTION_COUNT.pack(len(sections))
    for size, stored in sections:
        numbers = SECTIONS.index(size.name), codecs.CODECS[size.codec]
        raw += layout.SECTION.pack(*numbers, size.raw_bytes, size.stored_bytes, zlib.crc32(stored))
    raw += layout.TENSOR_COUNT.pack(len(tensors))
    for record in tensors:
        assert record.section is not None  # set by TensorRecord
        kind, dtype = layout.KIND_NAMES.index(record.kind), layout.DTYPES.index(record.dtype)
        shape, name = record.array.shape, record.name.encode("utf-8")
        raw += layout.TENSOR.pack(SECTIONS.index(record.section), kind, dtype, len(shape))
        raw += struct.pack(f"<{len(shape)}I", *shape) + layout.NAME_BYTES.pack(len(name)) + name
    return bytes(raw)


def _json(config: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(config, allow_nan=False, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise PgolfError(f"the configuration cannot be written as JSON: {error}") from error
