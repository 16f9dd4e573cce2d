"""One run of an ablation in its folder: train, quantize, pack, score; each stage is done once.

job.json describes the run before it starts; result.json is written last and atomically. Everything in between
is an ordinary run folder, from which an interrupted run resumes.
"""

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.fields import flatten, run_config_from_dict, run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder, stale
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.shards import find_shards, open_shard, side_file
from pgolf_fast.data.source import Source
from pgolf_fast.distributed import this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.run import open_run, score_run
from pgolf_fast.evaluation.score import Scorer
from pgolf_fast.evaluation.scores import Evaluator
from pgolf_fast.io import read_json, well_formed, write_json
from pgolf_fast.lab.audit.watch import by_target
from pgolf_fast.lab.compare.plan import Job
from pgolf_fast.train.loop import train

Scores = Literal["plain", "sliding", "all"]
PASSES: dict[Scores, tuple[str, ...]] = {
    "plain": ("non_overlapping",),
    "sliding": ("non_overlapping", "sliding"),
    "all": ("non_overlapping", "sliding", "sliding_ttt"),
}
JOB, RESULT, DOCUMENTS = "job.json", "result.json", "documents.json"
_ENDS = 2**20  # bytes at either end of a shard that go into its fingerprint: whole shards take minutes


def fingerprint(source: Source) -> str:
    """Return a digest of tokenizer and shards: names, sizes, and the first and last MiB of each shard."""
    digest = hashlib.sha256(source.tokenizer.path.read_bytes())
    validation = find_shards(source.folder, "val")
    sides = [open_shard(path) for shard in validation if (path := side_file(shard.path)).is_file()]
    for shard in [*source.train_shards(), *validation, *sides]:
        digest.update(f"{shard.path.name} {shard.num_tokens}".encode())
        with open(shard.path, "rb") as handle:
            digest.update(handle.read(_ENDS))
            handle.seek(max(0, shard.path.stat().st_size - _ENDS))
            digest.update(handle.read())
    return digest.hexdigest()


def prepare(job: Job, data: str, scores: Scores) -> bool:
    """Write job.json and return whether something is left to do.

    `data` is the `fingerprint` of its data. Raises PgolfError if the folder holds another run.
    """
    asked = {"budget": job.budget, "variant": job.variant, "seed": job.seed, "data": data}
    asked["config"] = run_config_to_dict(job.config)
    asked = json.loads(json.dumps(asked))  # turns tuples into lists, as they will be read back
    known = _read(job.path / JOB)
    if known is None and job.path.is_dir() and any(job.path.iterdir()):
        raise PgolfError(f"{job.path} holds something other than this run: choose another --out")
    if known is not None:
        _check_same(job, known, asked)
    with well_formed(job.path / RESULT):
        if (done := finished(job)) is not None and set(PASSES[scores]) <= set(done["scores"]):
            return False
    write_json(job.path / JOB, {**asked, "scores": scores})
    return True


def _check_same(job: Job, known: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise PgolfError naming every field in which two contents of job.json differ."""
    with well_formed(job.path / JOB):
        before, now = (dict(flatten(run_config_from_dict(content["config"]))) for content in (known, asked))
        for name in ("budget", "variant", "seed", "data"):
            before[name], now[name] = known[name], asked[name]
    changed = [
        "other tokens" if name == "data" else f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        text = f"{job.path} holds a run with other settings: {'; '.join(changed)}"
        raise PgolfError(f"{text}. Choose another --out, or repeat the settings it was made with")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path) if path.is_file() else None
    except PgolfError as error:
        raise PgolfError(f"{error}; remove its folder to run it again") from error


def finished(job: Job) -> dict[str, Any] | None:
    """Return the result of a run, or None if it has none or its artifact is not the one that was scored.

    The artifact may have been deleted to save space. If it was retired, a new one was made and the result is
    out of date.
    """
    result, artifact = _read(job.path / RESULT), RunFolder(job.path).artifact_file
    if result is None:
        return None
    if not artifact.is_file():
        return None if stale(artifact).is_file() else result
    return result if sizes(artifact).sha256 == result["artifact_sha256"] else None


def documents(path: Path) -> dict[str, np.ndarray]:
    """Read `text_bytes` and the nats of each score of a finished run, all per document (documents,)."""
    with well_formed(path / DOCUMENTS):
        return {name: np.array(v, dtype=np.float64) for name, v in read_json(path / DOCUMENTS).items()}


def run_job(path: Path) -> None:
    """Run the remaining stages of the job in this folder. Raises PgolfError as its stages do."""
    job = _read(path / JOB)
    assert job is not None, f"{path} was not prepared"
    folder = RunFolder(path)
    if not folder.model_file.is_file():
        train(run_config_from_dict(job["config"]), path, resume=True)
    config = folder.read_config()
    console.setup_logging(folder.log_file)
    try:
        if not folder.quantized_file.is_file():
            quantize_run(folder, config.quant)
        if not folder.artifact_file.is_file():
            pack_run(folder, config.pack)
        _write(folder, job, config, _score(folder, config, job["scores"]))
    finally:
        console.close_logging()


def _score(folder: RunFolder, config: RunConfig, scores: Scores) -> dict[str, Scorer]:
    """Score the artifact; return scorers by the names in PASSES."""
    if scores == "all":
        return score_run(folder, config, "artifact").scorers
    loaded, stream = open_run(folder, config, "artifact", this_process().device)
    evaluator = Evaluator(loaded.model, stream, config)
    windows = {"non_overlapping": evaluator.plain_windows(), "sliding": evaluator.sliding_windows()}
    return {name: evaluator.frozen(windows[name], name).scorer for name in PASSES[scores]}


def _write(folder: RunFolder, job: dict[str, Any], config: RunConfig, scorers: dict[str, Scorer]) -> None:
    stream = scorers["non_overlapping"].stream
    starts = document_starts(stream.tokens.cpu().numpy())
    nats = {name: by_target(scorer).astype(np.float64) for name, scorer in scorers.items()}
    every = {"text_bytes": stream.target_bytes, **nats}
    sums = {name: np.add.reduceat(values, starts).tolist() for name, values in every.items()}
    write_json(folder.path / DOCUMENTS, sums, indent=None)
    rows = folder.history()
    steps = {row["step"]: row["elapsed"] for row in rows if row["kind"] == "step"}
    times = step_times(rows)
    result = {name: job[name] for name in ("budget", "variant", "seed")}
    result |= {"parameters": config.model.num_parameters(), "steps": max(steps)}
    result["training_seconds"] = steps[max(steps)]
    result["ms_per_step"] = 1e3 * statistics.median(times) if times else None
    result["ms_per_step_mean"] = 1e3 * statistics.fmean(times) if times else None
    result["artifact_bytes"] = folder.artifact_file.stat().st_size
    result["artifact_sha256"] = sizes(folder.artifact_file).sha256
    result["scores"] = {name: one.sums(0, len(one.windows)).to_dict() for name, one in scorers.items()}
    write_json(folder.path / RESULT, {**result, "config": run_config_to_dict(config), **provenance()})


def step_times(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the seconds of every training step but the first, from a run's `history`."""
    clock = {row["step"]: row["elapsed"] for row in rows if row["kind"] == "step"}
    return [clock[step] - clock[step - 1] for step in sorted(clock) if step - 1 in clock]
