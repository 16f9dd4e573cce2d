"""Write a run as a submission folder for the challenge's repository (`pgolf submit`)."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.load import unpack
from pgolf_fast.artifact.submission import build_script
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import RunFolder, read_scores
from pgolf_fast.config.schema import QuantConfig, RunConfig, TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path, write_text

LIMIT_BYTES = 16_000_000
SCRIPT, ARTIFACT = "train_gpt.py", "model.pgolf"
_SCORES = {
    "non_overlapping": "non-overlapping windows",
    "sliding": "sliding windows",
    "sliding_ttt": "sliding windows, legal test-time training",
}
_ADAPTERS = ("sgd", "adamw", "lora")  # what the evaluation script supports
_CODECS = ("raw", "lzma", "rans")
# Fields that say where a run was made and how it was exported, not what it is.
_NOT_SHOWN = ("name", "data.path", "data.tokenizer", "pack.", "kernels.")


@dataclass(frozen=True)
class About:
    """Facts that are not in the run folder: author, title, track."""

    author: str
    github_id: str
    name: str | None
    blurb: str | None
    track: str


def write_submission(folder: RunFolder, out: Path, about: About, *, readable: bool = False) -> dict[str, int]:
    """Write README.md, submission.json, train.log, the artifact and the evaluation script into `out`.

    readable: write the script as readable source instead of compressed, and count that. Returns bytes by
    part. Raises PgolfError when the run is not packed or not scored, its scores are of another artifact or
    other settings, it breaks the rules, the script lacks its adapter or codecs, or code and artifact exceed
    LIMIT_BYTES.
    """
    artifact = folder.need(folder.artifact_file, "pack")
    log = folder.need(folder.log_file, "train PRESET --out")
    config, container = unpack(artifact)[0], sizes(artifact)
    digest = container.sha256
    if config.ttt.illegal is not None:
        raise PgolfError(
            f"ttt.adapter {config.ttt.adapter} breaks the rules: {config.ttt.illegal}. "
            "It cannot be submitted: set another ttt.adapter in config.json, pack and score again"
        )
    _check_script(config.ttt, {section.codec for section in container.sections})
    scores = _scores(folder, config, digest)
    forms = build_script(digest)
    script = forms.readable if readable else forms.wrapped
    code, weights = len(script.encode()), artifact.stat().st_size
    if code + weights > LIMIT_BYTES:
        raise PgolfError(
            f"code {code:,} + artifact {weights:,} = {code + weights:,} bytes > {LIMIT_BYTES:,} bytes: "
            f"pack the run again with pack.limit_bytes {LIMIT_BYTES} and pack.code_bytes {code}"
        )
    facts = _Facts(about, config, scores, digest, code, weights, _environment(folder), _training(folder))
    tokenizer = hashlib.sha256(folder.tokenizer_file.read_bytes()).hexdigest()
    write_text(out / SCRIPT, script)
    write_text(out / "README.md", _readme(facts, tokenizer, readable))
    write_text(out / "submission.json", json.dumps(_summary(facts), indent=2) + "\n")
    for source, name in ((artifact, ARTIFACT), (log, "train.log")):
        with atomic_path(out / name) as temporary:
            shutil.copyfile(source, temporary)
    return {
        "script, readable": len(forms.readable.encode()),
        "script, minified": len(forms.minified.encode()),
        "script, compressed": len(forms.wrapped.encode()),
        "code": code,
        "+ artifact": weights,
        "= total": code + weights,
        "limit": LIMIT_BYTES,
    }


def _check_script(ttt: TTTConfig, codecs: set[str]) -> None:
    """Raise PgolfError for an adapter or codec that the script lacks."""
    if ttt.adapter not in _ADAPTERS:
        raise PgolfError(
            f"the evaluation script has no ttt.adapter {ttt.adapter}, only {', '.join(_ADAPTERS)}: set one "
            "of these in config.json, pack and score again"
        )
    if unknown := sorted(codecs.difference(_CODECS)):
        raise PgolfError(
            f"the evaluation script cannot read {' and '.join(unknown)}, only {', '.join(_CODECS)}: pack "
            "again with --pack.codecs rans lzma, and score again"
        )


@dataclass(frozen=True)
class _Facts:
    about: About
    config: RunConfig
    scores: dict[str, Any]
    digest: str
    code: int
    weights: int
    environment: dict[str, Any]
    training: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.about.name or self.config.name

    @property
    def hardware(self) -> str:
        e = self.environment
        return str(e.get("gpu") or f"{e.get('processor') or 'CPU'}, {e.get('cpu_threads')} threads")

    @property
    def blurb(self) -> str:
        m, q = self.config.model, self.config.quant
        return self.about.blurb or (
            f"{m.num_layers} layers x {m.model_dim}, {m.num_parameters():,} parameters, {m.mlp_activation} "
            f"MLP; {_widths(q)} weights ({q.method}) and {q.tables} tables, entropy coded; scored with legal "
            "test-time training."
        )


def _scores(folder: RunFolder, config: RunConfig, digest: str) -> dict[str, Any]:
    """Read the scores. Raises PgolfError if they are of another artifact or other settings."""
    path = folder.need(folder.path / "scores_artifact.json", "eval")
    scores = read_scores(path)
    again = f"run `pgolf eval {folder.path}` again"
    if scores.get("artifact_sha256") != digest:
        raise PgolfError(f"{path} holds the scores of another artifact: {again}")
    for group in ("eval", "ttt"):
        if scores.get(group) != asdict(getattr(config, group)):
            raise PgolfError(
                f"{path} was computed with other {group} settings than those in the artifact, which the "
                f"script uses: {again} without --{group} options, or change config.json and pack again"
            )
    return scores


def _environment(folder: RunFolder) -> dict[str, Any]:
    path = folder.path / "env.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _training(folder: RunFolder) -> dict[str, Any] | None:
    """Return steps and seconds of training; None for imported weights."""
    steps = [line for line in folder.history() if line["kind"] == "step"]
    return {"steps": steps[-1]["step"], "seconds": steps[-1]["elapsed"]} if steps else None


def _summary(facts: _Facts) -> dict[str, Any]:
    """Return the contents of submission.json: the community's fields first, then ours."""
    about, best = facts.about, facts.scores["sliding_ttt"]
    return {
        "author": about.author,
        "github_id": about.github_id,
        "name": facts.name,
        "blurb": facts.blurb,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "track": about.track,
        "val_loss": best["loss"],
        "val_bpb": best["bpb"],
        "bytes_total": facts.code + facts.weights,
        "bytes_code": facts.code,
        "bytes_model": facts.weights,
        "hardware": facts.hardware,
        "seed": facts.config.train.seed,
        "step_stop": facts.training and facts.training["steps"],
        "wallclock_seconds": facts.training and round(facts.training["seconds"], 1),
        "scores": {name: facts.scores[name] for name in _SCORES},
        "artifact_sha256": facts.digest,
    }


def _readme(facts: _Facts, tokenizer: str, readable: bool) -> str:
    source = resources.files("pgolf_fast.artifact").joinpath("submission.md.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    return template.render(
        name=facts.name,
        blurb=facts.blurb,
        scores=[(label, facts.scores[name]) for name, label in _SCORES.items()],
        script=SCRIPT,
        code=facts.code,
        artifact=ARTIFACT,
        weights=facts.weights,
        limit=LIMIT_BYTES,
        digest=facts.digest,
        readable=readable,
        tokenizer=tokenizer,
        training=facts.training,
        hardware=facts.hardware,
        environment={"torch": None, "pgolf_fast": None, **facts.environment},
        config=facts.config,
        changes=_changes(facts.config),
        widths=_widths(facts.config.quant),
        adaptation=_adaptation(facts.config.ttt),
    )


def _widths(quant: QuantConfig) -> str:
    """Name the integer type of bank weights."""
    return "int2 to int8 (a rate-distortion grid)" if quant.grid == "rd" else f"int{quant.bits}"


def _adaptation(ttt: TTTConfig) -> str:
    """Describe test-time training in a sentence or two."""
    if ttt.by_document:
        lora = ttt.lora
        return (
            f"{lora.epochs} AdamW steps (learning rate {lora.lr}) on each segment of {lora.segment_tokens:,} "
            "tokens of a document, after that segment was scored and never after the last one. They train a "
            f"rank-{lora.rank} change of every matrix, which is reset to zero for each document."
        )
    if ttt.epochs == 0:
        return "none; the third score is that of the unchanged model."
    adapted = {
        "banks": "the banks",
        "all": "all parameters but the scalars of the first blocks",
        "blocks": f"matrices and scalars of all blocks but the first {ttt.freeze_blocks}",
        "mlps": f"the MLP matrices of all blocks but the first {ttt.freeze_blocks}",
    }[ttt.parameters]
    rule = "SGD" if ttt.adapter == "sgd" else "AdamW"
    fall = ", decayed to 0" if ttt.decay == "cosine" else ""
    return (
        f"{ttt.epochs} epochs of {rule} over each chunk of {ttt.chunk_tokens:,} tokens, after that chunk was "
        f"scored and never after the last one. It adapts {adapted}, with learning rate {ttt.lr}{fall}."
    )


def _changes(config: RunConfig) -> list[str]:
    """List the fields in which the run differs from its preset."""
    try:
        before = dict(flatten(preset(config.name)))
    except PgolfError:
        return ["not comparable: no preset has this name"]
    return [
        f"`{name} {value}`"
        for name, value in flatten(config)
        if before.get(name, ...) != value and not name.startswith(_NOT_SHOWN)
    ]
