"""Adapters compared on one model: what each gains over sliding windows without test-time training."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.pack import unpack
from pgolf_fast.artifact.steps import artifact_model
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.console import Table
from pgolf_fast.distributed import SINGLE, World, this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.registry import need_legal
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.evaluator import Evaluator, Pass
from pgolf_fast.evaluation.resume import identity
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import mark
from pgolf_fast.evaluation.steps import validation_stream
from pgolf_fast.io import write_text
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.state import bank_grids

BASELINE = "sliding"
RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """One adapter's pass over the stream; `nats` are summed over each document."""

    name: str
    identity: str
    nats: list[float]
    seconds: float
    updates: int
    trainable: int


@dataclass(frozen=True)
class Comparison:
    """One adapter beside the baseline: bits per byte, and a 95 % interval of what is gained of them."""

    name: str
    bpb: float
    gain: float
    low: float
    high: float
    microseconds_a_token: float
    updates: int
    trainable: int


def bootstrap_gain(
    before: np.ndarray, after: np.ndarray, text_bytes: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """Bits per byte gained from `before` to `after`, and the 2.5 % and 97.5 % points of the paired bootstrap.

    All three are sums by document (documents,), in nats and bytes. Documents are drawn with replacement
    RESAMPLES times (Efron 1979). What an adapter carries over from one document to the next stays as it was:
    the interval is about other documents, not about another order of them.
    """
    gained = before - after
    low, high = bootstrap_ratio(gained, math.log(2) * text_bytes, seed=seed)
    return float(gained.sum() / (math.log(2) * text_bytes.sum())), low, high


def bootstrap_ratio(part: np.ndarray, whole: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of sum(part) / sum(whole) over documents drawn with replacement.

    Both are sums by document, (documents,); `whole` is not negative.
    """
    count = len(whole)
    rng, found = np.random.default_rng(seed), []
    at_once = max(1, 2**22 // count)
    for first in range(0, RESAMPLES, at_once):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(at_once, RESAMPLES - first))
        found.append((times @ part) / np.maximum(times @ whole, math.log(2)))  # one byte, if there is none
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)


def sweep(
    model: GPT,
    stream: Stream,
    config: RunConfig,
    adapters: dict[str, TTTConfig],
    grid: Transform,
    folder: Path,
    world: World = SINGLE,
    *,
    after: int = 0,
    allow_illegal: bool = False,
) -> list[Comparison]:
    """The baseline and each of `adapters`, on the windows of `config.eval`; the model stays as it is.

    Targets are scored once each, all of them; compared are the documents that begin at target `after` or
    later. (Settings that were chosen on what comes before are judged fairly by these.) `grid` is as in
    `three_scores`. Every finished pass leaves `folder`/NAME.json, and is not repeated for the same weights,
    tokens and settings. Raises PgolfError where no document begins so late, and for an adapter that breaks
    the rules, unless `allow_illegal`.
    """
    config = replace(config, eval=replace(config.eval, repeat_tail=False))
    evaluator = Evaluator(model, stream, config, grid, world)
    windows, starts = evaluator.sliding_windows(), document_starts(stream.tokens.cpu().numpy())

    def adapting(name: str, ttt: TTTConfig) -> Pass:
        return evaluator.adapted(windows, ttt, name, allow_illegal=allow_illegal)

    def outcome(name: str, ttt: TTTConfig | None, work: Callable[[], Pass]) -> Outcome:
        settings = [asdict(config.eval), config.eval_seq_len, str(model.compute_dtype), ttt and asdict(ttt)]
        mark, path = identity(model, stream, settings), folder / f"{name}.json"
        if (known := _read(path)) is not None and known.identity == mark:
            console.logger.info("%s: already in %s", name, path)
            return known
        begin = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begin
        nats = np.add.reduceat(result.scorer.by_target().astype(np.float64), starts)
        made = Outcome(name, mark, nats.tolist(), seconds, result.updates, result.trainable)
        if world.is_main:
            write_text(path, json.dumps(asdict(made)) + "\n")
        return made

    base = outcome(BASELINE, None, partial(evaluator.frozen, windows, BASELINE))
    rest = [outcome(name, ttt, partial(adapting, name, ttt)) for name, ttt in adapters.items()]
    text_bytes = np.add.reduceat(stream.target_bytes, starts)
    counted = starts >= after
    if not counted.any():
        raise PgolfError(
            f"no document begins at target {after:,} or later: the last begins at {starts[-1]:,}"
        )
    return [compare(base, other, text_bytes, counted, stream.num_targets) for other in (base, *rest)]


def compare(
    base: Outcome, other: Outcome, text_bytes: np.ndarray, counted: np.ndarray, tokens: int
) -> Comparison:
    """`other` beside `base` on the `counted` documents; both took their seconds for all `tokens`."""
    before, changed, size = np.array(base.nats)[counted], np.array(other.nats)[counted], text_bytes[counted]
    bpb = changed.sum() / (math.log(2) * size.sum())
    gain = bootstrap_gain(before, changed, size)
    return Comparison(
        other.name, float(bpb), *gain, 1e6 * other.seconds / tokens, other.updates, other.trainable
    )


def _read(path: Path) -> Outcome | None:
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def sweep_run(
    folder: RunFolder,
    config: RunConfig,
    adapters: dict[str, TTTConfig],
    world: World | None = None,
    *,
    after: int = 0,
    allow_illegal: bool = False,
) -> list[Comparison]:
    """Adapters compared on the run's artifact and validation data, also written to ttt_sweep.json.

    `after` is as in `evaluation.sweep`. Raises PgolfError for an adapter that breaks the rules, unless
    `allow_illegal`; the file tells. Finished adapters are kept in the folder ttt_sweep, and not repeated.
    """
    for ttt in adapters.values():
        need_legal(ttt, allow_illegal)
    world = world or this_process()
    model = artifact_model(folder, config, world)
    grid = bank_grids(unpack(folder.artifact_file)[1])
    stream = validation_stream(folder, config, world.device)
    beside = folder.path / "ttt_sweep"
    found = sweep(
        model, stream, config, adapters, grid, beside, world, after=after, allow_illegal=allow_illegal
    )
    if world.is_main:
        story = {
            "artifact_sha256": sizes(folder.artifact_file).sha256,
            "tokens": stream.num_targets,
            "after": after,
            "stride": config.eval.stride,
            "adapters": {row.name: dataclasses.asdict(row) for row in found},
            "settings": {name: dataclasses.asdict(ttt) for name, ttt in adapters.items()},
            "illegal": {name: ttt.illegal for name, ttt in adapters.items() if ttt.illegal},
        }
        write_text(folder.sweep_file, json.dumps(story, indent=2) + "\n")
    return found


def sweep_table(content: Mapping[str, Any]) -> Table:
    """Tabulate the content of ttt_sweep.json; adapters that break the rules are labeled."""
    illegal = content.get("illegal", {})
    rows = [
        (
            mark(name, name in illegal),
            f"{row['bpb']:.6f}",
            f"{row['gain']:+.6f}",
            f"{row['low']:+.5f} to {row['high']:+.5f}",
            f"{row['microseconds_a_token']:.1f}",
            f"{row['updates']:,}",
            f"{row['trainable']:,}",
        )
        for name, row in content["adapters"].items()
    ]
    header = ("adapter", "bpb", "gain", "95 % interval", "us/token", "updates", "trainable")
    return Table(header, rows, f"Adapters compared on {content.get('tokens', 0):,} targets")
