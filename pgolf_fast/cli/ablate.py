"""`pgolf ablate`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pgolf_fast import console
from pgolf_fast.cli.arguments import parse, preset_and_overrides
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    from pgolf_fast.lab.compare.plan import Variant


@dataclass(frozen=True)
class _Ablate:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    flip: tuple[str, ...] = ()
    """FIELD=VALUE words of one variant; once for each variant. Values with commas set several numbers, none
    switches off."""
    seeds: tuple[int, ...] = (42,)
    """Seeds of the initial weights; the baseline and every variant are trained with each."""
    budget: Literal["steps", "time", "both", "measured"] = "steps"
    """Equal optimizer steps; equal training time by the clock; both, one after the other; or (measured) as
    many steps as fit into the baseline's training time, by step costs measured before the runs."""
    steps: int | None = None
    """Of every run of budget steps; default: the preset's."""
    seconds: float | None = None
    """Training clock of every run of budget time; default: the preset's."""
    scores: Literal["plain", "sliding", "all"] = "all"
    """Non-overlapping windows only; sliding ones too; test-time training too."""
    interval: Literal["seeds", "documents"] | None = None
    """What intervals are over; default: seeds where there are several, else documents."""
    out: Path | None = None
    """Folder of all runs; default runs/ablate_PRESET. The same command goes on where it was interrupted; one
    with other flips takes over the runs that both have, and writes ablation.json and ablation.png anew."""
    workers: int | None = None
    """Runs at the same time; default: one on each GPU, or one. On a CPU they share its cores."""


def ablate(argv: list[str]) -> int:
    """pgolf ablate PRESET --flip FIELD=VALUE [FIELD=VALUE ...] [--flip ...] [--seeds 42 43 44] [...]"""
    words, flips = split_flips(argv)
    config, rest = preset_and_overrides(words)
    a = parse("ablate PRESET", _Ablate, rest, _Ablate(config))
    from pgolf_fast.data.source import open_source
    from pgolf_fast.distributed import devices
    from pgolf_fast.io import locked
    from pgolf_fast.lab.compare.jobs import fingerprint, prepare
    from pgolf_fast.lab.compare.plan import BASELINE, Budget, make_jobs, make_variants
    from pgolf_fast.lab.compare.processes import job_task, make_slots, run_tasks
    from pgolf_fast.lab.compare.step_cost import cost_table, step_costs

    if "WORLD_SIZE" in os.environ:
        raise PgolfError("pgolf ablate starts its own processes: run it without torchrun")
    if a.interval == "seeds" and len(a.seeds) < 2:
        raise PgolfError(f"an interval over seeds needs at least 2 --seeds, and has {len(a.seeds)}")
    if a.interval == "documents" and len(a.seeds) > 1:
        raise PgolfError(f"an interval over documents is of one seed, and --seeds has {len(a.seeds)}")
    out = a.out or Path("runs") / f"ablate_{config.name}"
    budgets: tuple[Budget, ...] = ("steps", "time") if a.budget == "both" else (a.budget,)
    variants = make_variants(a.config, flips)
    if a.scores == "all":
        _need_legal(variants)
    slots = make_slots(a.workers, devices(), timed="time" in budgets)
    costs = None
    if "measured" in budgets:
        configs = {variant.name: variant.config for variant in variants}
        costs = step_costs(configs, out / "step_costs.json", workers=len(slots))
        print_out(cost_table(costs, BASELINE).text())
    jobs = make_jobs(variants, a.seeds, budgets, out, steps=a.steps, seconds=a.seconds, costs=costs)
    data = fingerprint(open_source(a.config.data, a.config.model.vocab_size))
    busy = f"another pgolf ablate is at work in {out}: wait until it has ended, or choose another --out"
    with locked(out / "ablation.lock", busy):
        left = [job for job in jobs if prepare(job, data, a.scores)]
        console.setup_logging()
        console.logger.info(
            "%d runs, %d of them finished; %d at a time", len(jobs), len(jobs) - len(left), len(slots)
        )
        if "steps" in budgets and len({variant.config.train.reptile for variant in variants}) > 1:
            console.logger.warning(
                "variants differ in train.reptile, whose steps read other numbers of tokens than plain ones, "
                "so equal steps are not equal work: compare these by --budget time"
            )
        failures = run_tasks([job_task(job.name, job.path) for job in left], slots)
        _show(jobs, out, None if failures else a.interval)
    if failures:
        raise PgolfError(
            f"{len(failures)} of {len(jobs)} runs failed, first {failures[0].name} ({failures[0].reason}); "
            "the same command tries them again"
        )
    return 0


def _need_legal(variants: Sequence[Variant]) -> None:
    """Raise PgolfError for test-time training that would be refused when all is trained."""
    for variant in variants:
        if (why := variant.config.ttt.illegal) is not None:
            raise PgolfError(
                f"{variant.name}: ttt.adapter {variant.config.ttt.adapter} breaks the rules: {why}. Give "
                "--scores sliding, and score single runs with pgolf eval --allow-illegal"
            )


def _show(jobs: list, out: Path, interval: Literal["seeds", "documents"] | None) -> None:
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


def split_flips(argv: list[str]) -> tuple[list[str], list[list[str]]]:
    """The words without those of --flip, and each --flip's: those up to the next option."""
    words: list[str] = []
    flips: list[list[str]] = []
    inside = False
    for word in argv:
        if word == "--flip" or word.startswith("--flip="):
            flips.append([word[len("--flip=") :]] if "=" in word else [])
            inside = True
        elif inside and not word.startswith("--"):
            flips[-1].append(word)
        else:
            inside = False
            words.append(word)
    if not all(flips):
        raise PgolfError("--flip has no FIELD=VALUE: write it like --flip train.meta=none")
    return words, flips
