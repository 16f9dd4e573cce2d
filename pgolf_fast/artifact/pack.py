"""Quantize a run folder's weights, and write them as an artifact within its byte budget."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgolf_fast.artifact import codecs, container
from pgolf_fast.artifact.container import SECTIONS, ContainerSizes, TensorRecord, write_container
from pgolf_fast.artifact.fit import Pruned, fit_to_target, prune_to_fit
from pgolf_fast.artifact.load import load
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.fields import run_config_to_dict, with_fields
from pgolf_fast.config.run_folder import RunFolder, RunPath
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.console import Table, logger
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.calibration import quantize_model, training_text
from pgolf_fast.quant.rd import rate_distortion
from pgolf_fast.quant.state import CODES, SCALE, QuantizedState, QuantizedTensor, is_part, section_of, unbank

TOLERANCE = 128  # bytes below the limit at which the search for codes to prune stops, besides the margin
HEADER_MARGIN = 64  # bytes by which the header may grow when a section's size and checksum change


def quantize_run(run: RunPath, quant: QuantConfig | None = None, **fields: object) -> Table:
    """Quantize the float weights of a run folder, write the result there, and tabulate the errors by type.

    quant: settings, by default the run's; fields: changes to them, such as bits=5. Grid rd makes
    an artifact of `quant.target_bytes` bytes when it is packed with the run's own settings.
    Raises PgolfError if there are no weights, if these or the result are not finite, or if the target
    cannot be reached.
    """
    folder = RunFolder.of(run)
    config = folder.read_config()
    config = replace(config, quant=with_fields(quant or config.quant, fields))
    model = load(folder, "float", config=config).model
    logger.info("quantizing %s: grid %s, method %s", folder.path, config.quant.grid, config.quant.method)
    if config.quant.grid == "rd":
        quantized = _fit_to_target(model, config)
    else:
        text, length = training_text(config), config.train.seq_len
        quantized = quantize_model(model, config.quant, seq_len=length, text=text)
    quantized.check()
    folder.retire(folder.artifact_file)
    quantized.save(folder.quantized_file, config.quant)
    return _errors(model, quantized)


def _errors(model: GPT, quantized: QuantizedState) -> Table:
    """Tabulate the relative quantization errors of tensors by type: root mean square and largest."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name, exact in unbank(model.state_dict()).items():
        kind, stored = "float16", quantized.tensors[name]
        if isinstance(stored, QuantizedTensor):
            kind, stored = f"int{stored.bits}", stored.dequantized()
        weight = exact.float().cpu()
        error = float((weight - stored).norm() / weight.norm().clamp_min(1e-30))
        kinds.setdefault(kind, []).append((error, name))
    rows = []
    for kind, errors in sorted(kinds.items()):
        mean, (worst, name) = statistics.fmean(e * e for e, _ in errors) ** 0.5, max(errors)
        rows.append((kind, f"{len(errors):,}", f"{mean:.2%}", f"{worst:.2%}", name))
    return Table(("tensors", "number", "relative error", "at most", "of"), rows)


def _fit_to_target(model: GPT, config: RunConfig) -> QuantizedState:
    """Quantize on grid rd at the price at which the artifact has the configured size."""
    target = config.quant.target_bytes
    if target is None:
        target = config.pack.limit_bytes - _code_bytes(config.pack)
    length, text = config.train.seq_len, training_text(config)
    grids = rate_distortion(model, config.quant, seq_len=length, text=text)
    fitted = fit_to_target(grids, lambda state: artifact_bytes(state, config), target)
    logger.info("%d of %d bytes, at %.2e nats a bit", fitted.artifact_bytes, target, fitted.price)
    return fitted.state


def _code_bytes(packing: PackConfig) -> int:
    return code_bytes() if packing.code_bytes is None else packing.code_bytes


@dataclass(frozen=True)
class PackReport:
    """Bytes of an artifact; `pruned` of the `candidates` (codes of +-1) were zeroed to fit the limit."""

    path: Path
    sizes: ContainerSizes
    code_bytes: int
    limit_bytes: int
    pruned: int
    candidates: int

    @property
    def weights_bytes(self) -> int:
        return self.sizes.total_bytes

    @property
    def total_bytes(self) -> int:
        """Weights and code: the number that the limit applies to."""
        return self.weights_bytes + self.code_bytes

    def table(self, title: str = "part") -> Table:
        """Tabulate bytes by part, ending with weights + code = total against the limit."""
        rows = {
            "header": self.sizes.header_bytes,
            **{f"section {s.name}": s.stored_bytes for s in self.sizes.sections},
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


def read_quantized(run: RunPath) -> tuple[QuantizedState, QuantConfig]:
    """Read the quantized weights of a run folder and the settings that made them."""
    folder = RunFolder.of(run)
    return QuantizedState.load(folder.need(folder.quantized_file, "quantize"))


def pack_run(run: RunPath, pack_config: PackConfig | None = None, **fields: object) -> PackReport:
    """Pack the quantized weights of a run folder into its artifact.

    pack_config: settings, by default the run's; fields: changes to them, such as limit_bytes=2_000_000.
    Raises PgolfError when the artifact cannot be made to fit the limit.
    """
    folder = RunFolder.of(run)
    quantized, quant = read_quantized(folder)
    config = folder.read_config()
    packing = with_fields(pack_config or config.pack, fields)
    return pack(quantized, replace(config, quant=quant, pack=packing), folder.artifact_file)


def build_records(quantized: QuantizedState) -> list[TensorRecord]:
    """Return the container's records, named as by `QuantizedState.to_named`.

    Codes of bank matrices and of tables go to different sections, because their statistics differ.
    """
    named, records = quantized.to_named(), []
    for name, tensor in named.items():
        kind: container.Kind = "scales" if is_part(name, named) else "float16"
        section = None
        if name.endswith(CODES):
            kind, section = "codes", section_of(name.removesuffix(CODES))
        records.append(TensorRecord(name, kind, tensor.numpy(), section))
    return records


def artifact_bytes(quantized: QuantizedState, config: RunConfig, packing: PackConfig | None = None) -> int:
    """Return the size of the file that `pack` would write without pruning."""
    packing, records = packing or config.pack, build_records(quantized)
    tree, tried = _tree(quantized, config), section_codecs(records, packing)
    return container.container_bytes(tree, records, codecs=tried, preset=packing.lzma_preset)


def _tree(quantized: QuantizedState, config: RunConfig) -> dict[str, Any]:
    # Artifacts are shared, so they do not record where the data is on this machine
    data = replace(config.data, path=None, tokenizer=None)
    return {"run": run_config_to_dict(replace(config, data=data)), "bits": quantized.bits()}


def pack(
    quantized: QuantizedState, config: RunConfig, path: Path | str, packing: PackConfig | None = None
) -> PackReport:
    """Write an artifact; if it is too large and `packing.prune` is on, zero +-1 codes until it fits.

    config: stored in the artifact. packing: by default `config.pack`. Raises PgolfError, leaving `path` as it
    was, when weights and code exceed `packing.limit_bytes`.
    """
    packing, tree, records = packing or config.pack, _tree(quantized, config), build_records(quantized)
    code, tried = _code_bytes(packing), section_codecs(records, packing)
    pruned = None
    with atomic_path(path) as temporary:
        sizes = write_container(temporary, tree, records, codecs=tried, preset=packing.lzma_preset)
        if sizes.total_bytes + code > packing.limit_bytes:
            if not packing.prune:
                raise _too_large(sizes, code, packing, "pack.prune is off; turn it on")
            pruned = _prune(records, sizes, code, packing)
            left = iter(pruned.codes)
            records = [replace(r, array=next(left)) if r.section == "codes" else r for r in records]
            sizes = write_container(temporary, tree, records, codecs=tried, preset=packing.lzma_preset)
            if sizes.total_bytes + code > packing.limit_bytes:  # HEADER_MARGIN covers the header's growth
                raise _too_large(sizes, code, packing, "pruning missed the limit")
    candidates = sum(int((np.abs(t.codes.numpy()) == 1).sum()) for t in quantized.matrices().values())
    return PackReport(Path(path), sizes, code, packing.limit_bytes, pruned.count if pruned else 0, candidates)


def section_codecs(records: list[TensorRecord], config: PackConfig) -> dict[str, tuple[str, ...]]:
    """Return the codecs to try for each section."""
    size = {name: sum(r.array.nbytes for r in records if r.section == name) for name in SECTIONS}
    quick = tuple(codec for codec in config.codecs if codec != "lzma") or config.codecs
    return {n: config.codecs if size[n] <= config.lzma_limit_bytes else quick for n in SECTIONS}


def _prune(records: list[TensorRecord], sizes: ContainerSizes, code: int, config: PackConfig) -> Pruned:
    """Zero codes until they fit. Raises PgolfError when zeroing all +-1 codes is not enough."""
    scales = {r.name: r.array for r in records if r.kind == "scales"}
    coded = [r for r in records if r.section == "codes"]
    matrices = [(r.array, scales[r.name.removesuffix(CODES) + SCALE]) for r in coded]
    now, codec = next(((s.stored_bytes, s.codec) for s in sizes.sections if s.name == "codes"), (0, "raw"))
    budget = config.limit_bytes - code - (sizes.total_bytes - now) - HEADER_MARGIN
    if not matrices or budget <= 0:
        hint = "even no bank weights at all would not fit; raise pack.limit_bytes or make the tables smaller"
        raise _too_large(sizes, code, config, hint)
    shapes = [(*array.shape, 1) for array, _ in matrices]

    def coded_size(flat: NDArray[np.int8]) -> int:
        return min(len(codecs.encode(codec, flat.tobytes(), shapes, config.lzma_preset)), flat.size)

    pruned = prune_to_fit(matrices, budget, now, coded_size, TOLERANCE)
    if not pruned.fits:
        advice = "make the model smaller, quantize to fewer bits, or train with more weight decay"
        hint = f"zeroing all {pruned.candidates:,} codes of +-1 is not enough; {advice}"
        raise _too_large(sizes, code, config, hint)
    return pruned


def _too_large(sizes: ContainerSizes, code: int, config: PackConfig, hint: str) -> PgolfError:
    weights, total, limit = sizes.total_bytes, sizes.total_bytes + code, config.limit_bytes
    over = f"{total:,} bytes > {limit:,} bytes ({total - limit:,} over)"
    return PgolfError(f"weights {weights:,} + code {code:,} = {over}: {hint}")
