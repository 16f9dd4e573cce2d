"""`pgolf pack --table`: where an artifact's bytes are, what entropy allows, what each codec makes of them."""

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
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.entropy_bounds import Bound, plane_bound, static_bounds

REFERENCE = "torch.save + lzma 9"


@dataclass(frozen=True)
class TensorBytes:
    """One array of the artifact.

    stored_bytes: its part of the section. No codec here says what one array costs, as arrays share models and
    dictionaries: each is coded alone by the section's codec, and these sizes are scaled to the section's.
    """

    name: str
    section: str
    shape: tuple[int, ...]
    raw_bytes: int
    stored_bytes: float

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.stored_bytes / max(self.values, 1)


@dataclass(frozen=True)
class Measured:
    """What a codec makes of a section, and how long it takes both ways with all threads it uses."""

    codec: str
    section: str
    bytes: int
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class ArtifactTable:
    """All that `text` shows; `bounds` are by section and then by name, see `static_bounds`."""

    path: Path
    header_bytes: int
    total_bytes: int
    sections: tuple[SectionSize, ...]
    tensors: tuple[TensorBytes, ...]
    bounds: dict[str, dict[str, Bound]]
    codecs: tuple[Measured, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """The tables, one below another."""
        parts = [self._sections(), self._tensors(), self._bounds()]
        return "\n\n".join([*parts, *([self._codecs()] if self.codecs else [])])

    def _sections(self) -> str:
        values = {s.name: sum(t.values for t in self.tensors if t.section == s.name) for s in self.sections}
        rows = [(s.name, s.codec, values[s.name], s.raw_bytes, s.stored_bytes) for s in self.sections]
        raw_bytes = sum(s.raw_bytes for s in self.sections)
        rows.append(("header", "-", 0, 0, self.header_bytes))
        rows.append(("= artifact", "-", sum(values.values()), raw_bytes, self.total_bytes))
        cells = [
            (
                name,
                codec,
                f"{count:,}",
                f"{raw:,}",
                f"{stored:,}",
                f"{8 * stored / count:.3f}" if count else "0",
                f"{stored / self.total_bytes:.1%}",
            )
            for name, codec, count, raw, stored in rows
        ]
        header = ("section", "codec", "values", "raw bytes", "stored bytes", "bits/value", "share")
        return console.table(cells, header)

    def _tensors(self) -> str:
        rows = [
            (
                t.name,
                " x ".join(map(str, t.shape)),
                f"{t.raw_bytes:,}",
                f"{t.stored_bytes:,.0f}",
                f"{t.bits_per_value:.3f}",
            )
            for t in self.tensors
        ]
        note = "stored bytes of a tensor: coded alone, scaled to its section's"
        return (
            console.table(rows, ("tensor", "shape", "raw bytes", "stored bytes", "bits/value")) + f"\n{note}"
        )

    def _bounds(self) -> str:
        stored = {s.name: s.stored_bytes for s in self.sections}
        values = {s.name: sum(t.values for t in self.tensors if t.section == s.name) for s in self.sections}
        rows = [
            (
                section,
                name,
                f"{bound.bytes:,.0f}",
                f"{8 * bound.bytes / values[section]:.4f}",
                f"{bound.side_bytes:,.0f}",
                f"{stored[section] / bound.bytes:.4f}" if bound.bytes >= 1 else "",
            )
            for section, found in self.bounds.items()
            for name, bound in found.items()
        ]
        header = ("section", "entropy bound", "bytes", "bits/value", "+ side bytes, about", "stored / bound")
        return console.table(rows, header)

    def _codecs(self) -> str:
        names = [s.name for s in self.sections]
        rows = []
        for codec in dict.fromkeys(m.codec for m in self.codecs):
            mine = [m for m in self.codecs if m.codec == codec]
            each = {m.section: f"{m.bytes:,}" for m in mine}
            rows.append(
                (
                    codec,
                    *(each.get(name, "") for name in names),
                    f"{sum(m.bytes for m in mine):,}",
                    f"{sum(m.encode_seconds for m in mine):.2f}",
                    f"{sum(m.decode_seconds for m in mine):.2f}",
                )
            )
        return console.table(rows, ("codec", *names, "together", "encode s", "decode s"))


def artifact_table(path: Path | str, tried: Sequence[str] = tuple(codecs.CODECS)) -> ArtifactTable:
    """Everything about the artifact at `path`.

    tried: codecs to measure on every section; those whose packages are not installed are left out. With any,
    the community's layout is measured as well: one byte a weight, torch.save, Python's LZMA of preset 9. At
    full size LZMA, zstd 22 and brotli 11 take a minute each. Raises PgolfError for a damaged artifact.
    """
    found, (_, records) = sizes(path), read_container(path)
    by_section = {s.name: [r for r in records if r.section == s.name] for s in found.sections}
    tensors = [t for s in found.sections for t in _tensor_bytes(s, by_section[s.name])]
    measured = [
        m for codec in tried for s in found.sections if (m := _measure(codec, s.name, by_section[s.name]))
    ]
    if tried:
        measured.append(_measure_reference(records))
    bounds = {name: _section_bounds(of) for name, of in by_section.items()}
    return ArtifactTable(
        Path(path),
        found.header_bytes,
        found.total_bytes,
        found.sections,
        tuple(tensors),
        bounds,
        tuple(measured),
    )


def _shape(record: TensorRecord) -> codecs.Shape:
    columns = record.shape[-1] if record.shape else 1
    return (math.prod(record.shape[:-1]), columns, record.array.itemsize)


def _bytes(record: TensorRecord) -> bytes:
    array = record.array
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _tensor_bytes(section: SectionSize, records: Sequence[TensorRecord]) -> list[TensorBytes]:
    alone = [len(codecs.encode(section.codec, _bytes(r), [_shape(r)])) for r in records]
    share = section.stored_bytes / max(sum(alone), 1)
    return [
        TensorBytes(r.name, section.name, r.shape, r.array.nbytes, share * size)
        for r, size in zip(records, alone, strict=True)
    ]


def _section_bounds(records: Sequence[TensorRecord]) -> dict[str, Bound]:
    """The static bounds where a section holds int8 matrices, else order 0 of low and of high bytes."""
    if all(r.array.dtype == np.int8 for r in records):
        return static_bounds([r.array.reshape(_shape(r)[:2]) for r in records])
    items = {r.array.itemsize for r in records}
    same = [b"".join(_bytes(r) for r in records if r.array.itemsize == size) for size in items]
    return {"order 0 by byte": plane_bound(list(zip(same, items, strict=True)))}


def _measure(codec: str, section: str, records: Sequence[TensorRecord]) -> Measured | None:
    """None where the codec is not installed."""
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
        raise PgolfError(f"{codec} does not return section {section} as it was: the codec is broken here")
    return Measured(codec, section, len(stored), encoded - start, time.perf_counter() - encoded)


def _measure_reference(records: Sequence[TensorRecord]) -> Measured:
    """The community's artifact of the same tensors (PR 1501), all in one stream."""
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
    return Measured(REFERENCE, "all", len(stored), encoded - start, time.perf_counter() - encoded)
