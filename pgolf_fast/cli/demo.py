"""`pgolf demo`: the whole pipeline on text this machine already has, ending in one table."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from pgolf_fast import console
from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.console import Table, duration, logger
from pgolf_fast.data.corpus import build_corpus
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.run import score_run
from pgolf_fast.io import read_json
from pgolf_fast.lab.report.plots import draw_loss_curve
from pgolf_fast.train.loop import train


def demo_config(seconds: float, seed: int) -> RunConfig:
    """Return preset `tiny` with a training time."""
    clock = {"train__schedule": "time", "train__max_seconds": seconds, "train__steps": 10**6}
    return replace(preset("tiny", train__seed=seed, train__checkpoint_minutes=None, **clock), name="demo")


def run_demo(out: Path, *, seconds: float, seed: int) -> str:
    """Train, quantize, pack and score into the run folder `out`. Return the final tables as text."""
    start = time.perf_counter()
    _clear(out)
    logger.info("building the corpus from documentation on this machine (cached after the first time)")
    corpus = read_json(build_corpus(vocab_size=1024) / "info.json")
    trained = train(demo_config(seconds, seed), out)
    folder = trained.folder
    console.setup_logging(folder.log_file)
    quantize_run(folder)
    packed = pack_run(folder)
    scores = score_run(folder, folder.read_config(), "artifact")
    curve = draw_loss_curve(folder)
    console.close_logging()
    training = {
        "tokens seen": f"{trained.tokens:,}",
        "tokens/s": f"{trained.tokens / trained.seconds:,.0f}",
        "corpus floor, unigram bpb": f"{corpus['unigram_bpb']:.4f}",
        "corpus floor, bigram bpb": f"{corpus['bigram_bpb']:.4f}",
        "float weights, bpb": f"{trained.raw.bpb:.4f}",
        "EMA and SWA weights, bpb": f"{trained.averaged.bpb:.4f}",
        "int6 artifact, bpb": f"{scores.plain.bpb:.4f}",
    }
    files = {
        "run folder": folder.path,
        "artifact": folder.artifact_file,
        "loss curve": curve or "needs matplotlib",
        "time": f"{duration(time.perf_counter() - start)} in total",
    }
    both = scores.table("score of the artifact"), packed.table("artifact")
    tables = Table(None, training.items()), *both, Table(None, files.items())
    return "\n\n".join(["", *map(str, tables)])


def _clear(out: Path) -> None:
    """Remove an earlier demo. Raises PgolfError for any other folder."""
    if not out.exists():
        return
    folder = RunFolder(out)
    files = {entry.name for entry in out.iterdir()} - {folder.log_file.name, ".lock"}
    if files and (not folder.config_file.is_file() or folder.read_config().name != "demo"):
        raise PgolfError(f"{out} is not an earlier demo: choose another --out")
    with folder.lock():  # another demo may be training there
        shutil.rmtree(out)
