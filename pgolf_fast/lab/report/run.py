"""Contents of a run folder, in whatever state the run is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_metadata
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


def read_run(folder: RunFolder) -> RunRecord:
    """Read a run folder that has at least config.json. Raises PgolfError if it has none.

    Other files may be missing or damaged; `RunRecord.missing` says which and why.
    """
    config, name = folder.read_config(), folder.path.resolve().name
    missing: list[Missing] = []
    lines = _metrics(folder)
    if not lines["step"]:
        missing.append(Missing("training log", "metrics.jsonl has no steps", "written by training"))

    def read(path: Path, what: str, command: str, load: Callable[[Path], Any] = _json, why: str = "") -> Any:
        """Load a file; if it is missing or damaged, record that and return {}."""
        if path.is_file():
            try:
                return load(path)
            except PgolfError as error:
                why = portable(str(error))
            except ValueError as error:  # not JSON, or not text
                why = f"{path.name} is damaged: {error}"
        missing.append(Missing(what, why or f"there is no {path.name}", command))
        return {}

    train = f"pgolf train {config.name} --resume --out {name}"
    score, audit = f"pgolf eval {name}", f"pgolf audit {name}"
    weights = read(folder.model_file, "final weights", train, load_metadata, "training did not finish")
    pack = f"pgolf {'pack' if folder.quantized_file.is_file() else 'quantize'} {name}"
    artifact = read(folder.artifact_file, "artifact", pack, _artifact, "the run is not packed")
    scores = {
        "artifact": read(folder.scores_file("artifact"), "scores of the artifact", score),
        "float": read(folder.scores_file("float"), "scores of the float weights", f"{score} --weights float"),
    }
    findings = read(folder.audit_file, "audit", audit)
    for what, tree, command in (("scores", scores["artifact"], score), ("audit", findings, audit)):
        if artifact and tree.get("artifact_sha256") not in (None, artifact["sha256"]):
            why = "those shown are of another artifact"
            missing.append(Missing(f"{what} of the current artifact", why, command))
    sweep = {}
    if folder.sweep_file.is_file():  # optional, so not missing
        sweep = read(folder.sweep_file, "sweep", f"pgolf ttt-sweep {name}")
    return RunRecord(
        folder=folder,
        config=config,
        steps={row["step"]: row for row in lines["step"]},
        validations=lines["val"],
        resumes=lines["resume"],
        slot_rates=lines["slot_rates"],
        scores={which: tree for which, tree in scores.items() if tree},
        sweep=sweep,
        audit=findings,
        environment=read(folder.path / "env.json", "environment", "written by training"),
        weights=weights,
        artifact=artifact.get("table"),
        missing=tuple(missing),
    )


def _json(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, dict) else {}


def _artifact(path: Path) -> dict[str, Any]:
    return {"table": artifact_table(path, tried=()), "sha256": sizes(path).sha256}


def _metrics(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Read the lines of metrics.jsonl that belong to a step, by kind."""
    lines = defaultdict(list)
    for row in folder.history():
        if isinstance(row.get("step"), int):
            lines[str(row.get("kind"))].append(row)
    return lines
