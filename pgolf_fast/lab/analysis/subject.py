"""What is analysed: a named model, from whatever kind of file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pgolf_fast.artifact.load import load_artifact
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.serialize import run_config_from_dict
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_story
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import load_weights, read_weights
from pgolf_fast.quant.state import is_slot, rebank

Weights = Literal["auto", "float", "artifact"]


@dataclass(frozen=True)
class Subject:
    """A model to be analysed."""

    name: str
    path: Path
    state: dict[str, Tensor]
    """float32 on the CPU, by the community's names, with banks."""
    config: RunConfig | None
    """None for a file that does not say (say, a community .pt)."""
    folder: RunFolder | None
    """The run folder that it is, or lies in."""

    def model(
        self, table: ByteTable, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> GPT:
        """The network, with weights and activations of `dtype`; `table` is that of its tokenizer.

        Raises PgolfError when its configuration is not known, or the weights are those of another.
        """
        leading = torch.from_numpy(table.has_leading_space)
        model = GPT(self.known().model, leading, compute_dtype=dtype)
        load_weights(model, self.state, str(self.path))
        return model.to(device, dtype)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer kept in its run folder, if there is one."""
        if self.folder is None or not self.folder.tokenizer_file.is_file():
            return None
        return Tokenizer.load(self.folder.tokenizer_file)

    def known(self) -> RunConfig:
        """Its configuration. Raises PgolfError, saying what to give, when it is not known."""
        if self.config is None:
            raise PgolfError(f"{self.path} does not say which network it is: name its preset with --preset")
        return self.config


def open_subject(path: Path, weights: Weights = "auto", config: RunConfig | None = None) -> Subject:
    """The model in a run folder, a checkpoint (.safetensors), an artifact (.pgolf) or a community .pt file.

    `weights` says which of a run folder: auto takes the float ones if they are there. `config` is that of a
    file that does not say itself, whatever folder it lies in. Raises PgolfError for what is none of these, is
    damaged, or is not finite.
    """
    if not path.exists():
        raise PgolfError(f"model {path} does not exist")
    folder = _folder_of(path)
    file = _file_of(RunFolder(path), weights) if path.is_dir() else path
    if file.suffix == ".pgolf":
        config, state = load_artifact(file)
    else:
        state = read_weights(file)
        config = _config_of(path, folder, config)
    wide = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    if BANK_NAMES[0] not in wide and any(map(is_slot, wide)):
        wide = rebank(wide)
    missing = [name for name in BANK_NAMES if name not in wide]
    if missing:
        raise PgolfError(f"{file} has no {', '.join(missing)}: it is not a model with weight banks")
    for name, tensor in wide.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PgolfError(f"{file}: {name} has values that are not finite: use an earlier checkpoint")
    return Subject(_name(path, folder), path, wide, config, folder)


def open_subjects(
    paths: Sequence[Path], weights: Weights = "auto", config: RunConfig | None = None
) -> list[Subject]:
    """`open_subject` of each path, under names that differ."""
    found: list[Subject] = []
    for path in paths:
        subject, taken = open_subject(path, weights, config), {other.name for other in found}
        name, number = subject.name, 2
        while name in taken:
            name, number = f"{subject.name} ({number})", number + 1
        found.append(replace(subject, name=name))
    return found


def _folder_of(path: Path) -> RunFolder | None:
    """The run folder that `path` is or lies in, as a checkpoint does or what a run leaves behind."""
    places = (path,) if path.is_dir() else (path.parent, path.parent.parent)
    return next((run for run in map(RunFolder, places) if run.config_file.is_file()), None)


def _file_of(folder: RunFolder, weights: Weights) -> Path:
    folder.read_config()  # says so if it is none
    if weights == "artifact" or (
        weights == "auto" and not folder.model_file.is_file() and folder.artifact_file.is_file()
    ):
        return folder.need(folder.artifact_file, "pack")
    return folder.need(folder.model_file, "train PRESET --resume --out")


def _config_of(path: Path, folder: RunFolder | None, named: RunConfig | None) -> RunConfig | None:
    """That of a run folder; of a file what it says itself, else `named`, else that of the run it lies in."""
    if path.is_file():
        story = load_story(path) if path.suffix == ".safetensors" else {}
        if "config" in story:
            return run_config_from_dict(story["config"])
        if named is not None:
            return named
    return None if folder is None else folder.read_config()


def _name(path: Path, folder: RunFolder | None) -> str:
    if path.is_dir():
        return path.resolve().name
    return path.stem if folder is None else f"{folder.path.resolve().name}/{path.stem}"
