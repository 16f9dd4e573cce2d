"""Checkpoints of a run, checks before it is resumed, and import of published weights."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.config.fields import flatten, run_config_from_dict, run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder, absolute
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.source import Source, open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors, save_tensors, write_bytes, write_json
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import environment
from pgolf_fast.model.weights import load_weights, need_finite, read_weights
from pgolf_fast.quant.state import is_slot, rebank

_PARTS = {"config": dict, "elapsed": float, "loader": dict, "schedule": dict, "step": int}
_KEEP = 2  # one to fall back to if the newest turns out damaged
# Settings that a resumed run may change: its length, logging and rates, later stages except for the grid of
# quantization-aware training, and the location of its data, whose tokens the loader compares.
_MAY_CHANGE = re.compile(
    r"name|quant\.(?!bits$|grid$).*|(optim|pack|eval|ttt|kernels)\..*|data\.(path|tokenizer)|train\.(steps|"
    r"max_seconds|log_every|val_every|checkpoint_minutes|compute_dtype|compile|cuda_graph|micro_batch_tokens|cpu_shares)"
)


def write_setup(folder: RunFolder, config: RunConfig, source: Source) -> None:
    """Write the configuration, the environment and the tokenizer of a run."""
    folder.write_config(config)
    write_json(folder.path / "env.json", environment())
    write_bytes(folder.tokenizer_file, source.tokenizer.path.read_bytes())


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the checkpoint of a step, and delete all but the newest few."""
    save_tensors(folder / f"step_{step:08d}.safetensors", tensors, metadata)
    for old in checkpoints(folder)[:-_KEEP]:
        old.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last."""
    return sorted(folder.glob("step_*.safetensors"))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None if there is none."""
    return max(checkpoints(folder), default=None)


class Checkpoint(NamedTuple):
    """A checkpoint that was read, and newer ones that could not be used."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    damaged: tuple[Path, ...]


def check_folder(folder: RunFolder, config: RunConfig, resume: bool) -> list[str]:
    """Return what differs from the run in the folder. Raises PgolfError if it cannot be continued."""
    kept = bool(checkpoints(folder.checkpoints)) or folder.model_file.is_file()
    if not resume and (kept or folder.config_file.is_file()):
        hint = "pass --resume to continue it, or choose another --out"
        raise PgolfError(f"{folder.path} already holds a run: {hint}")
    if not folder.config_file.is_file():
        return []
    changed, refused = _changes(folder.read_config(), config)
    if refused and kept:
        raise PgolfError(f"{folder.path} cannot be resumed with other settings: {'; '.join(refused)}")
    return changed


def newest_whole(folder: RunFolder, config: RunConfig) -> Checkpoint | None:
    """Return the newest whole checkpoint, if any; warn of newer ones. Raises PgolfError if none is usable."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder.checkpoints)):
        try:
            tensors, metadata = load_tensors(path)
            if not all(isinstance(metadata.get(name), kind) for name, kind in _PARTS.items()):
                raise PgolfError(f"{path} is not a checkpoint of a training run")
            if refused := _changes(run_config_from_dict(metadata["config"]), config)[1]:
                raise PgolfError(f"{path} is of a run with other settings: {'; '.join(refused)}")
            need_finite({**tensors, "elapsed": torch.tensor(metadata["elapsed"])}, f"{path} is no state")
            for reason in damaged.values():
                console.logger.warning(f"{reason}; continuing from {path} instead")
            return Checkpoint(path, tensors, metadata, tuple(damaged))
        except PgolfError as error:
            damaged[path] = str(error)
    if damaged:
        raise PgolfError(
            f"no checkpoint of {folder.path} can be used: {'; '.join(damaged.values())}. Put back a whole "
            "one, or remove them to train from the start"
        )
    return None


def _changes(before: RunConfig, now: RunConfig) -> tuple[list[str], list[str]]:
    """Return what differs between two configurations, and which of these a resumed run must not change."""
    old, new = dict(flatten(before)), dict(flatten(now))
    changed = {
        name: f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
    refused = [text for name, text in changed.items() if not _MAY_CHANGE.fullmatch(name)]
    return list(changed.values()), refused


def import_weights(weights: Path, config: RunConfig, folder: RunFolder, key: str | None = None) -> None:
    """Turn weights into a run folder that `quantize`, `pack` and `eval` continue from.

    weights, key: as in `read_weights`, for the model of `config`, whose data the tokenizer comes from.
    Raises PgolfError if names or shapes differ, values are not finite, or the folder already holds a run.
    """
    if folder.config_file.is_file():
        raise PgolfError(f"{folder.path} already holds a run: choose another --out")
    config = absolute(config)
    state = read_weights(weights, key)
    if any(map(is_slot, state)):
        state = rebank(state)
    source = open_source(config.data, config.model.vocab_size)
    model = GPT(config.model)
    load_weights(model, state, str(weights), table=True)
    need_finite(state, str(weights))
    with folder.lock():
        write_setup(folder, config, source)
        metadata = {"imported": weights.name, "config": run_config_to_dict(config)}
        save_tensors(folder.model_file, model.state_dict(), metadata)
