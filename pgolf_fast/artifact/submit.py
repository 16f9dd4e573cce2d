"""`pgolf submit`: a run as a folder for a pull request to the challenge's repository."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.pack import unpack
from pgolf_fast.artifact.submission import build_script
from pgolf_fast.config.fields import flatten, run_config_from_dict
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
# what the evaluation script knows
_ADAPTERS = ("sgd", "adamw", "lora")
_CODECS = ("raw", "lzma", "rans")
_PLAIN = "The script is one plain file."
_PACKED = (
    "The script unpacks itself;\nits source is `pgolf_fast/artifact/standalone`, and `pgolf submit "
    "--readable` writes it as one plain file."
)
# what says where a run was made and how it went on, not what it is
_UNTOLD = ("name", "data.path", "data.tokenizer", "pack.", "kernels.")


@dataclass(frozen=True)
class About:
    """What the run folder does not know: who submits it, under which title, to which track."""

    author: str
    github_id: str
    name: str | None
    blurb: str | None
    track: str


def write_submission(folder: RunFolder, out: Path, about: About, *, readable: bool = False) -> dict[str, int]:
    """Write README.md, submission.json, train.log, the artifact and the evaluation script into `out`.

    readable: write the script's readable source instead of the compressed one, and count that. Returns
    bytes by part. Raises PgolfError when the run is not packed or not scored, when its scores are those of
    another artifact or other settings, when they break the rules (nothing allows that here), when the script
    lacks the run's adapter or the artifact's codecs, or when code and artifact exceed LIMIT_BYTES.
    """
    artifact = folder.need(folder.artifact_file, "pack")
    log = folder.need(folder.log_file, "train PRESET --out")
    config = run_config_from_dict(unpack(artifact)[0])
    digest = sizes(artifact).sha256
    if config.ttt.illegal is not None:
        raise PgolfError(
            f"ttt.adapter {config.ttt.adapter} breaks the rules: {config.ttt.illegal}. "
            "There is no submission of it: set another ttt.adapter in config.json, pack and score again"
        )
    _need_script(config.ttt, {section.codec for section in sizes(artifact).sections})
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
    write_text(out / "README.md", _readme(facts, tokenizer, _PLAIN if readable else _PACKED))
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


def _need_script(ttt: TTTConfig, codecs: set[str]) -> None:
    """Raise PgolfError for what the script does not know."""
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
    """What `pgolf eval` wrote, if it is about this artifact under its own settings."""
    path = folder.need(folder.path / "scores_artifact.json", "eval")
    scores = read_scores(path)
    again = f"run `pgolf eval {folder.path}` again"
    if scores.get("artifact_sha256") != digest:
        raise PgolfError(f"{path} holds the scores of another artifact: {again}")
    for group in ("eval", "ttt"):
        if scores.get(group) != asdict(getattr(config, group)):
            raise PgolfError(
                f"{path} was computed with other {group} settings than the artifact holds, with which the "
                f"script scores: {again} without --{group} options, or change config.json and pack again"
            )
    return scores


def _environment(folder: RunFolder) -> dict[str, Any]:
    path = folder.path / "env.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _training(folder: RunFolder) -> dict[str, Any] | None:
    """Steps and seconds of the training; None for imported weights."""
    steps = [line for line in folder.history() if line["kind"] == "step"]
    return {"steps": steps[-1]["step"], "seconds": steps[-1]["elapsed"]} if steps else None


def _summary(facts: _Facts) -> dict[str, Any]:
    """submission.json: the community's fields first, then ours."""
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


_README = """# {name}

{blurb}

| score | bits per byte | nats per token | tokens |
|---|---|---|---|
{scores}

`val_bpb` of `submission.json` is the third. All three are of the same artifact; what test-time training gains
is the difference between the second and the third, nothing else.

| bytes | |
|---|---|
| `{script}` | {code:,} |
| `{artifact}` | {weights:,} |
| together | {total:,} of {limit:,} |

## Run it

```
python {script} --data FOLDER_OF_SHARDS --tokenizer TOKENIZER.model
```

It needs torch, numpy and sentencepiece, prints the byte sum (and fails if that is too large), checks the
artifact's SHA-256 (`{digest}`), rebuilds the
model and prints the three scores. On a CPU of the same kind they are those above to 1e-6; other hardware
rounds differently. `--dtype`, `--device` and `--artifact` do what they say. {form}

The tokenizer is not in this folder and not in the sum: it is the SentencePiece model that comes with the
validation shards ({vocab_size:,} pieces, SHA-256
`{tokenizer}`).

## How it was made

- Training: {training}, PyTorch {torch}, seed {seed}, one run; the log is `train.log`. The training program is
  pgolf_fast {version}, preset `{preset}`; the script here only evaluates.
- Changed from the preset: {changes}.
- Quantisation: {method}, {widths} bank weights, {tables} tables, the rest float16, stored by entropy coding.
  {calibration}
- Sliding windows of {seq_len:,} tokens, {stride} apart; each target is scored {how_often}.
- Test-time training: {adaptation}
- No score reads the token it predicts or a later one, and no key of a lookup holds it.
"""


def _readme(facts: _Facts, tokenizer: str, form: str) -> str:
    c, environment, training = facts.config, facts.environment, facts.training
    rows = [
        f"| {what} | {score['bpb']:.6f} | {score['loss']:.6f} | {score['tokens']:,} |"
        for score, what in ((facts.scores[name], what) for name, what in _SCORES.items())
    ]
    trained = "imported weights, quantised and scored"
    if training is not None:
        trained = f"{training['steps']:,} steps in {training['seconds']:,.0f} s"
    gptq = c.quant.method == "gptq"
    own_text = f"Calibration reads text that the model itself wrote (seed {c.quant.seed}), no data."
    return _README.format(
        name=facts.name,
        blurb=facts.blurb,
        scores="\n".join(rows),
        script=SCRIPT,
        code=facts.code,
        artifact=ARTIFACT,
        weights=facts.weights,
        total=facts.code + facts.weights,
        limit=LIMIT_BYTES,
        digest=facts.digest,
        form=form,
        vocab_size=c.model.vocab_size,
        tokenizer=tokenizer,
        training=f"{trained} on {facts.hardware}",
        torch=environment.get("torch", "of unknown version"),
        seed=c.train.seed,
        version=environment.get("pgolf_fast", ""),
        preset=c.name,
        changes=", ".join(_changes(c)) or "nothing",
        method="GPTQ" if gptq else "rounding to nearest",
        widths=_widths(c.quant),
        tables=c.quant.tables,
        calibration=own_text if gptq else "There is no calibration.",
        seq_len=c.eval_seq_len,
        stride=c.eval.stride,
        how_often="once, the last ones repeatedly" if c.eval.repeat_tail else "once",
        adaptation=_adaptation(c.ttt),
    )


def _widths(quant: QuantConfig) -> str:
    """What integers bank weights are stored as."""
    return "int2 to int8 (a rate-distortion grid)" if quant.grid == "rd" else f"int{quant.bits}"


def _adaptation(ttt: TTTConfig) -> str:
    """What test-time training does, in a sentence or two."""
    if ttt.by_document:
        lora = ttt.lora
        return (
            f"{lora.epochs} AdamW steps (learning rate {lora.lr}) on each segment of {lora.segment_tokens:,} "
            f"tokens\n  of a document after the segment was scored, never after its last. They learn "
            f"a\n  change of rank {lora.rank} of every matrix, with which each document starts at zero."
        )
    if ttt.epochs == 0:
        return "none; the third score is of the model as it stands."
    adapted = {
        "banks": "the banks",
        "all": "all but the first blocks' own scalars",
        "blocks": f"matrices and scalars of all blocks but the first {ttt.freeze_blocks}",
        "mlps": f"the MLP matrices of all blocks but the first {ttt.freeze_blocks}",
    }[ttt.parameters]
    rule = "SGD" if ttt.adapter == "sgd" else "AdamW"
    fall = " falling to 0" if ttt.decay == "cosine" else ""
    return (
        f"{ttt.epochs} epochs of {rule} over each chunk of {ttt.chunk_tokens:,} tokens after the chunk was\n"
        f"  scored, never after the last; it adapts {adapted}, with a learning rate of {ttt.lr}{fall}."
    )


def _changes(config: RunConfig) -> list[str]:
    """Fields in which the run differs from the preset it is named after."""
    try:
        before = dict(flatten(preset(config.name)))
    except PgolfError:
        return ["everything: it has a name of its own"]
    return [
        f"`{name} {value}`"
        for name, value in flatten(config)
        if before.get(name, ...) != value and not name.startswith(_UNTOLD)
    ]
