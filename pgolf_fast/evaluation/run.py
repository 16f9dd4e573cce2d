"""Score a run folder or an artifact, and estimate the time that takes."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from pgolf_fast.artifact.load import LoadedModel, load
from pgolf_fast.artifact.pack import read_quantized
from pgolf_fast.config.fields import run_config_to_dict, with_fields
from pgolf_fast.config.run_folder import RunFolder, RunPath, Weights
from pgolf_fast.config.schema import DataConfig, RunConfig
from pgolf_fast.console import logger
from pgolf_fast.data.source import Source, open_source
from pgolf_fast.data.tokenizer import find_tokenizer
from pgolf_fast.distributed import World, this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.estimate import Estimate, estimate
from pgolf_fast.evaluation.figures import figures, token_classes
from pgolf_fast.evaluation.resume import Resume, identity
from pgolf_fast.evaluation.score import Score, Stream
from pgolf_fast.evaluation.scores import ThreeScores, plain_score, three_scores
from pgolf_fast.io import write_json
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.model.weights import load_weights
from pgolf_fast.quant.state import dequantize_state


def open_run(
    folder: RunFolder, config: RunConfig, weights: Weights, device: torch.device
) -> tuple[LoadedModel, Stream]:
    """Open everything that scoring reads: the run's model and the validation tokens of `config.data`.

    If the tokenizer that the run was trained with is gone, the copy in the run folder is used.
    Raises PgolfError if weights or data are missing, or the tokens were made with another tokenizer.
    """
    folder.weights_file(weights)  # the first thing to complain about
    config = replace(config, data=present_data(folder, config.data))
    source, stream = _open_data(config, device, folder.tokenizer_file)
    return load(folder, weights, config=config, tokenizer=source.tokenizer, device=device), stream


def present_data(folder: RunFolder, data: DataConfig) -> DataConfig:
    """Return `data` with the run's copy of the tokenizer if it is gone. Raises PgolfError without shards."""
    own, named = folder.tokenizer_file, data.tokenizer
    if data.path is None:
        return data
    if not Path(data.path).is_dir():
        tried = " and ".join(folder.places(data.path))
        raise PgolfError(f"data folder {data.path} does not exist (tried {tried}): give --data DIR")
    if not own.is_file() or named != folder.read_config().data.tokenizer or (named and Path(named).is_file()):
        return data
    try:
        find_tokenizer(data.path)
        return replace(data, tokenizer=None)
    except PgolfError as error:
        logger.warning("%s: using the run's, %s", str(error).partition(":")[0], own)
        return replace(data, tokenizer=str(own))


def _open_data(config: RunConfig, device: torch.device, kept: Path | None = None) -> tuple[Source, Stream]:
    """Open the validation tokens. Raises PgolfError if they were made by another tokenizer than that one."""
    source = open_source(config.data, config.model.vocab_size)
    own = source.tokenizer.path
    if kept is not None and kept.is_file() and own.read_bytes() != kept.read_bytes():
        raise PgolfError(
            f"the shards in {source.folder} belong to tokenizer {own}, the run to another ({kept}): "
            "use shards made with the run's, or name it with --tokenizer"
        )
    tokens = source.validation(config.eval_seq_len)
    stream = Stream(tokens, source.table, device, source.side_bytes(tokens))
    if not stream.target_bytes.any():
        raise PgolfError(f"nothing to score: no token of {source.folder}'s validation shards is text")
    return source, stream


def score(
    model: RunPath | LoadedModel,
    weights: Literal["auto", "artifact", "float"] = "auto",
    *,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    allow_illegal: bool = False,
    **fields: object,
) -> ThreeScores:
    """Compute the three scores of a run folder, an artifact file, or a loaded model.

    data, tokenizer: validation shards and their tokenizer, by default those of the run. fields: changes to
    the configuration, such as ttt__lr=0.01 or eval__stride=32. The scores of a run folder are also written
    there.
    Raises PgolfError for missing data, or test-time training that breaks the rules, unless `allow_illegal`.
    """
    places = {"data.path": data, "data.tokenizer": tokenizer}
    fields |= {name: place for name, place in places.items() if place is not None}
    if isinstance(model, RunFolder) or (not isinstance(model, LoadedModel) and Path(model).is_dir()):
        folder = RunFolder.of(model)
        config = with_fields(folder.read_config(), fields)
        if weights == "auto":
            weights = "artifact" if folder.artifact_file.is_file() else "float"
        return score_run(folder, config, weights, allow_illegal=allow_illegal)
    loaded = model if isinstance(model, LoadedModel) else load(model, weights, tokenizer=tokenizer)
    config = with_fields(loaded.config, fields)
    _, stream = _open_data(config, loaded.model.qo_bank.device, loaded.need_tokenizer().path)
    return three_scores(loaded.model, stream, config, loaded.grid, allow_illegal=allow_illegal)


def score_run(
    folder: RunFolder,
    config: RunConfig,
    weights: Weights,
    world: World | None = None,
    *,
    allow_illegal: bool = False,
) -> ThreeScores:
    """Compute the three scores of a run; write them and their `figures` to scores_<weights>.json.

    Float weights adapt without rounding; an artifact's adapt on its own grid, if the configuration rounds.
    Packed weights give the artifact's scores, with one layer of dense banks at a time until they adapt.
    With a `world` of several processes each scores a share. After an interruption, the next call with the
    same weights, data and settings resumes, and writes the same file.
    Raises PgolfError for test-time training that breaks the rules, unless `allow_illegal`; the file says so.
    """
    world = world or this_process()
    loaded, stream = open_run(folder, config, weights, world.device)
    config, model, result = loaded.config, loaded.model, folder.scores_file(weights)
    tree, resume = run_config_to_dict(config), None
    if config.eval.checkpoint_minutes is not None:
        settings = [*(tree[group] for group in ("eval", "ttt", "quant", "kernels")), loaded.sha256]
        settings += [config.eval_seq_len, str(model.compute_dtype)]
        seconds, digest = 60 * config.eval.checkpoint_minutes, identity(model, stream, settings)
        resume = Resume(result, digest, seconds, world.is_main)
    scores = three_scores(
        model, stream, config, loaded.grid, world=world, resume=resume, allow_illegal=allow_illegal
    )
    if world.is_main:
        classes = token_classes(loaded.need_tokenizer())
        shown = {name: figures(scorer, classes) for name, scorer in scores.scorers.items()}
        report = {"weights": weights, "artifact_sha256": loaded.sha256}
        report |= {group: tree[group] for group in ("eval", "ttt", "kernels")}
        write_json(result, report | scores.to_dict() | {"figures": shown})
        if resume is not None:
            resume.forget()
    return scores


def quick_score(folder: RunFolder, config: RunConfig, tokens: int, *, quantized: bool = False) -> Score:
    """Score the float or the quantized weights on non-overlapping windows over the first `tokens` targets."""
    config = with_fields(config, {"data.val_tokens": tokens})
    loaded, stream = open_run(folder, config, "float", this_process().device)
    if quantized:
        state = dequantize_state(read_quantized(folder)[0])
        load_weights(loaded.model, state, str(folder.quantized_file))
    return plain_score(loaded.model, stream, loaded.config)


def estimate_run(folder: RunFolder | None, config: RunConfig, weights: Weights) -> tuple[list[Estimate], str]:
    """Estimate `score_run` in this process; also name the weights used: new ones where the run has none."""
    device, artifact = this_process().device, weights != "float"
    if folder is not None and (folder.artifact_file if artifact else folder.model_file).is_file():
        loaded, stream = open_run(folder, config, weights, device)
        name = "the artifact" if artifact else "the float weights"
        return estimate(loaded.model, stream, loaded.config, loaded.grid), name
    source, stream = _open_data(config, device)
    choose_kernels(config.kernels, device)
    dtype = resolve_dtype(config.train.compute_dtype, device)
    model = GPT(config.model, torch.from_numpy(source.table.has_leading_space), compute_dtype=dtype)
    return estimate(model.to(device), stream, config), "new weights"
