"""The files of a run: configuration, environment, metrics, log, checkpoints, weights, scores."""

from __future__ import annotations

import contextlib
import filecmp
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pgolf_fast import console
from pgolf_fast.config.checks import need
from pgolf_fast.config.fields import run_config_from_dict, run_config_to_dict
from pgolf_fast.config.presets import is_preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path, locked, need_writable, read_json, remove_leftovers, write_json

SCORES = {"non_overlapping": "non-overlapping", "sliding": "sliding", "sliding_ttt": "sliding + TTT"}
_UNITS = ("bpb", "loss", "tokens", "bytes")
Weights = Literal["artifact", "float", "packed"]  # packed: an artifact whose banks stay 6-bit codes


def read_scores(path: Path) -> dict[str, Any]:
    """Read the file that `pgolf eval` writes. Raises PgolfError if it does not hold three finite scores."""
    try:
        scores = read_json(path)
        if all(0 < scores[name][unit] < math.inf for name in SCORES for unit in _UNITS):
            return scores
    except (FileNotFoundError, KeyError, TypeError, OverflowError):
        pass
    again = console.command("eval", path.parent)
    raise PgolfError(f"{path} does not hold three finite scores: run `{again}` first")


def absolute(config: RunConfig) -> RunConfig:
    """Return `config` with absolute data paths, which do not depend on the working directory."""
    data = config.data
    path, tokenizer = (p and os.path.abspath(p) for p in (data.path, data.tokenizer))
    return replace(config, data=replace(data, path=path, tokenizer=tokenizer))


def _is_whole(line: dict[str, Any]) -> bool:
    """Return whether a line has a kind, a step and, for a step, a time; losses may be infinite."""
    numbers = [line.get("tokens", 0), line.get("elapsed", None if line.get("kind") == "step" else 0)]
    finite = all(isinstance(value, int | float) and abs(value) < 1e300 for value in numbers)
    return isinstance(line.get("kind"), str) and type(line.get("step")) is int and finite


def stale(product: Path) -> Path:
    """Return the name that `RunFolder.retire` gives to a file."""
    return product.with_name(f"{product.name}.stale")


@dataclass(unsafe_hash=True)
class RunFolder:
    """The files of a run folder, and its configuration, which is read once."""

    path: Path

    def __post_init__(self) -> None:
        path = self.path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.log_file = path / "train.log"
        self.checkpoints = path / "checkpoints"
        self.model_file = path / "model.safetensors"  # the final averaged weights, float32
        self.quantized_file = path / "quantized.safetensors"
        self.artifact_file = path / "model.pgolf"
        self.audit_file = path / "audit.json"
        self.sweep_file = path / "ttt_sweep.json"  # result of `pgolf ttt-sweep` on the artifact
        self.tokenizer_file = path / "tokenizer.model"
        self._config: RunConfig | None = None

    @classmethod
    def of(cls, run: str | Path | RunFolder) -> RunFolder:
        """Return the run folder at a path. Raises PgolfError if there is none."""
        folder = run if isinstance(run, RunFolder) else cls(Path(run))
        why = f"run folder {folder.path} does not exist: give the --out of a training run"
        need(folder.path.is_dir(), why)
        folder.read_config()
        return folder

    def scores_file(self, weights: Weights) -> Path:
        """Scores of those weights, written by `pgolf eval`."""
        return self.path / f"scores_{weights}.json"

    def weights_file(self, weights: Weights) -> Path:
        """Return the file of those weights. Raises PgolfError naming the command that makes it."""
        if weights != "float":
            return self.need(self.artifact_file, "pack")
        return self.need(self.model_file, "train --resume")

    def resume_command(self) -> str:
        """Return the command that continues the training of this run, quoted for a shell."""
        name = str(self.path)
        if name.startswith("-") or is_preset(name):  # which `pgolf train` would read differently
            name = f"./{name}"
        return f"pgolf train --resume {shlex.quote(name)}"

    @property
    def products(self) -> tuple[Path, ...]:
        """Every file derived from the final weights."""
        scores = map(self.scores_file, get_args(Weights))
        return (self.quantized_file, self.artifact_file, *scores, self.sweep_file, self.audit_file)

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that led to the current weights; [] without the file.

        If the run was resumed from a checkpoint, older lines for later steps are left out, as is an earlier
        end of the run. Damaged lines are left out with a warning.
        """
        lines: list[dict[str, Any]] = []
        last = damaged = 0
        for line in console.read_metrics(self.metrics_file) if self.metrics_file.is_file() else []:
            if not _is_whole(line):
                damaged += 1
                continue
            if line["kind"] in ("step", "resume"):
                first = line["step"] + (line["kind"] == "resume")  # the first step of what follows
                if lines and lines[-1]["kind"] == "end":
                    lines.pop()
                if first <= last:
                    lines = [o for o in lines if o["kind"] == "resume" or o["step"] < first]
                last = line["step"]
            lines.append(line)
        if damaged:
            console.logger.warning(f"{self.metrics_file}: {damaged} damaged lines are left out")
        return lines

    def retire(self, *products: Path) -> None:
        """Rename files made from weights that are now replaced to NAME.stale."""
        for product in products:
            if product.is_file():
                old = product.replace(stale(product)).name
                console.logger.info("%s was made from other weights and is now %s", product.name, old)

    def write_config(self, config: RunConfig) -> None:
        """Write config.json."""
        write_json(self.config_file, run_config_to_dict(config))
        self._config = None

    def read_config(self) -> RunConfig:
        """Return the configuration of the run. Raises PgolfError if this is not a run folder."""
        if self._config is not None:
            return self._config
        why = f"{self.path} is not a run folder: it has no config.json; give the --out of a training run"
        need(self.config_file.is_file(), why)
        values = read_json(self.config_file)
        try:
            config = run_config_from_dict(values)
        except PgolfError as error:
            raise PgolfError(f"{self.config_file}: {error}") from error
        given = (config.data.path, config.data.tokenizer)
        path, tokenizer = (p and next(filter(os.path.exists, self.places(p)), p) for p in given)
        self._config = replace(config, data=replace(config.data, path=path, tokenizer=tokenizer))
        return self._config

    def places(self, path: str) -> list[str]:
        """Return candidates for a data path: a relative one may start here or in any parent of the run."""
        starts = ["."] if os.path.isabs(path) else [".", *map(str, self.path.absolute().parents)]
        return list(dict.fromkeys(os.path.abspath(os.path.join(start, path)) for start in starts))

    def copy_to(self, out: Path) -> RunFolder:
        """Copy the run, except its checkpoints, into `out`, as `copy_files` does."""
        training = (self.path / "env.json", self.metrics_file, self.log_file, self.tokenizer_file)
        files = (*training, self.model_file, *self.products)
        return copy_files(self.read_config(), {file.name: file for file in files if file.is_file()}, out)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this run in the block. Raises PgolfError if it is in use."""
        need_writable(self.path)
        with locked(self.path / ".lock", f"{self.path} is in use"):
            for place in (self.path, self.checkpoints):
                remove_leftovers(place)
            yield

    def need(self, path: Path, made_by: str) -> Path:
        """Return `path` if it exists. Raises PgolfError naming the command that makes it."""
        command = console.command(*made_by.split(), self.path)
        need(path.is_file(), f"{path} does not exist yet: run `{command}` first")
        return path


def copy_files(config: RunConfig, files: dict[str, Path], out: Path) -> RunFolder:
    """Copy `files` (new name -> file) into the run folder `out`; files that it already has are kept.

    Raises PgolfError if `out` holds files but no run, or a run with another configuration or other weights.
    """
    copy = RunFolder(out)
    if not copy.config_file.is_file():
        if out.exists() and any(entry.name != ".lock" for entry in out.iterdir()):
            raise PgolfError(f"{out} holds other files than those of a run: choose a new or empty --out")
        copy.write_config(config)
    elif copy.read_config() != config:
        raise PgolfError(f"{out} holds a run with another configuration: choose another --out")
    weights = (copy.tokenizer_file, copy.model_file, copy.quantized_file, copy.artifact_file)
    for name, source in files.items():
        target = out / name
        if not target.exists():
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
        elif target in weights and not filecmp.cmp(source, target, shallow=False):
            why = f"{target} differs from {source}: give {out} itself as the run, or choose another --out"
            raise PgolfError(why)
    return copy


RunPath = str | Path | RunFolder
