"""Score, estimate and continue a run folder."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import torch

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.pack import unpack
from pgolf_fast.artifact.steps import artifact_model, float_model, new_model
from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import Tokenizer
from pgolf_fast.distributed import World, this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.estimate import Estimate, estimate
from pgolf_fast.evaluation.figures import figures, token_classes
from pgolf_fast.evaluation.resume import Resume, identity
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import ThreeScores, three_scores
from pgolf_fast.io import write_text
from pgolf_fast.model.decoding import generate
from pgolf_fast.quant.state import bank_grids


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
        model, stream, config, grid, world=world, resume=resume, allow_illegal=allow_illegal
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
        return estimate(new_model(source.table, config, world), stream, config), "new weights"
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


def continue_text(folder: RunFolder, prompt: str, tokens: int, *, temperature: float, seed: int) -> str:
    """`prompt` and its continuation by the run's artifact, or its float weights if it is not packed yet."""
    config = folder.read_config()
    packed = folder.artifact_file.is_file()
    if not packed:
        console.logger.warning("%s is not packed: using the float weights", folder.path)
    model = artifact_model(folder, config) if packed else float_model(folder, config)
    tokenizer = Tokenizer.load(folder.tokenizer_file)
    device = this_process().device
    start = torch.tensor([tokenizer.encode_document(prompt)], device=device)
    sampler = torch.Generator(device).manual_seed(seed)
    ids = generate(model, start, tokens, temperature=temperature, generator=sampler)
    return tokenizer.decode([int(i) for i in ids[0, 1:]])
