"""`pgolf eval`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pgolf_fast import console
from pgolf_fast.cli.options import DataFolder, Fields, Run, TokenizerFile, Words, run_folder
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.fields import flip
from pgolf_fast.config.presets import is_preset, preset
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import DataConfig, RunConfig

Weights = Literal["artifact", "float"]
TTT_FIELDS = ("ttt.*", "ttt.lora.*", "ttt.guided.*")


@dataclass(frozen=True)
class Eval:
    run: Run
    """Run folder; with --estimate, a preset too."""
    fields: Annotated[Words, Fields(("eval", "ttt"), brief=TTT_FIELDS)]
    weights: Weights = "artifact"
    """Score the packed artifact, or the float weights before quantization."""
    data: DataFolder = None
    """Folder of validation shards; default: the run's."""
    tokenizer: TokenizerFile = None
    """Tokenizer of those shards; default: the one the run was trained with."""
    figures: bool = False
    """Print all tables of the figures, not only the one by class."""
    estimate: bool = False
    """Print the amount of work and how long it would take here; score nothing."""
    allow_illegal: bool = False
    """Also score test-time training that breaks the rules; the result is labeled ILLEGAL."""


def evaluate(options: Eval) -> int:
    if options.estimate and is_preset(str(options.run)) and not options.run.exists():
        folder, config = None, flip(preset(str(options.run)), options.fields)
    else:
        folder, config = run_folder(options.run, options.fields)
    config = replace(config, data=validation_data(config.data, options.data, options.tokenizer))
    if folder is None or options.estimate:
        return _estimate(folder, config, options.weights)
    return _score(folder, config, options)


def validation_data(data: DataConfig, path: Path | None, tokenizer: Path | None = None) -> DataConfig:
    """Return a run's data settings with the folder and tokenizer that were given."""
    if path is not None:
        data = replace(data, path=str(path))
    return data if tokenizer is None else replace(data, tokenizer=str(tokenizer))


def _score(folder: RunFolder, config: RunConfig, options: Eval) -> int:
    from pgolf_fast.distributed import join_world
    from pgolf_fast.evaluation.figures import tables
    from pgolf_fast.evaluation.steps import score_run
    from pgolf_fast.lab.report.score_plot import draw_scores

    with join_world() as world:
        console.setup_logging(folder.log_file if world.is_main else None, quiet=not world.is_main)
        scores = score_run(folder, config, options.weights, world, allow_illegal=options.allow_illegal)
    if not world.is_main:
        return 0
    path = folder.path / f"scores_{options.weights}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    print_out(scores.table().text())
    if scores.illegal:
        print_out(f"\nThe third score BREAKS THE RULES of the challenge: {scores.illegal}.")
    for table in tables(content["figures"], every=options.figures, illegal=scores.illegal):
        print_out(f"\n{table}")
    print_out(f"\nwrote {path}")
    if (picture := draw_scores(content, path.with_suffix(".png"))) is not None:
        print_out(f"wrote {picture}")
    return 0


def _estimate(folder: RunFolder | None, config: RunConfig, weights: Weights) -> int:
    from pgolf_fast.evaluation.scores import TTT, labeled
    from pgolf_fast.evaluation.steps import estimate_run

    console.setup_logging()
    start = time.perf_counter()
    estimates, source = estimate_run(folder, config, weights)
    illegal = config.ttt.illegal
    rows = [
        (
            labeled(e.name, illegal if e.name == TTT else None),
            f"{e.windows:,}",
            f"{e.tokens:,}",
            f"{e.updates:,}",
            f"{e.flops / 1e12:,.2f}",
            console.duration(e.seconds),
        )
        for e in estimates
    ]
    header = ("estimate", "windows", "scored targets", "updates", "TFLOP", "time")
    print_out(console.table(rows, header))
    total, taken = sum(e.seconds for e in estimates), time.perf_counter() - start
    print_out(
        f"\nabout {console.duration(total)} in total on this machine, measured with {source}; "
        f"the estimate took {console.duration(taken)}"
    )
    return 0
