"""Quantize and pack a run folder: each step reads files of the run and writes one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pgolf_fast import console
from pgolf_fast.artifact.landing import fit_to_target
from pgolf_fast.artifact.load import load
from pgolf_fast.artifact.pack import PackReport, artifact_bytes, pack
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.fields import run_config_to_dict, with_fields
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.rd import rate_distortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, quantize_model


@dataclass(frozen=True)
class QuantizeReport:
    """File of the quantized weights, and the number of tensors by type."""

    path: Path
    counts: dict[str, int]

    def rows(self) -> list[tuple[str, str]]:
        return [(kind, f"{count:,}") for kind, count in self.counts.items()]

    def __str__(self) -> str:
        return console.Table(("tensors", "number"), self.rows()).text()


def quantize_run(
    run: str | Path | RunFolder, quant: QuantConfig | None = None, **fields: object
) -> QuantizeReport:
    """Quantize the float weights of a run folder and write them there.

    quant: settings, by default the run's; fields: changes to them, such as bits=5. Grid rd makes the
    artifact, packed with the run's own settings, `quant.target_bytes` long.
    Raises PgolfError when the run has no weights or the target cannot be reached.
    """
    folder = RunFolder.of(run)
    config = folder.read_config()
    config = replace(config, quant=with_fields(quant or config.quant, fields))
    model = load(folder, "float", config=config).model
    if config.quant.grid == "rd":
        quantized = _fit_to_target(model, config)
    else:
        quantized = quantize_model(model, config.quant, seq_len=config.train.seq_len)
    folder.retire(folder.artifact_file)
    quantized.save(folder.quantized_file, config.quant)
    bits = [t.bits for t in quantized.tensors.values() if isinstance(t, QuantizedTensor)]
    counts = {f"int{width}": bits.count(width) for width in sorted(set(bits))}
    return QuantizeReport(folder.quantized_file, {**counts, "float16": len(quantized.tensors) - len(bits)})


def _fit_to_target(model: GPT, config: RunConfig) -> QuantizedState:
    """Quantize on grid rd at the price at which the artifact has the configured size."""
    quant, packing = config.quant, config.pack
    target = quant.target_bytes
    if target is None:
        code = code_bytes() if packing.code_bytes is None else packing.code_bytes
        target = packing.limit_bytes - code
    tree = run_config_to_dict(config)
    grids = rate_distortion(model, quant, seq_len=config.train.seq_len)
    fitted = fit_to_target(grids, lambda state: artifact_bytes(state, tree, packing), target)
    console.logger.info(
        "%s of %s bytes, at %.2e nats a bit", f"{fitted.artifact_bytes:,}", f"{target:,}", fitted.price
    )
    return fitted.state


def read_quantized(run: str | Path | RunFolder) -> tuple[QuantizedState, QuantConfig]:
    """Read the quantized weights of a run folder and the settings that made them."""
    folder = RunFolder.of(run)
    return QuantizedState.load(folder.need(folder.quantized_file, "quantize"))


def pack_run(
    run: str | Path | RunFolder, pack_config: PackConfig | None = None, **fields: object
) -> PackReport:
    """Pack the quantized weights of a run folder into its artifact.

    pack_config: settings, by default the run's; fields: changes to them, such as limit_bytes=2_000_000.
    Raises PgolfError when the artifact cannot be made to fit the limit.
    """
    folder = RunFolder.of(run)
    quantized, quant = read_quantized(folder)
    config = folder.read_config()
    packing = with_fields(pack_config or config.pack, fields)
    run_config = replace(config, quant=quant, pack=packing)
    return pack(quantized, run_config_to_dict(run_config), folder.artifact_file, packing)
