"""Write a quantized model as an artifact within its byte budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.artifact import codecs
from pgolf_fast.artifact.container import (
    SECTIONS,
    ContainerSizes,
    Kind,
    SectionSize,
    TensorRecord,
)
from pgolf_fast.artifact.prune import Pruned, prune_to_fit
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.artifact.writer import container_bytes, write_container
from pgolf_fast.config.schema import PackConfig
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path
from pgolf_fast.quant.state import CODES, SCALE, QuantizedState, is_part, section_of

TOLERANCE = 128  # bytes below the limit at which the search for codes to prune stops, besides the margin
HEADER_MARGIN = 64  # bytes by which the header may grow when a section's size and checksum change


@dataclass(frozen=True)
class PackReport:
    """Bytes of an artifact.

    `pruned` of the `candidates` (codes of +-1) were zeroed to fit the limit.
    """

    path: Path
    header_bytes: int
    sections: tuple[SectionSize, ...]
    weights_bytes: int
    code_bytes: int
    limit_bytes: int
    pruned: int
    candidates: int
    compressions: int

    @property
    def total_bytes(self) -> int:
        """Weights and code: the number that the limit applies to."""
        return self.weights_bytes + self.code_bytes

    def table(self, title: str = "part") -> Table:
        """Tabulate bytes by part, ending with weights + code = total against the limit."""
        rows = {
            "header": self.header_bytes,
            **{f"section {s.name}": s.stored_bytes for s in self.sections},
            "weights": self.weights_bytes,
            "+ code": self.code_bytes,
            "= total": self.total_bytes,
            "limit": self.limit_bytes,
            "left": self.limit_bytes - self.total_bytes,
            **({f"codes zeroed of {self.candidates:,}": self.pruned} if self.pruned else {}),
        }
        return Table((title, "bytes"), [(part, f"{size:,}") for part, size in rows.items()])

    def __str__(self) -> str:
        return self.table().text()


def build_records(quantized: QuantizedState) -> list[TensorRecord]:
    """Return the container's records, named as by `QuantizedState.to_named`.

    Codes of bank matrices and of tables go to different sections, because their statistics differ.
    """
    named = quantized.to_named()
    records = []
    for name, tensor in named.items():
        if name.endswith(CODES):
            section = section_of(name.removesuffix(CODES))
            records.append(TensorRecord.of(name, "codes", tensor.numpy(), section))
        else:
            kind: Kind = "scales" if is_part(name, named) else "float16"
            records.append(TensorRecord.of(name, kind, tensor.numpy()))
    return records


def artifact_bytes(quantized: QuantizedState, run_config: dict[str, Any], config: PackConfig) -> int:
    """Return the size of the file that `pack` would write without pruning."""
    tree, records = {"run": run_config, "bits": quantized.bits()}, build_records(quantized)
    return container_bytes(tree, records, codecs=section_codecs(records, config), preset=config.lzma_preset)


def pack(
    quantized: QuantizedState, run_config: dict[str, Any], path: Path | str, config: PackConfig
) -> PackReport:
    """Write an artifact; if it is too large and `config.prune` is on, zero +-1 codes until it fits.

    run_config: from `run_config_to_dict`. Raises PgolfError, leaving `path` as it was, when weights and code
    exceed `config.limit_bytes`.
    """
    code = code_bytes() if config.code_bytes is None else config.code_bytes
    tree, records = {"run": run_config, "bits": quantized.bits()}, build_records(quantized)
    tried = section_codecs(records, config)
    pruned, compressions = None, 1
    with atomic_path(path) as temporary:
        sizes = write_container(temporary, tree, records, codecs=tried, preset=config.lzma_preset)
        if sizes.total_bytes + code > config.limit_bytes:
            if not config.prune:
                raise _too_large(sizes.total_bytes, code, config.limit_bytes, "pack.prune is off; turn it on")
            pruned = _prune(records, sizes, code, config)
            records = _with_codes(records, pruned.codes)
            sizes = write_container(temporary, tree, records, codecs=tried, preset=config.lzma_preset)
            compressions += pruned.compressions + 1
            if sizes.total_bytes + code > config.limit_bytes:  # HEADER_MARGIN covers the header's growth
                raise _too_large(sizes.total_bytes, code, config.limit_bytes, "pruning missed the limit")
    return PackReport(
        path=Path(path),
        header_bytes=sizes.header_bytes,
        sections=sizes.sections,
        weights_bytes=sizes.total_bytes,
        code_bytes=code,
        limit_bytes=config.limit_bytes,
        pruned=pruned.count if pruned else 0,
        candidates=sum(int((np.abs(t.codes.numpy()) == 1).sum()) for t in quantized.matrices().values()),
        compressions=compressions,
    )


def section_codecs(records: list[TensorRecord], config: PackConfig) -> dict[str, tuple[str, ...]]:
    """Return the codecs to try for each section."""
    size = {name: sum(r.array.nbytes for r in records if r.section == name) for name in SECTIONS}
    quick = tuple(codec for codec in config.codecs if codec != "lzma") or config.codecs
    return {n: config.codecs if size[n] <= config.lzma_limit_bytes else quick for n in SECTIONS}


def _prune(records: list[TensorRecord], sizes: ContainerSizes, code: int, config: PackConfig) -> Pruned:
    """Zero codes until they fit. Raises PgolfError when zeroing all +-1 codes is not enough."""
    matrices, scales = _matrix_arrays(records)
    now, codec = next(((s.stored_bytes, s.codec) for s in sizes.sections if s.name == "codes"), (0, "raw"))
    rest = sizes.total_bytes - now
    budget = config.limit_bytes - code - rest - HEADER_MARGIN
    if not matrices or budget <= 0:
        hint = "even no bank weights at all would not fit; raise pack.limit_bytes or make the tables smaller"
        raise _too_large(sizes.total_bytes, code, config.limit_bytes, hint)

    shapes = [(*array.shape, 1) for array in matrices]

    def coded_size(flat: NDArray[np.int8]) -> int:
        settings = {"preset": config.lzma_preset} if codec == "lzma" else {}
        return min(len(codecs.encode(codec, flat.tobytes(), shapes, **settings)), flat.size)

    pruned = prune_to_fit(list(zip(matrices, scales, strict=True)), budget, now, coded_size, TOLERANCE)
    if not pruned.fits:
        hint = (
            f"zeroing all {pruned.candidates:,} codes of +-1 is not enough; "
            "make the model smaller, quantize to fewer bits, or train with more weight decay"
        )
        raise _too_large(sizes.total_bytes, code, config.limit_bytes, hint)
    return pruned


def _too_large(weights: int, code: int, limit: int, hint: str) -> PgolfError:
    total = weights + code
    return PgolfError(
        f"weights {weights:,} + code {code:,} = {total:,} bytes > {limit:,} bytes "
        f"({total - limit:,} over): {hint}"
    )


def _matrix_arrays(records: list[TensorRecord]) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Return codes and scales of the bank matrices, in file order."""
    scales = {r.name: r.array for r in records if r.kind == "scales"}
    in_codes = [r for r in records if r.section == "codes"]
    return [r.array for r in in_codes], [scales[r.name.removesuffix(CODES) + SCALE] for r in in_codes]


def _with_codes(records: list[TensorRecord], codes: list[NDArray[np.int8]]) -> list[TensorRecord]:
    left = iter(codes)
    return [replace(r, array=next(left)) if r.section == "codes" else r for r in records]
