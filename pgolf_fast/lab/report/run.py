"""What a run folder says about its run, whatever state that is in."""

from __future__ import annotations

import json
import math
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
from pgolf_fast.lab.report.loss_curve import number
from pgolf_fast.lab.report.pace import tokens_of


@dataclass(frozen=True)
class Missing:
    """Something that a page would show, why it does not, and the command that makes it."""

    what: str
    why: str
    command: str


@dataclass(frozen=True)
class Run:
    """The files of a run folder, read; empty or None where there are none."""

    folder: RunFolder
    config: RunConfig
    steps: dict[int, dict[str, Any]]
    """Lines of metrics.jsonl by step; of a step that was taken again after an interruption, the last."""
    validations: list[dict[str, Any]]
    resumes: list[dict[str, Any]]
    slot_rates: list[dict[str, Any]]
    """Rates that MetaSGD has learned, by bank."""
    scores: dict[str, dict[str, Any]]
    """What `pgolf eval` wrote, by weights."""
    sweep: dict[str, Any]
    """What `pgolf ttt-sweep` wrote."""
    audit: dict[str, Any]
    """What `pgolf audit` wrote."""
    environment: dict[str, Any]
    weights: dict[str, Any]
    """What model.safetensors says about what it holds: step, weights."""
    artifact: ArtifactTable | None
    missing: tuple[Missing, ...]

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def trained(self) -> bool:
        """Whether training came to its end: final weights are there."""
        return self.folder.model_file.is_file()

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def seconds(self) -> float:
        """Of training, up to the last step; NaN if that is not known."""
        return number(self.steps[self.last_step].get("elapsed")) if self.steps else math.nan

    @property
    def tokens(self) -> int:
        """Learned from up to the last step."""
        batch = self.config.train.batch_tokens
        unrecorded = self.last_step - len(self.steps)
        return sum(tokens_of(row, batch) for row in self.steps.values()) + unrecorded * batch

    @property
    def broken(self) -> list[int]:
        """Steps whose loss is not finite."""
        return [s for s in sorted(self.steps) if not math.isfinite(number(self.steps[s].get("loss")))]

    @property
    def final_validation(self) -> dict[str, Any] | None:
        """That of the weights in model.safetensors: the average's, or the last step's after Reptile."""
        which = [self.weights.get(name, ...) for name in ("step", "weights")]
        rows = (row for row in self.validations if [row["step"], row.get("weights")] == which)
        return next(rows, None)

    def state(self) -> str:
        """How far it came, in a few words."""
        goal, bounded = self.config.train.steps, self.config.train.max_seconds
        aim = f"{goal:,}" + (f" or {console.duration(bounded)}" if bounded else "")
        if self.trained:
            return "trained to its end" if self.steps else "imported weights, not trained here"
        if self.steps:
            return f"interrupted, or still running: step {self.last_step:,} of {aim}"
        return "not trained yet: there is only its configuration"


def read_run(folder: RunFolder) -> Run:
    """The run in a folder that has at least a config.json. Raises PgolfError where there is none.

    Files that cannot be read are told apart from files that are not there, and are no error.
    """
    config, missing = folder.read_config(), list[Missing]()
    name = folder.path.resolve().name

    def kept(path: Path, what: str, command: str, *, wanted: bool = True) -> dict[str, Any]:
        if not path.is_file():
            if wanted:
                missing.append(Missing(what, f"there is no {path.name}", command))
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            missing.append(Missing(what, f"{path.name} is damaged: {error}", command))
            return {}
        return found if isinstance(found, dict) else {}

    lines = _metrics(folder)
    steps = {row["step"]: row for row in lines.get("step", [])}
    if not steps:
        missing.append(Missing("training log", "metrics.jsonl holds no step", "made by training"))
    weights, command = dict[str, Any](), f"pgolf train {config.name} --resume --out {name}"
    if not folder.model_file.is_file():
        missing.append(Missing("final weights", "training did not come to its end", command))
    else:
        try:
            weights = load_metadata(folder.model_file)
        except PgolfError as error:
            missing.append(Missing("final weights", portable(str(error)), command))
    table, digest = _artifact(folder, missing)
    scores = {
        "artifact": kept(folder.scores_file("artifact"), "scores of the artifact", f"pgolf eval {name}"),
        "float": kept(
            folder.scores_file("float"),
            "scores of the float weights",
            f"pgolf eval {name} --weights float",
        ),
    }
    audit = kept(folder.audit_file, "audit", f"pgolf audit {name}")
    for what, story in (("scores of the artifact", scores["artifact"]), ("audit", audit)):
        of = story.get("artifact_sha256")
        if of is not None and digest is not None and of != digest:
            command = f"pgolf {'eval' if story is scores['artifact'] else 'audit'} {name}"
            missing.append(Missing(f"{what} as it is now", "those shown are of another artifact", command))
    return Run(
        folder=folder,
        config=config,
        steps=steps,
        validations=lines.get("val", []),
        resumes=lines.get("resume", []),
        slot_rates=lines.get("slot_rates", []),
        scores={weights: story for weights, story in scores.items() if story},
        sweep=kept(folder.sweep_file, "sweep", f"pgolf ttt-sweep {name}", wanted=False),
        audit=audit,
        environment=kept(folder.path / "env.json", "environment", "made by training"),
        weights=weights,
        artifact=table,
        missing=tuple(missing),
    )


def _metrics(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl that belong to a step, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in folder.history():
        if isinstance(row.get("step"), int):
            found.setdefault(str(row.get("kind")), []).append(row)
    return found


def _artifact(folder: RunFolder, missing: list[Missing]) -> tuple[ArtifactTable | None, str | None]:
    name = folder.path.resolve().name
    if not folder.artifact_file.is_file():
        step = "quantize" if not folder.quantized_file.is_file() else "pack"
        missing.append(Missing("artifact", "the run is not packed", f"pgolf {step} {name}"))
        return None, None
    try:
        return artifact_table(folder.artifact_file, tried=()), sizes(folder.artifact_file).sha256
    except PgolfError as error:
        missing.append(Missing("artifact", portable(str(error)), f"pgolf pack {name}"))
        return None, None
