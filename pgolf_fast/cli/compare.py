"""Commands that compare recipes: ablate, seeds, ttt-sweep."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pgolf_fast import console
from pgolf_fast.cli.evaluate import Weights, validation_data
from pgolf_fast.cli.options import (
    AllFields,
    DataFolder,
    Preset,
    Run,
    Size,
    Words,
    existing,
    preset_with,
    run_folder,
)
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.ttt import adapters, unknown_adapter
from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    from pgolf_fast.lab.compare.plan import Variant

Interval = Literal["seeds", "documents"]
OWN = "run"
"""Name of the run's own test-time training settings among the adapters."""


@dataclass(frozen=True)
class Ablate:
    preset: Preset
    """Baseline; `pgolf config` lists the presets."""
    fields: AllFields
    flip: Annotated[
        tuple[Words, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE ...")
    ] = ()
    """One variant; repeat the option for more. Write lists with commas; none switches a field off."""
    seeds: tuple[int, ...] = (42,)
    """Seeds of the initial weights; the baseline and every variant are trained with each."""
    budget: Literal["steps", "time", "both", "measured"] = "steps"
    """Equal optimizer steps; equal training time by the clock; both, one after the other; or (measured) as
    many steps as fit into the baseline's training time, by step costs measured before the runs."""
    steps: int | None = None
    """Steps of every run with budget steps; default: the preset's."""
    seconds: float | None = None
    """Training time of every run with budget time; default: the preset's."""
    scores: Literal["plain", "sliding", "all"] = "all"
    """plain: non-overlapping windows only; sliding: also sliding windows; all: also test-time training."""
    interval: Interval | None = None
    """Sample of the intervals; default: seeds if there are several, else documents."""
    out: Path | None = None
    """Folder of all runs, default: runs/ablate_PRESET. Finished runs in it are reused."""
    workers: int | None = None
    """Runs in parallel; default: one per GPU, or one. On a CPU they share its cores."""
    shrink: Size | None = None
    """Size of the preset."""


def ablate(options: Ablate) -> int:
    base = preset_with(options.preset, options.shrink, options.fields)
    if not all(options.flip):
        raise PgolfError("--flip has no FIELD=VALUE: write it like --flip train.meta=none")
    from pgolf_fast.data.source import open_source
    from pgolf_fast.distributed import devices
    from pgolf_fast.io import locked
    from pgolf_fast.lab.compare.jobs import fingerprint, prepare
    from pgolf_fast.lab.compare.plan import BASELINE, Budget, make_jobs, make_variants
    from pgolf_fast.lab.compare.processes import job_task, make_slots, run_tasks
    from pgolf_fast.lab.compare.step_cost import cost_table, step_costs

    _check_interval(options)
    out = options.out or Path("runs") / f"ablate_{base.name}"
    budgets: tuple[Budget, ...] = ("steps", "time") if options.budget == "both" else (options.budget,)
    variants = make_variants(base, [list(words) for words in options.flip])
    if options.scores == "all":
        _check_legal(variants)
    slots = make_slots(options.workers, devices(), timed="time" in budgets)
    costs = None
    if "measured" in budgets:
        configs = {variant.name: variant.config for variant in variants}
        costs = step_costs(configs, out / "step_costs.json", workers=len(slots))
        print_out(cost_table(costs, BASELINE).text())
    steps, seconds = options.steps, options.seconds
    jobs = make_jobs(variants, options.seeds, budgets, out, steps=steps, seconds=seconds, costs=costs)
    data = fingerprint(open_source(base.data, base.model.vocab_size))
    busy = f"another pgolf ablate is running in {out}: wait until it has ended, or choose another --out"
    with locked(out / "ablation.lock", busy):
        left = [job for job in jobs if prepare(job, data, options.scores)]
        console.setup_logging()
        console.logger.info(
            "%d runs, %d of them finished; %d at a time", len(jobs), len(jobs) - len(left), len(slots)
        )
        if "steps" in budgets and len({variant.config.train.reptile for variant in variants}) > 1:
            console.logger.warning(
                "variants differ in train.reptile, whose steps read other numbers of tokens than plain ones, "
                "so equal steps are not equal work: compare these with --budget time"
            )
        failures = run_tasks([job_task(job.name, job.path) for job in left], slots)
        _print_ablation(jobs, out, None if failures else options.interval)
    if failures:
        raise PgolfError(
            f"{len(failures)} of {len(jobs)} runs failed, first {failures[0].name} ({failures[0].reason}); "
            "the same command tries them again"
        )
    return 0


def _check_interval(options: Ablate) -> None:
    if "WORLD_SIZE" in os.environ:
        raise PgolfError("pgolf ablate starts its own processes: run it without torchrun")
    if options.interval == "seeds" and len(options.seeds) < 2:
        raise PgolfError(f"an interval over seeds needs at least 2 --seeds, and has {len(options.seeds)}")
    if options.interval == "documents" and len(options.seeds) > 1:
        raise PgolfError(f"an interval over documents takes one seed, and --seeds has {len(options.seeds)}")


def _check_legal(variants: Sequence[Variant]) -> None:
    """Raise PgolfError for test-time training that would be refused after all training is done."""
    for variant in variants:
        if (why := variant.config.ttt.illegal) is not None:
            raise PgolfError(
                f"{variant.name}: ttt.adapter {variant.config.ttt.adapter} breaks the rules: {why}. Give "
                "--scores sliding, and score single runs with pgolf eval --allow-illegal"
            )


def _print_ablation(jobs: list, out: Path, interval: Interval | None) -> None:
    from pgolf_fast.io import write_text
    from pgolf_fast.lab.compare.plot import draw_ablation
    from pgolf_fast.lab.compare.table import commits, describe, make_rows, pass_gains, read_runs, to_dict

    runs = read_runs(jobs)
    rows, gains = make_rows(runs, interval), pass_gains(runs, interval)
    if not rows:
        return
    print_out(describe(rows, gains))
    if len(made_by := commits(runs)) > 1:
        print_out(f"\nnote: the runs were made by several versions of this package: {', '.join(made_by)}")
    write_text(out / "ablation.json", json.dumps(to_dict(rows, gains, runs), indent=2) + "\n")
    print_out(f"\nwrote {out / 'ablation.json'}")
    if (picture := draw_ablation(rows, runs, out / "ablation.png")) is not None:
        print_out(f"wrote {picture}")


@dataclass(frozen=True)
class Seeds:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders of one recipe with different seeds, scored by `pgolf eval`."""
    against: tuple[Path, ...] = ()
    """Run folders of the recipe to beat."""
    margin: float | None = None
    """Nats per token to beat it by; default: 0.005, as the challenge asks."""
    weights: Weights = "artifact"
    """Scores of the packed artifacts, or of the float weights."""


def seeds(options: Seeds) -> int:
    from pgolf_fast.config.run_folder import read_scores
    from pgolf_fast.lab.compare.seeds import MARGIN, check_comparable, group_table, welch_table

    groups = {"": options.runs, **({"against": options.against} if options.against else {})}
    for name, runs in groups.items():
        if len(runs) < 2:
            where = f"--{name}" if name else "pgolf seeds"
            raise PgolfError(f"{where} needs at least 2 runs for a deviation, and has {len(runs)}")
    paths = {
        name: [existing(run, "run folder") / f"scores_{options.weights}.json" for run in runs]
        for name, runs in groups.items()
    }
    scores = {name: [read_scores(path) for path in group] for name, group in paths.items()}
    check_comparable([*chain(*paths.values())], [*chain(*scores.values())])
    print_out(group_table(scores).text())
    if options.against:
        margin = MARGIN if options.margin is None else options.margin
        print_out("\n" + welch_table(scores[""], scores["against"], margin).text())
    return 0


@dataclass(frozen=True)
class Sweep:
    run: Run
    """Run folder, packed."""
    adapters: Words = ()
    """Adapters by name; default: all, and `run`, the run's own settings."""
    stride: int | None = None
    """Tokens between windows; default: the run's."""
    tokens: int | None = None
    """Score only this many validation tokens; default: all."""
    after: int = 0
    """Compare only documents that start at this target or later."""
    data: DataFolder = None
    """Folder of validation shards; default: the run's."""
    allow_illegal: bool = False
    """Also compare adapters that break the rules; their rows are labeled ILLEGAL."""


def ttt_sweep(options: Sweep) -> int:
    from pgolf_fast.distributed import join_world
    from pgolf_fast.lab.compare.sweep import sweep_run, sweep_table

    folder, config = run_folder(options.run)
    known = {**adapters(config.eval_seq_len), OWN: config.ttt}
    for name in options.adapters:
        if name not in known:
            raise PgolfError(unknown_adapter(name, known))
    if options.after < 0:
        raise PgolfError(f"--after is {options.after}; it must not be negative")
    chosen = {name: known[name] for name in options.adapters or _distinct(known)}
    data = validation_data(config.data, options.data)
    if options.tokens is not None:
        data = replace(data, val_tokens=options.tokens)
    scoring = replace(config.eval, stride=options.stride or config.eval.stride)
    config = replace(config, data=data, eval=scoring)
    with join_world() as world:
        console.setup_logging(folder.log_file if world.is_main else None, quiet=not world.is_main)
        content = sweep_run(
            folder, config, chosen, world, after=options.after, allow_illegal=options.allow_illegal
        )
    if world.is_main:
        print_out(sweep_table(content).text())
        for name, ttt in chosen.items():
            if ttt.illegal:
                print_out(f"{name} BREAKS THE RULES of the challenge: {ttt.illegal}.")
        print_out(f"wrote {folder.path / 'ttt_sweep.json'}")
    return 0


def _distinct(known: dict) -> list[str]:
    """Return all names, without the run's own settings if another name has the same."""
    return [name for name in known if name != OWN or known[OWN] not in [known[n] for n in known if n != OWN]]
