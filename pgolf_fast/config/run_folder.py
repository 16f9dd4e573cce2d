"""What a run leaves behind: configuration, environment, metrics, log, checkpoints and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgolf_fast import console
from pgolf_fast.config.fields import run_config_from_dict, run_config_to_dict
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text

SCORES = {"non_overlapping": "non-overlapping", "sliding": "sliding", "sliding_ttt": "sliding + TTT"}


def read_scores(path: Path) -> dict:
    """The scores that `pgolf eval` wrote. Raises PgolfError where it did not."""
    try:
        story = json.loads(path.read_text(encoding="utf-8"))
        if all({"bpb", "loss", "tokens", "bytes"} <= story[name].keys() for name in SCORES):
            return story
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PgolfError(f"{path} does not hold three scores: run `pgolf eval {path.parent}` first")


def stale(product: Path) -> Path:
    """What `RunFolder.retire` renames a file to."""
    return product.with_name(f"{product.name}.stale")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model_file(self) -> Path:
        """The final averaged weights, float32."""
        return self.path / "model.safetensors"

    @property
    def quantized_file(self) -> Path:
        return self.path / "quantized.safetensors"

    @property
    def artifact_file(self) -> Path:
        return self.path / "model.pgolf"

    @property
    def audit_file(self) -> Path:
        return self.path / "audit.json"

    @property
    def sweep_file(self) -> Path:
        """What `pgolf ttt-sweep` found of the artifact."""
        return self.path / "ttt_sweep.json"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.model"

    def scores_file(self, weights: Literal["artifact", "float"]) -> Path:
        """What `pgolf eval` found of those weights."""
        return self.path / f"scores_{weights}.json"

    @property
    def products(self) -> tuple[Path, ...]:
        """All that is made of the final weights, in any number of steps."""
        scores = (self.scores_file("float"), self.scores_file("artifact"))
        return (self.quantized_file, self.artifact_file, *scores, self.sweep_file, self.audit_file)

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that tell of the run as it stands; [] without the file.

        What follows the checkpoint that a later start went back to was made again, and is left out.
        """
        lines: list[dict[str, Any]] = []
        last = 0
        for line in console.read_metrics(self.metrics_file) if self.metrics_file.is_file() else []:
            if line.get("kind") in ("step", "resume"):
                first = line["step"] + (line["kind"] == "resume")  # of what comes now
                if first <= last:
                    lines = [
                        old for old in lines if old.get("kind") == "resume" or old.get("step", 0) < first
                    ]
                last = line["step"]
            lines.append(line)
        return lines

    def retire(self, *products: Path) -> None:
        """Rename what was made of weights that are now replaced to NAME.stale: it is not theirs."""
        for product in products:
            if product.is_file():
                product.replace(stale(product))
                console.logger.info(
                    "%s was made of other weights and is now %s", product.name, stale(product).name
                )

    def write_config(self, config: RunConfig) -> None:
        write_text(self.config_file, json.dumps(run_config_to_dict(config), indent=2) + "\n")

    def read_config(self) -> RunConfig:
        """The configuration that ran. Raises PgolfError when this is no run folder."""
        if not self.config_file.is_file():
            raise PgolfError(
                f"{self.path} is not a run folder: it has no config.json; give the --out of a training run"
            )
        try:
            return run_config_from_dict(json.loads(self.config_file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise PgolfError(
                f"{self.config_file} is not valid JSON (line {error.lineno}): {error.msg}"
            ) from error

    def need(self, path: Path, made_by: str) -> Path:
        """`path` if it exists. Raises PgolfError saying which command makes it."""
        if not path.is_file():
            raise PgolfError(f"{path} does not exist yet: run `pgolf {made_by} {self.path}` first")
        return path
