"""Make a run folder of published weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path, save_tensors, write_text
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import environment
from pgolf_fast.model.weights import load_weights, read_weights


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
