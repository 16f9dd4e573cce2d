"""What the parts of exp101 are worth, on `small`: word-start split, trigram, FOMAML, and the sliding window.

    python benchmarks/study_systems.py --data DATA/datasets/webmix_sp1024
    python benchmarks/study_systems.py --data ... --base train.meta.every=4 --flips train.meta=none \
        --runs runs/study_fomaml --name fomaml --parts steps measure time report

Five parts, each resumable and each alone with --parts; finished runs are not repeated:

steps    the baseline and its variants with each seed, all with the same number of steps
measure  what a step of each kind costs, one after the other in this process; on a quiet machine
time     the variant without FOMAML with as many steps more as its cheaper steps leave time for
ttt      test-time training on the artifacts, beside sliding windows without it
report   NAME.json, NAME.png and NAME.txt

Equal time is not raced for. A race on a machine that does other things measures those, and its runs could not
share the cores. Instead it is measured how many plain steps a step with FOMAML is worth, side by side. The
variant gets that many more for each that the baseline has: the same comparison, which anyone can repeat.

Bits per byte throughout; a negative difference is better. Intervals are 95 %: Student's t over seeds, paired,
and for each seed the paired bootstrap over documents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inner_step import DTYPES
from inner_step import kept as inner_step
from systems_report import Gain, Timing, make_gain, text, write_plot

from pgolf_fast import console
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.adapters import adapters
from pgolf_fast.config.fields import flip
from pgolf_fast.config.presets import small
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import open_source
from pgolf_fast.distributed import World, keep_freed_memory
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text
from pgolf_fast.lab.compare.ablation.job import DOCUMENTS, documents, fingerprint, prepare
from pgolf_fast.lab.compare.ablation.plan import BASELINE, Job, Variant, make_jobs, make_variants
from pgolf_fast.lab.compare.ablation.processes import Task, job_task, make_slots, run_tasks
from pgolf_fast.lab.compare.ablation.table import Run, make_rows, read_runs, to_dict
from pgolf_fast.lab.compare.ablation.worker import end_with_parent
from pgolf_fast.lab.compare.sweep import sweep_run
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.optim.schedule import Schedule
from pgolf_fast.train.loop import build_model
from pgolf_fast.train.trainer import Trainer

PARTS = ("steps", "measure", "time", "ttt", "report")
NO_SPLIT, NO_TRIGRAM, NO_META = "model.pos_conditional=false", "model.trigram=false", "train.meta=none"
FLIPS = (NO_SPLIT, NO_TRIGRAM, NO_META)
QUESTIONS = {
    NO_SPLIT: "(a) without the word-start split of the hash table (the learned gate at word starts stays)",
    NO_TRIGRAM: "(b) without the trigram in the hash table",
    NO_META: "(c) without FOMAML",
}
SGD, LORA = "sgd-as-run", "lora"
PLAIN, META_STEP, ROUNDS = "plain step", "step with FOMAML", 20  # of measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", default="../shared/data/datasets/webmix_sp1024", help="folder of shards")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=(42, 43, 44))
    parser.add_argument("--val-tokens", type=int, default=262_144, help="validation tokens that are scored")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, which share the cores")
    parser.add_argument("--base", nargs="+", default=(), metavar="FIELD=VALUE", help="of small, in all runs")
    parser.add_argument("--flips", nargs="+", choices=FLIPS, default=FLIPS, help="the variants")
    parser.add_argument("--name", default="systems", help="of the files that the report writes")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_systems"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "studies")
    parser.add_argument("--adapt", nargs="+", metavar=("RUN", "ADAPTER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.adapt:
        end_with_parent()
        adapt(Path(arguments.adapt[0]), arguments.adapt[1:])
        return
    console.setup_logging()
    try:
        study = Study(arguments)
        for part in PARTS:
            if part in arguments.parts:
                getattr(study, part)()
    except PgolfError as error:
        sys.exit(str(error))


def adapt(path: Path, names: list[str]) -> None:
    """Test-time training on a run's artifact; what is finished is not repeated."""
    folder = RunFolder(path)
    config = folder.read_config()
    known = known_adapters(config.eval_seq_len)
    sweep_run(folder, config, {name: known[name] for name in names})


def known_adapters(seq_len: int) -> dict[str, TTTConfig]:
    """PR 1501's SGD as it ran, its four epochs too, on chunks of 32 windows; low-rank changes by document."""
    found = adapters(seq_len)
    return {SGD: replace(found[SGD], epochs=4), LORA: found[LORA]}


class Study:
    """The runs of the study, made of the arguments alone."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.runs, self.seeds = arguments, arguments.runs, tuple(arguments.seeds)
        base = flip(small(), arguments.base)
        data = replace(base.data, path=arguments.data, val_tokens=arguments.val_tokens)
        self.base = replace(base, data=data)
        self.source = open_source(data, base.model.vocab_size)
        self.fingerprint = fingerprint(self.source)
        self.variants = make_variants(self.base, [[name] for name in arguments.flips])
        self.cost_file = self.runs / "cost.json"

    def jobs(self, variants: list[Variant], steps: int, folder: str = "") -> list[Job]:
        return make_jobs(variants, self.seeds, ["steps"], self.runs / folder, steps=steps)

    @property
    def step_jobs(self) -> list[Job]:
        return self.jobs(self.variants, self.arguments.steps)

    @property
    def time_jobs(self) -> list[Job]:
        """Of the variant without FOMAML. Raises PgolfError before costs are measured."""
        without = [variant for variant in self.variants if variant.name == NO_META]
        jobs = self.jobs(without, self.equal_time_steps(), "equal_time")
        return [replace(job, budget="time") for job in jobs]

    def steps(self) -> None:
        self._run(self.step_jobs)

    def time(self) -> None:
        self._run(self.time_jobs)

    def _run(self, jobs: list[Job]) -> None:
        left = [job for job in jobs if prepare(job, self.fingerprint, "sliding")]
        self._tasks([job_task(job.name, job.path) for job in left])

    def _tasks(self, tasks: list[Task]) -> None:
        if failures := run_tasks(tasks, make_slots(self.arguments.workers, 0, timed=False)):
            raise PgolfError(f"{failures[0].name} failed: {failures[0].reason}")

    # What a step costs

    def measure(self) -> None:
        """Milliseconds of one step of each kind, in turn, and how many plain steps each is worth.

        A plain step is one without FOMAML; the baseline's others are like it, but for every 32nd.
        """
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.arguments.workers))
        choose_kernels(self.base.kernels, torch.device("cpu"))
        kinds = {PLAIN: flip(self.base, [NO_META]), META_STEP: flip(self.base, ["train.meta.every=1"])}
        kinds |= {name: flip(kinds[PLAIN], [name]) for name in (NO_SPLIT, NO_TRIGRAM)}
        trainers = {name: self._trainer(config) for name, config in kinds.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(ROUNDS + 2):
            for name, trainer in trainers.items():
                begin = time.perf_counter()
                trainer.advance()
                if number >= 2:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - begin)
        for trainer in trainers.values():
            trainer.loader.close()
        cost = {}
        for name, taken in seconds.items():
            ratios = np.array(taken) / np.array(seconds[PLAIN])
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
            ms = 1e3 * statistics.median(taken)
            cost[name] = {"ms": ms, "plain_steps": middle, "quartiles": [low, high]}
        story = {"threads": torch.get_num_threads(), "cost": cost, "seconds": seconds, **provenance()}
        write_text(self.cost_file, json.dumps(story, indent=2) + "\n")
        rows = [
            (name, f"{c['ms']:.1f}", f"{c['plain_steps']:.3f}", *(f"{q:.3f}" for q in c["quartiles"]))
            for name, c in cost.items()
        ]
        console.logger.info("%s", console.table(rows, ("step", "ms", "of plain", "quartile", "quartile")))

    def _trainer(self, config: RunConfig) -> Trainer:
        world = World(0, 1, torch.device("cpu"))
        dtype = str(resolve_dtype(config.train.compute_dtype, world.device)).removeprefix("torch.")
        # so many steps that the learning rate does not fall yet, and FOMAML acts
        train = replace(config.train, schedule="steps", steps=10**6, max_seconds=None, compute_dtype=dtype)
        config = replace(config, train=train)
        loader = make_loader(self.source.train_shards(), config)
        return Trainer(build_model(config, self.source, world), config, loader, world)

    def cost(self) -> dict[str, Any]:
        if not self.cost_file.is_file():
            raise PgolfError(f"{self.cost_file} does not exist: run --parts measure on a quiet machine")
        return json.loads(self.cost_file.read_text(encoding="utf-8"))

    def equal_time_steps(self) -> int:
        """Plain steps in the time of the baseline's run."""
        worth = self.cost()["cost"][META_STEP]["plain_steps"]
        return round(self.arguments.steps + self.meta_steps() * (worth - 1))

    def meta_steps(self) -> int:
        """How often FOMAML acts in a run of the baseline; 0 where it is off."""
        train = next(job.config.train for job in self.step_jobs if job.variant == BASELINE)
        schedule, meta = Schedule(train), train.meta
        if meta is None:
            return 0
        return sum(schedule.multiplier(step, 0.0) > meta.above for step in range(0, train.steps, meta.every))

    # Test-time training

    def adapted_tokens(self) -> int:
        """Tokens that SGD learns from in one pass over the validation text, epochs counted."""
        ttt = known_adapters(self.base.eval_seq_len)[SGD]
        chunks = -(-self.arguments.val_tokens // ttt.chunk_tokens)
        return ttt.epochs * ttt.chunk_tokens * (chunks - 1)

    def adapted(self) -> dict[str, list[str]]:
        """The adapters that are tried on the artifacts of each variant, by the folder of its runs."""
        found = {f"steps/{BASELINE}": [SGD, LORA], f"steps/{NO_META}": [SGD]}
        if self.cost_file.is_file():
            found[f"equal_time/steps/{NO_META}"] = [SGD]
        return found

    def ttt(self) -> None:
        tasks = []
        for seed in self.seeds:
            for folder, names in self.adapted().items():
                path = self.runs / folder / f"seed{seed}"
                if (path / DOCUMENTS).is_file():
                    command = (sys.executable, str(Path(__file__).resolve()), "--adapt", str(path), *names)
                    tasks.append(Task(f"TTT of {folder}/seed{seed}", command, path / "ttt.log"))
        self._tasks(tasks)

    # What came out

    def report(self) -> None:
        runs = self._finished(self.step_jobs)
        if not runs:
            raise PgolfError(f"nothing in {self.runs} is finished: run --parts steps first")
        rows, timing = make_rows(runs), None
        if self.cost_file.is_file() and (later := self._finished(self.time_jobs)):
            base = [Run(replace(r.job, budget="time"), r.result) for r in runs if r.job.variant == BASELINE]
            timed = [row for row in make_rows([*base, *later]) if row.variant != BASELINE]
            cost = self.cost()["cost"][META_STEP]
            timing = Timing(timed, cost["plain_steps"], tuple(cost["quartiles"]), self.equal_time_steps())
            runs = [*runs, *later]
        gains = self._gains()
        settings = {
            "command": self.command(),
            "fingerprint": self.fingerprint,
            **{name: getattr(self.arguments, name) for name in ("steps", "seeds", "val_tokens")},
            "data": Path(self.arguments.data).name,
            "questions": QUESTIONS,
            "parameters": self.base.model.num_parameters(),
            "batch_tokens": self.base.train.batch_tokens,
            "meta_steps": self.meta_steps(),
            "meta_every": self.base.train.meta and self.base.train.meta.every,
            "base": " ".join(self.arguments.base),
            "adapted_tokens": self.adapted_tokens(),
        }
        trained = [run for run in runs if run.job.variant == BASELINE]
        kept = [(run.job.seed, inner_step(run.job.path, dtype)) for run in trained for dtype in DTYPES]
        told = text(settings, rows, timing, gains, kept, runs)
        sys.stdout.write(told)
        story = {
            "settings": {**settings, "config": {**asdict(self.base), "data": None}},
            **to_dict([*rows, *(timing.rows if timing else [])], runs),
            "cost": self.cost() if self.cost_file.is_file() else None,
            "inner_step": [{"seed": seed, **asdict(step)} for seed, step in kept],
            "test_time_training": {name: asdict(gain) for name, gain in gains.items()},
            "adapters": {n: asdict(ttt) for n, ttt in known_adapters(self.base.eval_seq_len).items()},
            **provenance(),
        }
        for run in story["runs"]:
            for what in ("config", "folder", "environment"):  # settings and the variant's name say it
                run.pop(what)
        out = self.arguments.out / self.arguments.name
        write_text(out.with_suffix(".json"), json.dumps(story, indent=2) + "\n")
        write_text(out.with_suffix(".txt"), told)
        write_plot([*rows, *(timing.rows if timing else [])], gains, runs, out.with_suffix(".png"))

    def command(self) -> str:
        """What makes these runs, without where they lie on this machine."""
        a = self.arguments
        words = ["--data", f"DATA/{Path(a.data).name}", "--steps", a.steps, "--val-tokens", a.val_tokens]
        words += ["--seeds", *a.seeds]
        for option, values, usual in (("--base", a.base, ()), ("--flips", a.flips, FLIPS)):
            words += [option, *values] if tuple(values) != usual else []
        words += ["--name", a.name] if a.name != "systems" else []
        return " ".join(map(str, ["python benchmarks/study_systems.py", *words]))

    def _finished(self, jobs: list[Job]) -> list[Run]:
        """Those that are finished. Raises PgolfError where a folder holds a run of other settings."""
        begun = [job for job in jobs if job.path.is_dir()]
        return read_runs(job for job in begun if not prepare(job, self.fingerprint, "sliding"))

    def _gains(self) -> dict[str, Gain]:
        """Differences between finished passes, over the same artifacts or over others."""
        base, without = f"steps/{BASELINE}", f"steps/{NO_META}"
        later = f"equal_time/{without}"
        wanted = {
            "sliding window": (base, "non_overlapping", base, "sliding"),
            "SGD on top of it": (base, "sliding", base, SGD),
            "LoRA on top of it": (base, "sliding", base, LORA),
            "both, as published": (base, "non_overlapping", base, SGD),
            "SGD on top, trained without FOMAML": (without, "sliding", without, SGD),
            "no FOMAML, with SGD, equal steps": (base, SGD, without, SGD),
            "no FOMAML, with SGD, equal time": (base, SGD, later, SGD),
        }
        return {name: gain for name, where in wanted.items() if (gain := self._gain(*where)) is not None}

    def _gain(self, folder: str, before: str, other: str, after: str) -> Gain | None:
        pairs = {}
        for seed in self.seeds:
            a, b = self._losses(folder, seed), self._losses(other, seed)
            if before in a and after in b:
                pairs[seed] = a[before], b[after], a["text_bytes"]
        return make_gain(pairs) if pairs else None

    def _losses(self, folder: str, seed: int) -> dict[str, np.ndarray]:
        """By document: text bytes, and the nats of every finished pass over a run's artifact."""
        path = self.runs / folder / f"seed{seed}"
        if not (path / DOCUMENTS).is_file():
            return {}
        passes = path.glob("ttt_sweep/*.json")
        nats = {file.stem: np.array(json.loads(file.read_text(encoding="utf-8"))["nats"]) for file in passes}
        return {**nats, **documents(path)}


if __name__ == "__main__":
    main()
