"""Setup and checkpoints of a run, and import of published weights."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder, absolute
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.source import Source, open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import save_tensors, write_bytes, write_json
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import environment
from pgolf_fast.model.weights import load_weights, need_finite, read_weights
from pgolf_fast.quant.state import is_slot, rebank

_KEEP = 2  # one to fall back to if the newest turns out damaged


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
