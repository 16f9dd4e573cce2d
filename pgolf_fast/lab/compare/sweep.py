"""Compare adapters on one model: the gain of each over sliding windows without test-time training."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_fast import console
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.registry import need_legal
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.resume import identity
from pgolf_fast.evaluation.run import open_run
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import Evaluator, labeled
from pgolf_fast.io import read_json, well_formed, write_json
from pgolf_fast.lab.audit.watch import by_target
from pgolf_fast.lab.compare.statistics import bootstrap_gain
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT

BASELINE = "sliding"


@dataclass(frozen=True)
class AdapterPass:
    """One adapter's pass over the stream; `nats` are sums per document."""

    name: str
    identity: str
    nats: list[float]
    seconds: float
    updates: int
    trainable: int


@dataclass(frozen=True)
class AdapterGain:
    """An adapter's bits per byte, and its gain over the baseline with a 95 % interval."""

    name: str
    bpb: float
    gain: float
    low: float
    high: float
    microseconds_a_token: float
    updates: int
    trainable: int


def sweep(
    model: GPT,
    stream: Stream,
    config: RunConfig,
    adapters: Mapping[str, TTTConfig],
    grid: Transform,
    folder: Path,
    world: World = SINGLE,
    *,
    after: int = 0,
    allow_illegal: bool = False,
) -> list[AdapterGain]:
    """Score the baseline and each of `adapters` on the windows of `config.eval`; the model is left unchanged.

    All targets are scored once. Only documents that begin at target `after` or later are compared, so that
    settings chosen on the text before it are judged on new text. `grid` is as in `three_scores`. Each
    finished pass is kept as `folder`/NAME.json and reused for the same weights, tokens and settings.

    Raises PgolfError if no document begins at `after` or later, and for an adapter that breaks the rules,
    unless `allow_illegal`.
    """
    starts = document_starts(stream.tokens.cpu().numpy())
    counted = starts >= after
    if not counted.any():
        last = f"the last begins at {starts[-1]:,}"
        raise PgolfError(f"no document begins at target {after:,} or later: {last}")
    # A repeated tail would score some targets twice.
    config = replace(config, eval=replace(config.eval, repeat_tail=False))
    evaluator = Evaluator(model, stream, config, grid, world)
    paths = {folder / f"{name}.json": ttt for name, ttt in {BASELINE: None, **adapters}.items()}
    passes = [_pass(evaluator, path, starts, ttt, allow_illegal) for path, ttt in paths.items()]
    size = np.add.reduceat(stream.target_bytes, starts)[counted]
    before, *_ = nats = [np.array(one.nats)[counted] for one in passes]
    gains = []
    for one, total in zip(passes, nats, strict=True):
        bpb, cost = float(total.sum() / (math.log(2) * size.sum())), 1e6 * one.seconds / stream.num_targets
        gain = bootstrap_gain(before, total, size)
        gains.append(AdapterGain(one.name, bpb, *gain, cost, one.updates, one.trainable))
    return gains


def _pass(
    evaluator: Evaluator, path: Path, starts: np.ndarray, ttt: TTTConfig | None, allow_illegal: bool
) -> AdapterPass:
    """Read a pass from its file if the identity matches; otherwise score it and write the file."""
    model, config, windows = evaluator.model, evaluator.config, evaluator.sliding_windows()
    settings = [asdict(config.eval), config.eval_seq_len, str(model.compute_dtype), ttt and asdict(ttt)]
    digest = identity(model, evaluator.stream, settings)
    name = path.stem
    if path.is_file():
        with well_formed(path):
            known = AdapterPass(**read_json(path))
        if known.identity == digest:
            console.logger.info("%s: already in %s", name, path)
            return known
    console.logger.info("%s: scoring %d windows", name, len(windows))
    begin = time.perf_counter()
    if ttt is None:
        result = evaluator.frozen(windows, name)
    else:
        result = evaluator.adapted(windows, ttt, name, allow_illegal=allow_illegal)
    seconds = time.perf_counter() - begin
    nats = np.add.reduceat(by_target(result.scorer).astype(np.float64), starts)
    made = AdapterPass(name, digest, nats.tolist(), seconds, result.updates, result.trainable)
    if evaluator.world.is_main:
        write_json(path, asdict(made), indent=None)
    return made


def sweep_run(
    folder: RunFolder,
    config: RunConfig,
    adapters: Mapping[str, TTTConfig],
    world: World,
    *,
    after: int = 0,
    allow_illegal: bool = False,
) -> dict[str, Any]:
    """Compare adapters on the run's artifact and validation data; return the content of ttt_sweep.json.

    `after` is as in `sweep`. Finished passes are kept in the folder ttt_sweep and not repeated. Raises
    PgolfError for an adapter that breaks the rules, unless `allow_illegal`; the file records it.
    """
    for ttt in adapters.values():
        need_legal(ttt, allow_illegal)
    loaded, stream = open_run(folder, config, "artifact", world.device)
    run = loaded.model, stream, config, adapters, loaded.grid, folder.path / "ttt_sweep", world
    gains = sweep(*run, after=after, allow_illegal=allow_illegal)
    content: dict[str, Any] = {"artifact_sha256": loaded.sha256, "tokens": stream.num_targets}
    content |= {"after": after, "stride": config.eval.stride}
    content["adapters"] = {gain.name: asdict(gain) for gain in gains}
    content["settings"] = {name: asdict(ttt) for name, ttt in adapters.items()}
    content["illegal"] = {name: ttt.illegal for name, ttt in adapters.items() if ttt.illegal}
    if world.is_main:
        write_json(folder.sweep_file, content)
    return content


def sweep_table(content: Mapping[str, Any]) -> console.Table:
    """Tabulate the content of ttt_sweep.json; adapters that break the rules are marked."""
    illegal = content.get("illegal", {})
    rows = []
    for name, row in content["adapters"].items():
        scores = (f"{row['bpb']:.6f}", f"{row['gain']:+.6f}", f"{row['low']:+.5f} to {row['high']:+.5f}")
        costs = (f"{row['microseconds_a_token']:.1f}", f"{row['updates']:,}", f"{row['trainable']:,}")
        rows.append((labeled(name, name in illegal), *scores, *costs))
    header = ("adapter", "bpb", "gain", "95 % interval", "us/token", "updates", "trainable")
    return console.Table(header, rows, f"Adapters compared on {content.get('tokens', 0):,} targets")
