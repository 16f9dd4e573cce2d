"""The files of a run: configuration, environment, metrics, log, checkpoints, weights, scores."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgolf_fast import console
from pgolf_fast.config.fields import run_config_from_dict, run_config_to_dict
from pgolf_fast.config.presets import is_preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import locked, read_json, remove_leftovers, write_json

SCORES = {"non_overlapping": "non-overlapping", "sliding": "sliding", "sliding_ttt": "sliding + TTT"}
Weights = Literal["artifact", "float"]


def read_scores(path: Path) -> dict[str, Any]:
    """Read the file that `pgolf eval` writes. Raises PgolfError if it does not hold three scores."""
    try:
        scores = read_json(path)
        if all({"bpb", "loss", "tokens", "bytes"} <= scores[name].keys() for name in SCORES):
            return scores
    except (FileNotFoundError, KeyError, AttributeError):
        pass
    raise PgolfError(f"{path} does not hold three scores: run `pgolf eval {path.parent}` first")


def _is_whole(line: dict[str, Any]) -> bool:
    """Return whether a line of metrics.jsonl has a kind and a step, and a number where one belongs."""
    numbers = [line.get(name, 0) for name in ("loss", "bpb", "tokens", "multiplier")]
    numbers.append(line.get("elapsed", None if line.get("kind") == "step" else 0))
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
        if not folder.path.is_dir():
            raise PgolfError(f"run folder {folder.path} does not exist: give the --out of a training run")
        folder.read_config()
        return folder

    def scores_file(self, weights: Weights) -> Path:
        """Scores of those weights, written by `pgolf eval`."""
        return self.path / f"scores_{weights}.json"

    def weights_file(self, weights: Weights) -> Path:
        """Return the file of those weights. Raises PgolfError naming the command that makes it."""
        if weights == "artifact":
            return self.need(self.artifact_file, "pack")
        return self.need(self.model_file, "train --resume")

    def resume_command(self) -> str:
        """Return the command that continues the training of this run, quoted for a shell."""
        name = str(self.path)
        if name.startswith("-") or is_preset(name):  # these words mean something else to `pgolf train`
            name = f"./{name}"
        return f"pgolf train --resume {shlex.quote(name)}"

    @property
    def products(self) -> tuple[Path, ...]:
        """Every file derived from the final weights."""
        scores = (self.scores_file("float"), self.scores_file("artifact"))
        return (self.quantized_file, self.artifact_file, *scores, self.sweep_file, self.audit_file)

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that led to the current weights; [] without the file.

        Lines after a checkpoint that the run was later resumed from were recomputed and are left out, as is
        the end that a resumed run had before. Damaged lines are left out with a warning.
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
        if not self.config_file.is_file():
            raise PgolfError(
                f"{self.path} is not a run folder: it has no config.json; give the --out of a training run"
            )
        values = read_json(self.config_file)
        try:
            self._config = run_config_from_dict(values)
        except PgolfError as error:
            raise PgolfError(f"{self.config_file}: {error}") from error
        return self._config

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing this run during the block. Raises PgolfError if one does."""
        with locked(self.path / ".lock", f"{self.path} is in use"):
            for place in (self.path, self.checkpoints):
                remove_leftovers(place)
            yield

    def need(self, path: Path, made_by: str) -> Path:
        """Return `path` if it exists. Raises PgolfError naming the command that makes it."""
        if not path.is_file():
            command = f"pgolf {made_by} {shlex.quote(str(self.path))}"
            raise PgolfError(f"{path} does not exist yet: run `{command}` first")
        return path


RunPath = str | Path | RunFolder
