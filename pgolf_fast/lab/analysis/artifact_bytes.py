"""Bytes of an artifact by section and tensor, entropy bounds, and sizes under each codec."""

from __future__ import annotations

import dataclasses
import io
import lzma
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_fast import console
from pgolf_fast.artifact import codecs
from pgolf_fast.artifact.container import SectionSize, TensorRecord, read_container, sizes
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.entropy_bounds import Bound, plane_bound, static_bounds

REFERENCE = "torch.save + lzma 9"


@dataclass(frozen=True)
class TensorBytes:
    """One array of the artifact.

    stored_bytes: an estimate, since the arrays of a section share models and dictionaries: each array is
    encoded alone, and these sizes are scaled to add up to the section's.
    """

    name: str
    section: str
    shape: tuple[int, ...]
    raw_bytes: int
    stored_bytes: float

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CodecResult:
    """Size of a section under a codec, and wall time to encode and decode it with all threads it uses."""

    codec: str
    section: str
    bytes: int
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class ArtifactTable:
    """Contents of `pgolf pack --table`; `bounds` are by section and name, see `static_bounds`."""

    path: Path
    header_bytes: int
    total_bytes: int
    sections: tuple[SectionSize, ...]
    tensors: tuple[TensorBytes, ...]
    bounds: dict[str, dict[str, Bound]]
    codecs: tuple[CodecResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """Render all tables, separated by empty lines."""
        tensors = f"{self.tensor_table()}\nstored bytes of a tensor: encoded alone, scaled to its section"
        parts = [self.section_table(), tensors, self.bound_table()]
        return "\n\n".join(map(str, [*parts, *([self.codec_table()] if self.codecs else [])]))

    def _values(self) -> dict[str, int]:
        """Count the values of each section."""
        return {s.name: sum(t.values for t in self.tensors if t.section == s.name) for s in self.sections}

    def section_table(self) -> Table:
        values = self._values()
        rows = [(s.name, s.codec, values[s.name], s.raw_bytes, s.stored_bytes) for s in self.sections]
        raw_bytes = sum(s.raw_bytes for s in self.sections)
        rows.append(("header", "-", 0, 0, self.header_bytes))
        rows.append(("= artifact", "-", sum(values.values()), raw_bytes, self.total_bytes))
        cells = [
            (
                *(name, codec, f"{count:,}", f"{raw:,}", f"{stored:,}"),
                f"{8 * stored / count:.3f}" if count else "-",
                f"{stored / self.total_bytes:.1%}",
            )
            for name, codec, count, raw, stored in rows
        ]
        header = ("section", "codec", "values", "raw bytes", "stored bytes", "bits/value", "share")
        return Table(header, cells)

    def tensor_table(self) -> Table:
        rows = [
            (
                *(t.name, " x ".join(map(str, t.shape)), f"{t.raw_bytes:,}", f"{t.stored_bytes:,.0f}"),
                f"{8 * t.stored_bytes / max(t.values, 1):.3f}",
            )
            for t in self.tensors
        ]
        return Table(("tensor", "shape", "raw bytes", "stored bytes", "bits/value"), rows)

    def bound_table(self) -> Table:
        stored, values = {s.name: s.stored_bytes for s in self.sections}, self._values()
        rows = [
            (
                *(section, name, f"{bound.bytes:,.0f}", f"{8 * bound.bytes / values[section]:.4f}"),
                f"{bound.side_bytes:,.0f}",
                f"{stored[section] / bound.bytes:.4f}" if bound.bytes >= 1 else "-",
            )
            for section, bounds in self.bounds.items()
            for name, bound in bounds.items()
        ]
        header = ("section", "entropy bound", "bytes", "bits/value", "+ side bytes, about", "stored / bound")
        return Table(header, rows)

    def codec_table(self) -> Table:
        names = [s.name for s in self.sections]
        rows = []
        for codec in dict.fromkeys(result.codec for result in self.codecs):
            own = [result for result in self.codecs if result.codec == codec]
            sizes = {result.section: f"{result.bytes:,}" for result in own}
            seconds = (sum(r.encode_seconds for r in own), sum(r.decode_seconds for r in own))
            cells = (*(sizes.get(name, "") for name in names), f"{sum(r.bytes for r in own):,}")
            rows.append((codec, *cells, *(f"{s:.2f}" for s in seconds)))
        return Table(("codec", *names, "total", "encode s", "decode s"), rows)


def artifact_table(path: Path | str, tried: Sequence[str] = tuple(codecs.CODECS)) -> ArtifactTable:
    """Measure the artifact at `path`: bytes by section and tensor, entropy bounds and codecs.

    tried: codecs to measure on every section; those that are not installed are skipped. With any, the
    community's layout is measured too: one byte per weight, torch.save, Python's LZMA at preset 9. At full
    size LZMA, zstd 22 and brotli 11 take a minute each. Raises PgolfError for a damaged artifact.
    """
    size, (_, records) = sizes(path), read_container(path)
    by_section = {s.name: [r for r in records if r.section == s.name] for s in size.sections}
    results = [
        result
        for codec in tried
        for name, own in by_section.items()
        if (result := _measure(codec, name, own)) is not None
    ]
    return ArtifactTable(
        path=Path(path),
        header_bytes=size.header_bytes,
        total_bytes=size.total_bytes,
        sections=size.sections,
        tensors=tuple(t for s in size.sections for t in _tensor_bytes(s, by_section[s.name])),
        bounds={name: _section_bounds(own) for name, own in by_section.items()},
        codecs=(*results, *([_measure_reference(records)] if tried else [])),
    )


def _shape(record: TensorRecord) -> codecs.Shape:
    shape = record.array.shape
    return (math.prod(shape[:-1]), shape[-1] if shape else 1, record.array.itemsize)


def _bytes(record: TensorRecord) -> bytes:
    array = record.array
    # Stored arrays are little-endian on every machine
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _tensor_bytes(section: SectionSize, records: Sequence[TensorRecord]) -> list[TensorBytes]:
    alone = [len(codecs.encode(section.codec, _bytes(r), [_shape(r)])) for r in records]
    share = section.stored_bytes / max(sum(alone), 1)
    return [
        TensorBytes(r.name, section.name, r.array.shape, r.array.nbytes, share * size)
        for r, size in zip(records, alone, strict=True)
    ]


def _section_bounds(records: Sequence[TensorRecord]) -> dict[str, Bound]:
    """Return the static bounds of int8 matrices, or the order-0 bound by byte of anything else."""
    if all(r.array.dtype == np.int8 for r in records):
        return static_bounds([r.array.reshape(_shape(r)[:2]) for r in records])
    widths = {r.array.itemsize for r in records}
    parts = [(b"".join(_bytes(r) for r in records if r.array.itemsize == width), width) for width in widths]
    return {"order 0 by byte": plane_bound(parts)}


def _measure(codec: str, section: str, records: Sequence[TensorRecord]) -> CodecResult | None:
    """Encode and decode a section; return None if the codec is not installed."""
    data, shapes = b"".join(map(_bytes, records)), [_shape(r) for r in records]
    console.logger.info("measuring %s on section %s, %d bytes", codec, section, len(data))
    start = time.perf_counter()
    try:
        stored = codecs.encode(codec, data, shapes)
    except PgolfError as error:
        console.logger.info("%s", error)
        return None
    encoded = time.perf_counter()
    if codecs.decode(codec, stored, len(data), shapes) != data:
        raise PgolfError(f"{codec} does not reproduce section {section}: the codec is broken on this machine")
    return CodecResult(codec, section, len(stored), encoded - start, time.perf_counter() - encoded)


def _measure_reference(records: Sequence[TensorRecord]) -> CodecResult:
    """Measure the community's artifact of the same tensors (PR 1501), a single stream."""
    console.logger.info("measuring %s", REFERENCE)
    kinds = {"codes": {"type": "int6"}, "scales": "scale"}
    start = time.perf_counter()
    file = io.BytesIO()
    torch.save(
        {
            "w": {r.name: torch.from_numpy(r.array) for r in records},
            "m": {r.name: kinds.get(r.kind, "passthrough") for r in records},
        },
        file,
    )
    stored = lzma.compress(file.getvalue(), preset=9)
    encoded = time.perf_counter()
    torch.load(io.BytesIO(lzma.decompress(stored)), weights_only=True)
    return CodecResult(REFERENCE, "all", len(stored), encoded - start, time.perf_counter() - encoded)
