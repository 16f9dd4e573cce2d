"""`pgolf demo`: the whole pipeline on text this machine already has, ending in one table."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

from pgolf_fast import console
from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.config.presets import tiny
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.corpus import build_corpus
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.run import score_run
from pgolf_fast.evaluation.scores import ThreeScores
from pgolf_fast.lab.report.loss_curve import draw_loss_curve
from pgolf_fast.train.loop import TrainResult, train


def demo_config(seconds: float, seed: int) -> RunConfig:
    """Return preset `tiny` with a training time."""
    base = tiny()
    return replace(
        base,
        name="demo",
        train=replace(
            base.train, seed=seed, steps=10**6, max_seconds=seconds, schedule="time", checkpoint_minutes=None
        ),
    )


def run_demo(out: Path, *, seconds: float, seed: int) -> str:
    """Train, quantize, pack and score into the run folder `out`. Return the final tables as text."""
    start = time.perf_counter()
    _clear(out)
    console.setup_logging()
    console.logger.info(
        "building the corpus from documentation on this machine (cached after the first time)"
    )
    corpus = build_corpus(vocab_size=1024)
    config = demo_config(seconds, seed)
    trained = train(config, out)
    folder = trained.folder
    config = folder.read_config()
    console.setup_logging(folder.log_file)
    quantize_run(folder, config.quant)
    packed = pack_run(folder, config.pack)
    scores = score_run(folder, config, "artifact")
    curve = draw_loss_curve(folder)
    console.close_logging()
    facts = json.loads((corpus / "info.json").read_text(encoding="utf-8"))
    took = time.perf_counter() - start
    parts = [
        console.table(_training_rows(trained, scores, facts)),
        scores.table("score of the artifact").text(),
        packed.table("artifact").text(),
        f"run folder  {folder.path}\nartifact    {folder.artifact_file}\n"
        f"loss curve  {curve or 'needs matplotlib'}\ntime        {console.duration(took)} in total",
    ]
    return "\n\n".join(["", *parts])


def _clear(out: Path) -> None:
    """Remove an earlier demo. Raises PgolfError for any other folder."""
    if not out.exists():
        return
    folder = RunFolder(out)
    files = {entry.name for entry in out.iterdir()} - {folder.log_file.name}
    if files and (not folder.config_file.is_file() or folder.read_config().name != "demo"):
        raise PgolfError(f"{out} is not an earlier demo: choose another --out")
    shutil.rmtree(out)


def _training_rows(trained: TrainResult, scores: ThreeScores, facts: dict) -> list[tuple[str, str]]:
    return [
        ("tokens seen", f"{trained.tokens:,}"),
        ("tokens/s", f"{trained.tokens / trained.seconds:,.0f}"),
        ("corpus floor, unigram bpb", f"{facts['unigram_bpb']:.4f}"),
        ("corpus floor, bigram bpb", f"{facts['bigram_bpb']:.4f}"),
        ("float weights, bpb", f"{trained.raw.bpb:.4f}"),
        ("EMA and SWA weights, bpb", f"{trained.averaged.bpb:.4f}"),
        ("int6 artifact, bpb", f"{scores.plain.bpb:.4f}"),
    ]
