"""Bytes of an artifact by section and tensor, sizes under each codec, and lower bounds by entropy.

Every bound is the plug-in entropy of the codes under their own histograms, so no static coder with these
classes does better. `Bound.bytes` excludes what else a decoder needs, the histograms and classes;
`Bound.side_bytes` estimates that. A histogram per row would mostly be side information: 512 codes of 63
values have a plug-in entropy about 0.05 bits too low. Rows and columns are therefore classified by their
scale only, in steps of 1/8 octave, and all elements of a class share a histogram.

order 0       one histogram per matrix
row           classified by the root mean square of the row; classes are shared by all matrices
row x column  classified by the level of the row plus that of the column, where the levels maximize the
              likelihood of Gaussian codes of variance row * column; classes are shared by all matrices
"""

import dataclasses
import io
import lzma
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pgolf_fast import console
from pgolf_fast.artifact import codecs
from pgolf_fast.artifact.container import SectionSize, TensorRecord, read_container, sizes
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError

REFERENCE = "torch.save + lzma 9"
Codes = NDArray[np.int8]
Levels = NDArray[np.int32]
STEPS_PER_OCTAVE = 8
_CLASSES = 512  # sums of a row level and a column level, each within +-_CLASSES / 4
_SWEEPS = 5  # alternations over rows and columns; the fourth changes no level by 1e-4
_SMALLEST = 1e-4  # variance of a row of zeros


@dataclass(frozen=True)
class Bound:
    """Bytes of the codes alone, and an estimate of the side information."""

    bytes: float
    # Entropy of the row and column classes, plus log2(n) / 2 bits per free parameter of a histogram of n
    # codes (J. Rissanen, "Modeling by shortest data description", 1978)
    side_bytes: float


@dataclass(frozen=True)
class TensorBytes:
    """One array of the artifact."""

    name: str
    section: str
    shape: tuple[int, ...]
    raw_bytes: int
    # An estimate, since the arrays of a section share models and dictionaries: each array is encoded alone,
    # and these sizes are scaled to add up to the section's
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

    def _values(self, section: str) -> int:
        return sum(tensor.values for tensor in self.tensors if tensor.section == section)

    def section_table(self) -> Table:
        header = ("section", "codec", "values", "raw bytes", "stored bytes", "bits/value", "share")
        sizes = [(s.name, s.codec, self._values(s.name), s.raw_bytes, s.stored_bytes) for s in self.sections]
        values, raw_bytes = sum(t.values for t in self.tensors), sum(s.raw_bytes for s in self.sections)
        sizes.append(("header", "-", 0, 0, self.header_bytes))
        sizes.append(("= artifact", "-", values, raw_bytes, self.total_bytes))
        rows = []
        for name, codec, count, raw, stored in sizes:
            bits = number(8 * stored / count if count else None, ".3f")
            share = f"{stored / self.total_bytes:.1%}"
            rows.append((name, codec, f"{count:,}", f"{raw:,}", f"{stored:,}", bits, share))
        return Table(header, rows)

    def tensor_table(self) -> Table:
        rows = []
        for t in self.tensors:
            shape, bits = " x ".join(map(str, t.shape)), 8 * t.stored_bytes / max(t.values, 1)
            rows.append((t.name, shape, f"{t.raw_bytes:,}", f"{t.stored_bytes:,.0f}", f"{bits:.3f}"))
        return Table(("tensor", "shape", "raw bytes", "stored bytes", "bits/value"), rows)

    def bound_table(self) -> Table:
        rows = []
        for s in self.sections:
            for name, b in self.bounds[s.name].items():
                bits = f"{8 * b.bytes / self._values(s.name):.4f}"
                excess = number(s.stored_bytes / b.bytes if b.bytes >= 1 else None, ".4f")
                rows.append((s.name, name, f"{b.bytes:,.0f}", bits, f"{b.side_bytes:,.0f}", excess))
        header = ("section", "entropy bound", "bytes", "bits/value", "+ side bytes, about", "stored / bound")
        return Table(header, rows)

    def codec_table(self) -> Table:
        names = [s.name for s in self.sections]
        rows = []
        for codec in dict.fromkeys(result.codec for result in self.codecs):
            own = {result.section: result for result in self.codecs if result.codec == codec}
            sizes = [f"{own[name].bytes:,}" if name in own else "" for name in names]
            numbers = ((r.bytes, r.encode_seconds, r.decode_seconds) for r in own.values())
            total, encode, decode = map(sum, zip(*numbers, strict=True))
            rows.append((codec, *sizes, f"{total:,}", f"{encode:.2f}", f"{decode:.2f}"))
        return Table(("codec", *names, "total", "encode s", "decode s"), rows)


def artifact_table(path: Path | str, tried: Sequence[str] = tuple(codecs.CODECS)) -> ArtifactTable:
    """Measure the artifact at `path`: bytes by section and tensor, entropy bounds and codecs.

    tried: codecs to measure on every section; those that are not installed are skipped. With any, the
    community's layout is measured too: one byte per weight, torch.save, Python's LZMA at preset 9. At full
    size LZMA, zstd 22 and brotli 11 take a minute each. Raises PgolfError for a damaged artifact.
    """
    size, (_, records) = sizes(path), read_container(path)
    by_section = {s.name: [r for r in records if r.section == s.name] for s in size.sections}
    results = [_measure(codec, name, own) for codec in tried for name, own in by_section.items()]
    results += [_measure_reference(records)] if tried else []
    tensors = tuple(t for s in size.sections for t in _tensor_bytes(s, by_section[s.name]))
    bounds = {name: _section_bounds(own) for name, own in by_section.items()}
    done = tuple(result for result in results if result is not None)
    totals = size.header_bytes, size.total_bytes
    return ArtifactTable(Path(path), *totals, size.sections, tensors, bounds, done)


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
    start, file = time.perf_counter(), io.BytesIO()
    weights = {r.name: torch.from_numpy(r.array) for r in records}
    torch.save({"w": weights, "m": {r.name: kinds.get(r.kind, "passthrough") for r in records}}, file)
    stored = lzma.compress(file.getvalue(), preset=9)
    encoded = time.perf_counter()
    torch.load(io.BytesIO(lzma.decompress(stored)), weights_only=True)
    return CodecResult(REFERENCE, "all", len(stored), encoded - start, time.perf_counter() - encoded)


def static_bounds(matrices: Sequence[Codes]) -> dict[str, Bound]:
    """Return the bounds of the module docstring for int8 matrices (R, C)."""
    order0 = np.stack([_counts(codes, np.zeros((1, 1), np.int32), 1)[0] for codes in matrices])
    return {
        "order 0": _bound(order0, []),
        "row": _classed(matrices, lambda codes: [_level(np.square(codes, dtype=np.float32).mean(1))]),
        "row x column": _classed(matrices, _row_and_column_levels),
    }


def plane_bound(parts: Sequence[tuple[bytes, int]]) -> Bound:
    """Return the order-0 bound of (little-endian items, item size), with one histogram per byte plane."""
    counts = []
    for data, itemsize in parts:
        planes = np.frombuffer(data, np.uint8).reshape(-1, itemsize)
        counts += [np.bincount(planes[:, plane], minlength=256) for plane in range(itemsize)]
    return _bound(np.stack(counts), [])


def _classed(matrices: Sequence[Codes], levels_of: Callable[[Codes], list[Levels]]) -> Bound:
    """Bound matrices whose classes come from `levels_of`: row levels, and column levels if any."""
    table, every = np.zeros((_CLASSES, 256), np.int64), []
    for codes in matrices:
        rows, *columns = levels_of(codes)
        classes = rows[:, None] + sum(columns) + _CLASSES // 2
        table += _counts(codes, classes, _CLASSES)
        every += [rows, *columns]
    return _bound(table, every)


def _row_and_column_levels(codes: Codes) -> list[Levels]:
    squares = np.square(codes, dtype=np.float32)
    columns = np.ones(codes.shape[1], np.float32)
    for _ in range(_SWEEPS):  # maximizes the likelihood of one side given the other
        rows = np.maximum(squares @ (1 / columns) / codes.shape[1], _SMALLEST)
        columns = np.maximum((1 / rows) @ squares / codes.shape[0], _SMALLEST)
        columns /= np.exp(np.log(columns).mean())  # the common factor belongs to the rows
    return [_level(rows), _level(columns)]


def _level(variance: NDArray[np.float32]) -> Levels:
    octaves = 0.5 * np.log2(np.maximum(variance, _SMALLEST))
    limit = _CLASSES // 4 - 1
    return np.clip(np.rint(STEPS_PER_OCTAVE * octaves), -limit, limit).astype(np.int32)


def _counts(codes: Codes, classes: Levels, size: int) -> NDArray[np.int64]:
    """Count each byte value per class, (size, 256); classes broadcast to the shape of codes."""
    cells = classes * 256 + codes.view(np.uint8)
    return np.bincount(cells.ravel(), minlength=size * 256).reshape(size, 256)


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    """Return the bits of all counted symbols, each row of counts being its own histogram."""
    seen = counts > 0
    share = np.divide(counts, counts.sum(-1, keepdims=True), out=np.ones(counts.shape), where=seen)
    return -float((counts * np.log2(share)).sum())


def _bound(table: NDArray[np.int64], all_levels: Sequence[Levels]) -> Bound:
    totals, numbers = table.sum(1), (table > 0).sum(1)
    side = 0.5 * float((np.maximum(numbers - 1, 0) * np.log2(np.maximum(totals, 1))).sum())
    if all_levels:
        levels = np.concatenate(all_levels)
        side += _entropy_bits(np.bincount(levels - levels.min())[None])
    return Bound(_entropy_bits(table) / 8, side / 8)
