"""`pgolf eval` and `pgolf seeds`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pgolf_fast import console
from pgolf_fast.cli.arguments import existing, first_run, parse
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.presets import is_preset, preset
from pgolf_fast.config.schema import EvalConfig, RunConfig, TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.seeds import MARGIN

if TYPE_CHECKING:
    from pgolf_fast.config.run_folder import RunFolder


@dataclass(frozen=True)
class Eval:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder; with --estimate, a preset too."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Window settings; default: the run's."""
    ttt: TTTConfig = field(default_factory=TTTConfig)
    """Test-time training settings; default: the run's."""
    weights: Literal["artifact", "float"] = "artifact"
    """Score the packed artifact, or the float weights before quantisation."""
    data: Path | None = None
    """Folder of validation shards; default: the run's."""
    tokenizer: Path | None = None
    """Tokenizer of those shards; default: the one the run was trained with."""
    figures: bool = False
    """Print all tables of the figures, not only that by class."""
    estimate: bool = False
    """Print what there is to do and how long it will take here, and score nothing."""
    allow_illegal: bool = False
    """Score also with test-time training that breaks the rules; the result is marked."""


def evaluate(argv: list[str]) -> int:
    """pgolf eval RUN [--weights artifact|float] [--figures] [--estimate] [--allow-illegal] [...]"""
    from pgolf_fast.config.run_folder import RunFolder

    new = "--estimate" in argv and is_preset(argv[0]) and not Path(argv[0]).exists()
    folder = RunFolder(Path(argv[0])) if new else first_run(argv, RunFolder)
    config = preset(argv[0]) if new else folder.read_config()
    arguments = parse("eval", Eval, argv, Eval(folder.path, config.eval, config.ttt))
    data = replace(
        config.data,
        path=str(arguments.data) if arguments.data else config.data.path,
        tokenizer=str(arguments.tokenizer) if arguments.tokenizer else config.data.tokenizer,
    )
    config = replace(config, eval=arguments.eval, ttt=arguments.ttt, data=data)
    if arguments.estimate:
        return _estimate(None if new else folder, config, arguments.weights)
    return _score(folder, config, arguments)


def _score(folder: RunFolder, config: RunConfig, arguments: Eval) -> int:
    from pgolf_fast.distributed import join_world
    from pgolf_fast.evaluation.figures import tables
    from pgolf_fast.evaluation.steps import score_run
    from pgolf_fast.lab.report.score_plot import draw_scores

    with join_world() as world:
        console.setup_logging(folder.log_file if world.is_main else None, quiet=not world.is_main)
        allowed = arguments.allow_illegal
        scores = score_run(folder, config, arguments.weights, world, allow_illegal=allowed)
    if not world.is_main:
        return 0
    path = folder.path / f"scores_{arguments.weights}.json"
    story = json.loads(path.read_text(encoding="utf-8"))
    print_out(scores.table().text())
    if scores.illegal:
        print_out(f"\nThe third score BREAKS THE RULES of the challenge: {scores.illegal}.")
    for table in tables(story["figures"], every=arguments.figures, illegal=scores.illegal):
        print_out(f"\n{table}")
    print_out(f"\nwrote {path}")
    if (picture := draw_scores(story, path.with_suffix(".png"))) is not None:
        print_out(f"wrote {picture}")
    return 0


def _estimate(folder: RunFolder | None, config: RunConfig, weights: Literal["artifact", "float"]) -> int:
    from pgolf_fast.evaluation.scores import TTT, mark
    from pgolf_fast.evaluation.steps import estimate_run

    console.setup_logging()
    begin = time.perf_counter()
    found, source = estimate_run(folder, config, weights)
    illegal = config.ttt.illegal
    rows = [
        (
            mark(e.name, illegal if e.name == TTT else None),
            f"{e.windows:,}",
            f"{e.tokens:,}",
            f"{e.updates:,}",
            f"{e.flops / 1e12:,.2f}",
            console.duration(e.seconds),
        )
        for e in found
    ]
    header = ("estimate", "windows", "scored targets", "updates", "TFLOP", "time")
    print_out(console.table(rows, header))
    whole, taken = (console.duration(s) for s in (sum(e.seconds for e in found), time.perf_counter() - begin))
    print_out(f"\nall of it about {whole} here, by {source}; estimated in {taken}")
    return 0


@dataclass(frozen=True)
class Seeds:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of one recipe with different seeds, scored by `pgolf eval`."""
    against: tuple[Path, ...] = ()
    """Those of the recipe that is to be beaten."""
    margin: float = MARGIN
    """Nats per token by which it is to be beaten."""
    weights: Literal["artifact", "float"] = "artifact"
    """Which scores of the runs."""


def seeds(argv: list[str]) -> int:
    """pgolf seeds RUN RUN ... [--against RUN RUN ...] [--margin NATS]"""
    from pgolf_fast.config.run_folder import SCORES, read_scores
    from pgolf_fast.evaluation.scores import mark
    from pgolf_fast.lab.compare.seeds import check_comparable, group

    arguments = parse("seeds", Seeds, argv)
    groups = {"": arguments.runs, "against": arguments.against}
    groups = {name: runs for name, runs in groups.items() if runs or not name}
    for name, runs in groups.items():
        if len(runs) < 2:
            whom = f"--{name}" if name else "pgolf seeds"
            raise PgolfError(f"{whom} needs at least 2 runs for a deviation, and has {len(runs)}")
    paths = {
        name: [existing(run, "run folder") / f"scores_{arguments.weights}.json" for run in runs]
        for name, runs in groups.items()
    }
    stories = {name: [read_scores(path) for path in found] for name, found in paths.items()}
    check_comparable([*chain(*paths.values())], [*chain(*stories.values())])
    rows = []
    for name, found in stories.items():
        for score, title in SCORES.items():
            one = group(found, score)
            illegal = score == "sliding_ttt" and any(story.get("illegal") for story in found)
            what = mark(f"{title}, {name}" if name else title, illegal)
            units = (one.bpb, one.bpb_deviation, one.loss, one.loss_deviation)
            rows.append((what, str(one.runs), *(f"{value:.6f}" for value in units)))
    print_out(console.table(rows, ("score", "runs", "bpb", "deviation", "nats/token", "deviation")))
    if arguments.against:
        print_out(f"\n{_tests(stories[''], stories['against'], arguments.margin)}")
    return 0


def _tests(ours: Sequence[dict], theirs: Sequence[dict], margin: float) -> str:
    from pgolf_fast.config.run_folder import SCORES
    from pgolf_fast.evaluation.scores import mark
    from pgolf_fast.lab.compare.seeds import welch

    rows = []
    for score, name in SCORES.items():
        title = mark(name, score == "sliding_ttt" and any(s.get("illegal") for s in (*ours, *theirs)))
        a, b = ([story[score]["loss"] for story in stories] for stories in (ours, theirs))
        test = welch(a, b, margin)
        gain = statistics.fmean(b) - statistics.fmean(a)
        rows.append((title, f"{gain:+.6f}", f"{test.t:.3f}", f"{test.degrees:.2f}", f"{test.p:.3g}"))
    return console.table(rows, ("score", "nats gained", "t", "degrees", f"p of more than {margin:g}"))
