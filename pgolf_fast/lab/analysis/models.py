"""Models of an analysis: run folders, checkpoints, artifacts and .pt files, and their validation tokens."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.artifact.container import MAGIC
from pgolf_fast.artifact.load import load_artifact, unpack
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.source import Source, open_source
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.io import load_metadata
from pgolf_fast.lab.analysis.summary import Options, Summary, unmeasured
from pgolf_fast.model.bank import BANK_NAMES, PackedBanks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import load_weights, need_finite, read_weights
from pgolf_fast.quant.state import is_slot, packed_banks, rebank

Weights = Literal["auto", "float", "artifact"]


@dataclass(frozen=True)
class LoadedModel:
    """A named model: its weights and, if known, its configuration."""

    name: str
    path: Path
    state: dict[str, Tensor]  # float32 on the CPU, under the community's names, with banks
    config: RunConfig | None  # None for a file without a configuration, such as a community .pt
    folder: RunFolder | None  # the run folder that `path` is or is in
    packed: PackedBanks | None = None  # the banks of an artifact as 6-bit codes

    def network(
        self, table: ByteTable, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> GPT:
        """Build the network with weights and activations of `dtype`; `table` is that of its tokenizer.

        Raises PgolfError if the configuration is unknown or does not fit the weights.
        """
        leading = torch.from_numpy(table.has_leading_space)
        model = GPT(self.need_config().model, leading, compute_dtype=dtype)
        load_weights(model, self.state, str(self.path))
        return model.to(device, dtype)

    def tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer saved in the run folder, if there is one."""
        if self.folder is None or not self.folder.tokenizer_file.is_file():
            return None
        return Tokenizer.load(self.folder.tokenizer_file)

    def need_config(self) -> RunConfig:
        """Return the configuration. Raises PgolfError with the option to give if it is unknown."""
        if self.config is None:
            raise PgolfError(f"{self.path} does not say which network it is: name its preset with --preset")
        return self.config


def open_model(path: Path, weights: Weights = "auto", config: RunConfig | None = None) -> LoadedModel:
    """Load a run folder, a checkpoint (.safetensors), an artifact (.pgolf) or a community .pt file.

    `weights` selects those of a run folder; auto prefers the float ones. `config` is for files without a
    configuration and takes precedence over that of their run folder. Raises PgolfError for damaged weights.
    """
    if not path.exists():
        raise PgolfError(f"model {path} does not exist")
    # Checkpoints are one folder deeper than other files of a run
    places = (path,) if path.is_dir() else (path.parent, path.parent.parent)
    folder = next((run for run in map(RunFolder, places) if run.config_file.is_file()), None)
    file = _weights_file(RunFolder(path), weights) if path.is_dir() else path
    codes = None
    with open(file, "rb") as handle:
        packed = handle.read(len(MAGIC)) == MAGIC
    if packed:
        config, state = load_artifact(file)
        codes = packed_banks(unpack(file)[1])
    else:
        state = read_weights(file)
        config = _config(path, folder, config)
    wide = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    if BANK_NAMES[0] not in wide and any(map(is_slot, wide)):
        wide = rebank(wide)
    if missing := [name for name in BANK_NAMES if name not in wide]:
        raise PgolfError(f"{file} has no {', '.join(missing)}: it is not a model with weight banks")
    need_finite(wide, str(file))
    own = path.resolve().name if path.is_dir() else path.stem
    name = own if path.is_dir() or folder is None else f"{folder.path.resolve().name}/{own}"
    return LoadedModel(name, path, wide, config, folder, codes)


def open_models(
    paths: Sequence[Path], weights: Weights = "auto", config: RunConfig | None = None
) -> list[LoadedModel]:
    """Load each path with `open_model` and give the models unique names."""
    models: dict[str, LoadedModel] = {}
    for path in paths:
        model = open_model(path, weights, config)
        name, number = model.name, 2
        while name in models:
            name, number = f"{model.name} ({number})", number + 1
        models[name] = replace(model, name=name)
    return list(models.values())


def _weights_file(folder: RunFolder, weights: Weights) -> Path:
    folder.read_config()  # raises if it is not a run folder
    only_packed = folder.artifact_file.is_file() and not folder.model_file.is_file()
    if weights == "artifact" or (weights == "auto" and only_packed):
        return folder.weights_file("artifact")
    return folder.weights_file("float")


def _config(path: Path, folder: RunFolder | None, named: RunConfig | None) -> RunConfig | None:
    """Return the configuration in a file, else `named`, else that of the run folder."""
    if path.is_file():
        metadata: dict = {}
        with contextlib.suppress(PgolfError):  # a torch.save file
            metadata = load_metadata(path)
        if "config" in metadata:
            return run_config_from_dict(metadata["config"])
        if named is not None:
            return named
    return None if folder is None else folder.read_config()


@dataclass(frozen=True)
class Validation:
    """The beginning of a validation stream, in whole windows."""

    source: Source
    seq_len: int
    tokens: np.ndarray  # int64 (k * seq_len + 1,)

    def first(self, targets: int) -> np.ndarray:
        """Return the first `targets` targets, rounded up to whole windows, as tokens (n + 1,)."""
        return self.tokens[: -(-targets // self.seq_len) * self.seq_len + 1]

    def stream(self, device: torch.device | str) -> Stream:
        """Return a stream of all tokens on a device, with the bytes of every target."""
        side_bytes = self.source.side_bytes(self.tokens)
        return Stream(self.tokens, self.source.table, torch.device(device), side_bytes)


def open_validation(models: Sequence[LoadedModel], options: Options) -> Validation:
    """Read `options.tokens` targets, rounded up to whole windows, or fewer if there are no more.

    They come from the folder in the options, or from that of the first model's run. Raises PgolfError if
    there is neither, or if a model was trained with another tokenizer or is scored on other windows.
    """
    length, first = window_length(models), models[0]
    config = first.need_config()
    if options.data is None and first.folder is None and config.data.path is None:
        raise PgolfError(f"{first.path} does not name its data: give a folder of shards with --data.path")
    data = replace(config.data, val_tokens=-(-options.tokens // length) * length)
    if options.data is not None:
        data = replace(data, path=str(options.data), tokenizer=None)
    if options.tokenizer is not None:
        data = replace(data, tokenizer=str(options.tokenizer))
    source = open_source(data, config.model.vocab_size)
    for model in models:
        own = model.tokenizer()
        # Files are compared, since the same vocabulary size does not mean the same tokens
        if own is not None and own.path.read_bytes() != source.tokenizer.path.read_bytes():
            text = f"the shards in {source.folder} belong to tokenizer {source.tokenizer.path}, {model.name} "
            text += f"to another ({own.path}): use shards made with that, or name it with --data.tokenizer"
            raise PgolfError(text)
    return Validation(source, length, source.validation(length).astype(np.int64))


def window_length(models: Sequence[LoadedModel]) -> int:
    """Return the window length on which all models are scored.

    Raises PgolfError if lengths differ: losses with more or less context cannot be compared.
    """
    first, length = models[0], models[0].need_config().eval_seq_len
    for other in models[1:]:
        if (own := other.need_config().eval_seq_len) != length:
            text = f"{first.name} is scored on windows of {length} tokens, {other.name} of {own}"
            raise PgolfError(f"{text}: their losses cannot be compared, analyze each model alone")
    return length


def validation_or_why(models: Sequence[LoadedModel], options: Options) -> Validation | str:
    """Return `open_validation`, or the reason why there are no tokens.

    Raises PgolfError if the options name data that cannot be read.
    """
    try:
        window_length(models)
    except PgolfError as error:
        return str(error)
    try:
        return open_validation(models, options)
    except PgolfError as error:
        if options.data is not None:
            raise
        return str(error)


def measure(
    name: str, validation: Validation | str, summarize: Callable[[Validation], list[Summary]]
) -> list[Summary]:
    """Return the summaries, or one that says why `name` cannot be measured."""
    try:
        if isinstance(validation, str):
            raise PgolfError(validation)
        return summarize(validation)
    except PgolfError as error:
        return [unmeasured(name, str(error))]


def diverged(name: str, what: str) -> PgolfError:
    """Return the error for a model whose `what`, such as losses, are not finite."""
    return PgolfError(f"{name}: its {what} are not finite, it has diverged: use an earlier checkpoint")
