"""Quantise, pack, score and continue a run folder: each step reads files and leaves files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pgolf_fast import report
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.landing import land
from pgolf_fast.artifact.pack import PackReport, artifact_bytes, load_model, pack, unpack
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig, TTTConfig
from pgolf_fast.config.serialize import from_dict, run_config_to_dict
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer, byte_table
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.estimate import Estimate, estimate
from pgolf_fast.evaluation.figures import figures, token_classes
from pgolf_fast.evaluation.resume import Resume, identity
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import ThreeScores, three_scores
from pgolf_fast.evaluation.sweep import Comparison, sweep
from pgolf_fast.evaluation.ttt import need_legal
from pgolf_fast.files import atomic_path, write_text
from pgolf_fast.model.decoding import generate
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.rd import rate_distortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, bank_grids, quantize_model
from pgolf_fast.tensor_file import load_tensors, save_tensors
from pgolf_fast.train.checkpoint import load_weights, read_weights
from pgolf_fast.train.run_folder import RunFolder
from pgolf_fast.train.world import World, choose_kernels, environment, keep_freed_memory, resolve_dtype


def this_process() -> World:
    """This process alone, on the GPU if there is one."""
    if torch.cuda.is_available():
        return World(0, 1, torch.device("cuda"))
    keep_freed_memory()
    return World(0, 1, torch.device("cpu"))


def float_model(folder: RunFolder, config: RunConfig, world: World | None = None) -> GPT:
    """The run's averaged weights before quantisation."""
    model = _new_model(byte_table(Tokenizer.load(folder.tokenizer_file)), config, world or this_process())
    path = folder.need(folder.model_file, "train PRESET --resume --out")
    load_weights(model, read_weights(path), str(path))
    return model


def _new_model(table: ByteTable, config: RunConfig, world: World) -> GPT:
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


def import_weights(weights: Path, config: RunConfig, folder: RunFolder) -> None:
    """Make a run folder of published weights, strictly: what `quantize`, `pack` and `eval` go on from.

    `weights` is a state dict (.pt, read without pickled code) or safetensors of a model of `config`; the data
    named by `config` lends its tokenizer. Raises PgolfError where names or shapes differ, or the folder is
    taken.
    """
    if folder.config_file.is_file():
        raise PgolfError(f"{folder.path} already holds a run: choose another --out")
    source = open_source(config.data, config.model.vocab_size)
    model = GPT(config.model)
    load_weights(model, read_weights(weights), str(weights))
    folder.write_config(config)
    write_text(folder.path / "env.json", json.dumps(environment(), indent=2) + "\n")
    with atomic_path(folder.tokenizer_file) as temporary:
        shutil.copyfile(source.tokenizer.path, temporary)
    story = {"imported": str(weights), "config": run_config_to_dict(config)}
    save_tensors(folder.model_file, model.state_dict(), story)


_PARTS = ("codes", "scale", "column_scale", "left", "right")  # of a quantised tensor, in the run's file


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
    landed = land(grids, lambda state: artifact_bytes(state, tree, packing), target)
    report.logger.info(
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


def validation_stream(folder: RunFolder, config: RunConfig, device: torch.device) -> Stream:
    """The validation tokens `config.data` names. Raises PgolfError unless the run's tokenizer made them."""
    source = open_source(config.data, config.model.vocab_size)
    if source.tokenizer.path.read_bytes() != folder.tokenizer_file.read_bytes():
        raise PgolfError(
            f"the shards in {source.folder} belong to tokenizer {source.tokenizer.path}, the run to another "
            f"({folder.tokenizer_file}): use shards made with the run's, or name it with --tokenizer"
        )
    return Stream(source.validation(config.eval_seq_len), source.table, device)


def score_run(
    folder: RunFolder,
    config: RunConfig,
    weights: Literal["artifact", "float"],
    world: World | None = None,
    *,
    allow_illegal: bool = False,
) -> ThreeScores:
    """The three scores of a run on its validation data; they and their `figures` go to scores_<weights>.json.

    Raises PgolfError for test-time training that breaks the rules, unless `allow_illegal`; the file tells.

    Float weights adapt unquantised; the artifact's adapt on its own grid, if the configuration quantises.
    With a `world` of several processes each scores a share. When interrupted, the next call with the same
    weights, data and settings goes on where this one was, and writes the same file.
    """
    world = world or this_process()
    grid = digest = None
    if weights == "artifact":
        model = artifact_model(folder, config, world)
        grid = bank_grids(unpack(folder.artifact_file)[1])
        digest = sizes(folder.artifact_file).sha256
    else:
        model = float_model(folder, config, world)
        config = _unquantised(config)
    stream = validation_stream(folder, config, world.device)
    result = folder.scores_file(weights)
    tree, resume = run_config_to_dict(config), None
    if config.eval.checkpoint_minutes is not None:
        shaping = [*(tree[group] for group in ("eval", "ttt", "quant", "kernels")), digest]
        shaping += [config.eval_seq_len, str(model.compute_dtype)]
        mark = identity(model, stream, shaping)
        resume = Resume(result, mark, 60 * config.eval.checkpoint_minutes, world.is_main)
    scores = three_scores(
        model, stream, config, grid, ranks=world, resume=resume, allow_illegal=allow_illegal
    )
    if world.is_main:
        settings = {"artifact_sha256": digest, "eval": tree["eval"], "ttt": tree["ttt"]}
        classes = token_classes(Tokenizer.load(folder.tokenizer_file))
        parts = {name: figures(scorer, classes).to_dict() for name, scorer in scores.scorers.items()}
        story = {"weights": weights, **settings, **scores.to_dict(), "figures": parts}
        write_text(result, json.dumps(story, indent=2) + "\n")
        if resume is not None:
            resume.forget()
    return scores


def estimate_run(
    folder: RunFolder | None, config: RunConfig, weights: Literal["artifact", "float"]
) -> tuple[list[Estimate], str]:
    """What `score_run` will do, in how long by this process alone, and the weights that was tried with.

    Where the run has no such weights yet, or there is no run, they are those that training starts from.
    """
    world = this_process()
    path = None
    if folder is not None:
        path = folder.artifact_file if weights == "artifact" else folder.model_file
    if folder is None or path is None or not path.is_file():
        source = open_source(config.data, config.model.vocab_size)
        stream = Stream(source.validation(config.eval_seq_len), source.table, world.device)
        return estimate(_new_model(source.table, config, world), stream, config), "new weights"
    stream = validation_stream(folder, config, world.device)
    if weights == "artifact":
        grid = bank_grids(unpack(path)[1])
        return estimate(artifact_model(folder, config, world), stream, config, grid), "the artifact"
    return estimate(float_model(folder, config, world), stream, _unquantised(config)), "the float weights"


def _unquantised(config: RunConfig) -> RunConfig:
    """Float weights adapt as they are: test-time training does not round the banks."""
    if config.ttt.quantize_forward != "banks":
        return config
    return replace(config, ttt=replace(config.ttt, quantize_forward="none"))


def sweep_run(
    folder: RunFolder,
    config: RunConfig,
    adapters: dict[str, TTTConfig],
    world: World | None = None,
    *,
    after: int = 0,
    allow_illegal: bool = False,
) -> list[Comparison]:
    """Adapters compared on the run's artifact and validation data, also written to ttt_sweep.json.

    `after` is as in `evaluation.sweep`. Raises PgolfError for an adapter that breaks the rules, unless
    `allow_illegal`; the file tells. Finished adapters are kept in the folder ttt_sweep, and not repeated.
    """
    for ttt in adapters.values():
        need_legal(ttt, allow_illegal)
    world = world or this_process()
    model = artifact_model(folder, config, world)
    grid = bank_grids(unpack(folder.artifact_file)[1])
    stream = validation_stream(folder, config, world.device)
    beside = folder.path / "ttt_sweep"
    found = sweep(
        model, stream, config, adapters, grid, beside, world, after=after, allow_illegal=allow_illegal
    )
    if world.is_main:
        story = {
            "artifact_sha256": sizes(folder.artifact_file).sha256,
            "tokens": stream.num_targets,
            "after": after,
            "stride": config.eval.stride,
            "adapters": {row.name: dataclasses.asdict(row) for row in found},
            "settings": {name: dataclasses.asdict(ttt) for name, ttt in adapters.items()},
            "illegal": {name: ttt.illegal for name, ttt in adapters.items() if ttt.illegal},
        }
        write_text(folder.sweep_file, json.dumps(story, indent=2) + "\n")
    return found


def continue_text(folder: RunFolder, prompt: str, tokens: int, *, temperature: float, seed: int) -> str:
    """`prompt` and its continuation by the run's artifact, or its float weights if it is not packed yet."""
    config = folder.read_config()
    packed = folder.artifact_file.is_file()
    if not packed:
        report.logger.warning("%s is not packed: using the float weights", folder.path)
    model = artifact_model(folder, config) if packed else float_model(folder, config)
    tokenizer = Tokenizer.load(folder.tokenizer_file)
    device = this_process().device
    start = torch.tensor([tokenizer.encode_document(prompt)], device=device)
    sampler = torch.Generator(device).manual_seed(seed)
    ids = generate(model, start, tokens, temperature=temperature, generator=sampler)
    return tokenizer.decode([int(i) for i in ids[0, 1:]])
