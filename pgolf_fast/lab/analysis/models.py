"""Loading models for an analysis from run folders, checkpoints, artifacts and .pt files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pgolf_fast.artifact.pack import load_artifact
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_metadata
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import load_weights, read_weights
from pgolf_fast.quant.state import is_slot, rebank

Weights = Literal["auto", "float", "artifact"]


@dataclass(frozen=True)
class LoadedModel:
    """A named model: its weights and, if known, its configuration."""

    name: str
    path: Path
    state: dict[str, Tensor]
    """float32 on the CPU, under the community's names, with banks."""
    config: RunConfig | None
    """None for a file without a configuration, such as a community .pt."""
    folder: RunFolder | None
    """The run folder that `path` is or is in."""

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state.values())

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
    configuration and takes precedence over that of their run folder. Raises PgolfError for anything else, and
    for weights that are damaged or not finite.
    """
    if not path.exists():
        raise PgolfError(f"model {path} does not exist")
    folder = _run_folder(path)
    file = _weights_file(RunFolder(path), weights) if path.is_dir() else path
    if file.suffix == ".pgolf":
        tree, state = load_artifact(file)
        config = run_config_from_dict(tree)
    else:
        state = read_weights(file)
        config = _config(path, folder, config)
    wide = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    if BANK_NAMES[0] not in wide and any(map(is_slot, wide)):
        wide = rebank(wide)
    missing = [name for name in BANK_NAMES if name not in wide]
    if missing:
        raise PgolfError(f"{file} has no {', '.join(missing)}: it is not a model with weight banks")
    for name, tensor in wide.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PgolfError(f"{file}: {name} has values that are not finite: use an earlier checkpoint")
    return LoadedModel(_name(path, folder), path, wide, config, folder)


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


def _run_folder(path: Path) -> RunFolder | None:
    """Return the run folder that `path` is or is in; checkpoints are one folder deeper."""
    places = (path,) if path.is_dir() else (path.parent, path.parent.parent)
    return next((run for run in map(RunFolder, places) if run.config_file.is_file()), None)


def _weights_file(folder: RunFolder, weights: Weights) -> Path:
    folder.read_config()  # raises if it is not a run folder
    if weights == "artifact" or (
        weights == "auto" and not folder.model_file.is_file() and folder.artifact_file.is_file()
    ):
        return folder.need(folder.artifact_file, "pack")
    return folder.need(folder.model_file, "train PRESET --resume --out")


def _config(path: Path, folder: RunFolder | None, named: RunConfig | None) -> RunConfig | None:
    """Return the configuration in a file, else `named`, else that of the run folder."""
    if path.is_file():
        metadata = load_metadata(path) if path.suffix == ".safetensors" else {}
        if "config" in metadata:
            return run_config_from_dict(metadata["config"])
        if named is not None:
            return named
    return None if folder is None else folder.read_config()


def _name(path: Path, folder: RunFolder | None) -> str:
    if path.is_dir():
        return path.resolve().name
    return path.stem if folder is None else f"{folder.path.resolve().name}/{path.stem}"
