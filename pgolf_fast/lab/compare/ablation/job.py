"""One run of an ablation, in its folder: train, quantise, pack, score; each stage is done once.

job.json says what the run is, before it starts; result.json is written last, and whole. What stands in
between is that of an ordinary run folder, and an interrupted run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.steps import artifact_model, pack_run, quantize_run
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.fields import flatten, run_config_from_dict, run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder, stale
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.shards import find_shards
from pgolf_fast.data.source import Source
from pgolf_fast.distributed import this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.evaluator import Evaluator
from pgolf_fast.evaluation.score import Scorer, Stream
from pgolf_fast.evaluation.steps import score_run, validation_stream
from pgolf_fast.io import write_text
from pgolf_fast.lab.compare.ablation.plan import Job
from pgolf_fast.train.loop import train

Scores = Literal["plain", "sliding", "all"]
PASSES: dict[Scores, tuple[str, ...]] = {
    "plain": ("non_overlapping",),
    "sliding": ("non_overlapping", "sliding"),
    "all": ("non_overlapping", "sliding", "sliding_ttt"),
}
JOB, RESULT, DOCUMENTS = "job.json", "result.json", "documents.json"
_ENDS = 2**20  # bytes of a shard, at its beginning and its end, that stand for all of it


def fingerprint(source: Source) -> str:
    """A digest of tokenizer and shards: names, sizes, and the first and last MiB of each shard."""
    digest = hashlib.sha256(source.tokenizer.path.read_bytes())
    for shard in [*source.train_shards(), *find_shards(source.folder, "val")]:
        digest.update(f"{shard.path.name} {shard.num_tokens}".encode())
        with open(shard.path, "rb") as handle:
            digest.update(handle.read(_ENDS))
            handle.seek(max(0, shard.path.stat().st_size - _ENDS))
            digest.update(handle.read())
    return digest.hexdigest()


def prepare(job: Job, data: str, scores: Scores) -> bool:
    """Make the job's folder say what it is; whether something is left to do.

    `data` is the `fingerprint` of its data. Raises PgolfError where the folder holds another run.
    """
    told = {
        "budget": job.budget,
        "variant": job.variant,
        "seed": job.seed,
        "data": data,
        "config": run_config_to_dict(job.config),
    }
    told = json.loads(json.dumps(told))  # tuples as they will be read back
    known = _read(job.path / JOB)
    if known is None and job.path.is_dir() and any(job.path.iterdir()):
        raise PgolfError(f"{job.path} holds something else than this run: choose another --out")
    if known is not None:
        _check_same(job, known, told)
    if (done := finished(job)) is not None and set(PASSES[scores]) <= set(done["scores"]):
        return False
    write_text(job.path / JOB, json.dumps({**told, "scores": scores}, indent=2) + "\n")
    return True


def _check_same(job: Job, known: dict[str, Any], told: dict[str, Any]) -> None:
    """As configurations, not as JSON: what an earlier version wrote lacks the fields that came later."""
    before, now = (
        {
            **{name: story[name] for name in ("budget", "variant", "seed", "data")},
            **dict(flatten(run_config_from_dict(story["config"]))),
        }
        for story in (known, told)
    )
    changed = [
        "other tokens" if name == "data" else f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise PgolfError(
            f"{job.path} holds a run with other settings: {'; '.join(changed)}. Choose another --out, or "
            "give the settings it was made with"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PgolfError(f"{path} is damaged ({error}): remove its folder to run it again") from error


def finished(job: Job) -> dict[str, Any] | None:
    """The result of a run; None while it has none, or where its artifact is not the one that was scored.

    An artifact may be deleted to save space. One that was retired was replaced, and so is its result.
    """
    result, artifact = _read(job.path / RESULT), RunFolder(job.path).artifact_file
    if result is None:
        return None
    if not artifact.is_file():
        return None if stale(artifact).is_file() else result
    return result if sizes(artifact).sha256 == result["artifact_sha256"] else None


def documents(path: Path) -> dict[str, np.ndarray]:
    """Of a finished run, by document (documents,): `text_bytes`, and the nats of each of its scores."""
    story = json.loads((path / DOCUMENTS).read_text(encoding="utf-8"))
    return {"text_bytes": np.array(story["text_bytes"])} | {
        name: np.array(nats) for name, nats in story["nats"].items()
    }


def run_job(path: Path) -> None:
    """Do what is left of the job in this folder. Raises PgolfError as its stages do."""
    story = _read(path / JOB)
    assert story is not None, f"{path} was not prepared"
    folder = RunFolder(path)
    if not folder.model_file.is_file():
        train(run_config_from_dict(story["config"]), path, resume=True)
    config = folder.read_config()
    console.setup_logging(folder.log_file)
    try:
        if not folder.quantized_file.is_file():
            quantize_run(folder, config.quant)
        if not folder.artifact_file.is_file():
            pack_run(folder, config.pack)
        scorers = _score(folder, config, story["scores"])
        _write(path, story, folder, config, scorers)
    finally:
        console.close_logging()


def _score(folder: RunFolder, config: RunConfig, scores: Scores) -> dict[str, Scorer]:
    """The losses of the artifact, by the names in PASSES."""
    if scores == "all":
        return score_run(folder, config, "artifact").scorers
    world = this_process()
    model = artifact_model(folder, config, world)
    evaluator = Evaluator(model, validation_stream(folder, config, world.device), config)
    windows = {"non_overlapping": evaluator.plain_windows()}
    if scores == "sliding":
        windows["sliding"] = evaluator.sliding_windows()
    return {name: evaluator.frozen(part, name).scorer for name, part in windows.items()}


def _write(
    path: Path, story: dict[str, Any], folder: RunFolder, config: RunConfig, scorers: dict[str, Scorer]
) -> None:
    """documents.json, and then result.json."""
    stream: Stream = scorers["non_overlapping"].stream
    starts = document_starts(stream.tokens.cpu().numpy())
    nats = {
        name: np.add.reduceat(scorer.by_target().astype(np.float64), starts).tolist()
        for name, scorer in scorers.items()
    }
    text_bytes = np.add.reduceat(stream.target_bytes, starts).tolist()
    write_text(path / DOCUMENTS, json.dumps({"text_bytes": text_bytes, "nats": nats}) + "\n")
    rows = folder.history()
    steps = {row["step"]: row["elapsed"] for row in rows if row["kind"] == "step"}
    times, tree = step_times(rows), run_config_to_dict(config)
    result = {
        **{name: story[name] for name in ("budget", "variant", "seed")},
        "parameters": config.model.num_parameters(),
        "steps": max(steps),
        "training_seconds": steps[max(steps)],
        "ms_per_step": 1e3 * statistics.median(times) if times else None,
        "ms_per_step_mean": 1e3 * statistics.fmean(times) if times else None,
        "artifact_bytes": folder.artifact_file.stat().st_size,
        "artifact_sha256": sizes(folder.artifact_file).sha256,
        "scores": {name: scorer.sums(0, len(scorer.windows)).to_dict() for name, scorer in scorers.items()},
        "config": tree,
        **provenance(),
    }
    write_text(path / RESULT, json.dumps(result, indent=2) + "\n")


def step_times(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of every training step but the first, from a run's `history`."""
    clock = {row["step"]: row["elapsed"] for row in rows if row["kind"] == "step"}
    return [clock[step] - clock[step - 1] for step in sorted(clock) if step - 1 in clock]
