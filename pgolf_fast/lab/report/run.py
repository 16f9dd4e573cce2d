"""Contents of a run folder, in whatever state the run is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_story
from pgolf_fast.lab.analysis.artifact_bytes import ArtifactTable, artifact_table
from pgolf_fast.lab.report.html_page import portable
from pgolf_fast.lab.report.loss_curve import as_float


@dataclass(frozen=True)
class Missing:
    """A part of the report that is not available: the reason, and the command that creates it."""

    what: str
    why: str
    command: str


@dataclass(frozen=True)
class RunRecord:
    """Files of a run folder, parsed; a file that does not exist is empty or None."""

    folder: RunFolder
    config: RunConfig
    steps: dict[int, dict[str, Any]]
    """Lines of metrics.jsonl by step; a step repeated after an interruption has its last line."""
    validations: list[dict[str, Any]]
    resumes: list[dict[str, Any]]
    slot_rates: list[dict[str, Any]]
    """Learning rates that MetaSGD learned, by bank."""
    scores: dict[str, dict[str, Any]]
    """Output of `pgolf eval`, by weights."""
    sweep: dict[str, Any]
    """Output of `pgolf ttt-sweep`."""
    audit: dict[str, Any]
    """Output of `pgolf audit`."""
    environment: dict[str, Any]
    weights: dict[str, Any]
    """Metadata of model.safetensors: step, weights."""
    artifact: ArtifactTable | None
    missing: tuple[Missing, ...]

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def seconds(self) -> float:
        """Training time up to the last step; NaN if unknown."""
        return as_float(self.steps[self.last_step].get("elapsed")) if self.steps else math.nan

    @property
    def tokens(self) -> int:
        """Training tokens up to the last step."""
        unrecorded = self.last_step - len(self.steps)
        return sum(row["tokens"] for row in self.steps.values()) + unrecorded * self.config.train.batch_tokens

    @property
    def broken_steps(self) -> list[int]:
        """Steps whose loss is not finite."""
        return [s for s in sorted(self.steps) if not math.isfinite(as_float(self.steps[s].get("loss")))]

    @property
    def final_validation(self) -> dict[str, Any] | None:
        """Validation of the weights in model.safetensors: the average or, after Reptile, the last step's."""
        which = [self.weights.get(name, ...) for name in ("step", "weights")]
        rows = (row for row in self.validations if [row["step"], row.get("weights")] == which)
        return next(rows, None)

    def state(self) -> str:
        """Describe the progress of the run in a few words."""
        steps, seconds = self.config.train.steps, self.config.train.max_seconds
        goal = f"{steps:,}" + (f" or {console.duration(seconds)}" if seconds else "")
        if self.folder.model_file.is_file():
            return "trained to the end" if self.steps else "imported weights, not trained here"
        if self.steps:
            return f"interrupted or still running: step {self.last_step:,} of {goal}"
        return "not trained yet: only the configuration exists"


class _Reader:
    """Reads the files of a run folder and collects what is `missing`."""

    def __init__(self, folder: RunFolder):
        self.folder, self.name = folder, folder.path.resolve().name
        self.missing: list[Missing] = []

    def json(self, path: Path, what: str, command: str) -> dict[str, Any]:
        """Parse a JSON object; {} if the file is missing or damaged."""
        if not path.is_file():
            self.missing.append(Missing(what, f"there is no {path.name}", command))
            return {}
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            self.missing.append(Missing(what, f"{path.name} is damaged: {error}", command))
            return {}
        return tree if isinstance(tree, dict) else {}

    def lines(self) -> dict[str, list[dict[str, Any]]]:
        """Read the lines of metrics.jsonl that belong to a step, by kind."""
        lines = defaultdict(list)
        for row in self.folder.history():
            if isinstance(row.get("step"), int):
                lines[str(row.get("kind"))].append(row)
        if not lines["step"]:
            self.missing.append(Missing("training log", "metrics.jsonl has no steps", "written by training"))
        return lines

    def weights(self, command: str) -> dict[str, Any]:
        """Read the metadata of the final weights."""
        if not self.folder.model_file.is_file():
            self.missing.append(Missing("final weights", "training did not finish", command))
            return {}
        try:
            return load_story(self.folder.model_file)
        except PgolfError as error:
            self.missing.append(Missing("final weights", portable(str(error)), command))
            return {}

    def artifact(self) -> tuple[ArtifactTable | None, str | None]:
        """Read the byte table and the SHA-256 of the artifact."""
        if not self.folder.artifact_file.is_file():
            step = "quantize" if not self.folder.quantized_file.is_file() else "pack"
            self.missing.append(Missing("artifact", "the run is not packed", f"pgolf {step} {self.name}"))
            return None, None
        try:
            path = self.folder.artifact_file
            return artifact_table(path, tried=()), sizes(path).sha256
        except PgolfError as error:
            self.missing.append(Missing("artifact", portable(str(error)), f"pgolf pack {self.name}"))
            return None, None

    def check_digest(self, tree: dict[str, Any], digest: str | None, what: str, command: str) -> None:
        """Report results of another artifact as missing for this one."""
        of = tree.get("artifact_sha256")
        if of is not None and digest is not None and of != digest:
            why = "those shown are of another artifact"
            self.missing.append(Missing(f"{what} of the current artifact", why, command))


def read_run(folder: RunFolder) -> RunRecord:
    """Read a run folder that has at least config.json. Raises PgolfError if it has none.

    Other files may be missing or damaged; `RunRecord.missing` says which and why.
    """
    config, reader = folder.read_config(), _Reader(folder)
    lines = reader.lines()
    weights = reader.weights(f"pgolf train {config.name} --resume --out {reader.name}")
    table, digest = reader.artifact()
    commands = {"artifact": f"pgolf eval {reader.name}", "float": f"pgolf eval {reader.name} --weights float"}
    titles = {"artifact": "scores of the artifact", "float": "scores of the float weights"}
    scores = {
        which: reader.json(folder.scores_file(which), titles[which], command)
        for which, command in commands.items()
    }
    audit = reader.json(folder.audit_file, "audit", f"pgolf audit {reader.name}")
    reader.check_digest(scores["artifact"], digest, "scores", commands["artifact"])
    reader.check_digest(audit, digest, "audit", f"pgolf audit {reader.name}")
    sweep = folder.sweep_file
    return RunRecord(
        folder=folder,
        config=config,
        steps={row["step"]: row for row in lines["step"]},
        validations=lines["val"],
        resumes=lines["resume"],
        slot_rates=lines["slot_rates"],
        scores={which: tree for which, tree in scores.items() if tree},
        sweep=reader.json(sweep, "sweep", f"pgolf ttt-sweep {reader.name}") if sweep.is_file() else {},
        audit=audit,
        environment=reader.json(folder.path / "env.json", "environment", "written by training"),
        weights=weights,
        artifact=table,
        missing=tuple(reader.missing),
    )
