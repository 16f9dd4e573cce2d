"""Quantise and pack a run folder, and make models of its weights: each step reads files and leaves files."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.landing import fit_to_target
from pgolf_fast.artifact.pack import PackReport, artifact_bytes, load_model, pack
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.fields import from_dict, run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer, byte_table
from pgolf_fast.distributed import World, this_process
from pgolf_fast.io import load_tensors, save_tensors
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.model.weights import load_weights, read_weights
from pgolf_fast.quant.rd import rate_distortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, quantize_model

_PARTS = ("codes", "scale", "column_scale", "left", "right")  # of a quantised tensor, in the run's file


def float_model(folder: RunFolder, config: RunConfig, world: World | None = None) -> GPT:
    """The run's averaged weights before quantisation."""
    model = new_model(byte_table(Tokenizer.load(folder.tokenizer_file)), config, world or this_process())
    path = folder.need(folder.model_file, "train PRESET --resume --out")
    load_weights(model, read_weights(path), str(path))
    return model


def new_model(table: ByteTable, config: RunConfig, world: World) -> GPT:
    choose_kernels(config.kernels, world.device)
    dtype = resolve_dtype(config.train.compute_dtype, world.device)
    leading = torch.from_numpy(table.has_leading_space)
    return GPT(config.model, leading, compute_dtype=dtype).to(world.device)


def artifact_model(folder: RunFolder, config: RunConfig, world: World | None = None) -> GPT:
    """The model of the run's artifact."""
    table = byte_table(Tokenizer.load(folder.tokenizer_file))
    device = (world or this_process()).device
    choose_kernels(config.kernels, device)
    path = folder.need(folder.artifact_file, "pack")
    leading = torch.from_numpy(table.has_leading_space)
    model, _ = load_model(path, leading, resolve_dtype(config.train.compute_dtype, device))
    return model.to(device)


def quantize_run(folder: RunFolder, quant: QuantConfig) -> dict[str, int]:
    """Write the run's quantised weights; returns how many tensors became what.

    Grid rd lands the artifact, as the run's own pack settings make it, at `quant.target_bytes`. Raises
    PgolfError when that cannot be reached.
    """
    config = replace(folder.read_config(), quant=quant)
    model = float_model(folder, config)
    if quant.grid == "rd":
        quantized = _land(model, config)
    else:
        quantized = quantize_model(model, quant, seq_len=config.train.seq_len)
    tensors: dict[str, Tensor] = {}
    bits: dict[str, int] = {}
    for name, value in quantized.tensors.items():
        if isinstance(value, QuantizedTensor):
            parts = (value.codes, value.scale, value.column_scale, *(value.low_rank or (None, None)))
            tensors |= {f"{name}.{p}": t for p, t in zip(_PARTS, parts, strict=True) if t is not None}
            bits[name] = value.bits
        else:
            tensors[name] = value
    folder.retire(folder.artifact_file)
    story = {"bits": bits, "order": list(quantized.tensors), "quant": dataclasses.asdict(quant)}
    save_tensors(folder.quantized_file, tensors, story)
    counts = {f"int{b} tensors": sum(v == b for v in bits.values()) for b in sorted(set(bits.values()))}
    return {**counts, "float16 tensors": len(quantized.tensors) - len(bits)}


def _land(model: GPT, config: RunConfig) -> QuantizedState:
    """The model on grid rd, at the price at which its artifact has the bytes that are asked for."""
    quant, packing = config.quant, config.pack
    target = quant.target_bytes
    if target is None:
        code = code_bytes() if packing.code_bytes is None else packing.code_bytes
        target = packing.limit_bytes - code
    tree = run_config_to_dict(config)
    grids = rate_distortion(model, quant, seq_len=config.train.seq_len)
    landed = fit_to_target(grids, lambda state: artifact_bytes(state, tree, packing), target)
    console.logger.info(
        "%s of %s bytes, at %.2e nats a bit", f"{landed.artifact_bytes:,}", f"{target:,}", landed.price
    )
    return landed.state


def read_quantized(folder: RunFolder) -> tuple[QuantizedState, QuantConfig]:
    """What `quantize_run` wrote, and under which settings."""
    tensors, story = load_tensors(folder.need(folder.quantized_file, "quantize"))
    state: dict[str, QuantizedTensor | Tensor] = {}
    for name in story["order"]:
        if name in story["bits"]:
            codes, scale, columns, left, right = (tensors.get(f"{name}.{part}") for part in _PARTS)
            assert codes is not None and scale is not None  # noqa: PT018
            low_rank = None if left is None or right is None else (left, right)
            state[name] = QuantizedTensor(codes, scale, story["bits"][name], columns, low_rank)
        else:
            state[name] = tensors[name]
    return QuantizedState(state), from_dict(QuantConfig, story["quant"], "quant")


def pack_run(folder: RunFolder, config: PackConfig) -> PackReport:
    """Write the run's artifact. Raises PgolfError when it cannot be made to fit the limit."""
    quantized, quant = read_quantized(folder)
    run_config = replace(folder.read_config(), quant=quant, pack=config)
    return pack(quantized, run_config_to_dict(run_config), folder.artifact_file, config)
