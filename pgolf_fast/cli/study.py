"""Commands that study and compare runs: audit, report, ablate, seeds, ttt-sweep, analyze."""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from pgolf_fast import console
from pgolf_fast.cli import options
from pgolf_fast.cli.options import AllFields, Fields, Preset, Run, RunOrFile, Shards, Size, Words
from pgolf_fast.cli.run import TTT_FIELDS, OutCopy, results_in
from pgolf_fast.config.checks import unknown
from pgolf_fast.config.fields import field_name, flip
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import Weights, read_scores
from pgolf_fast.config.schema import PackConfig
from pgolf_fast.config.ttt import adapters
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import locked, need_writable, well_formed, write_json
from pgolf_fast.lab.analysis.summary import Options as AnalysisOptions

_OWN = "run"  # name of the run's own test-time training settings among the adapters


@dataclass(frozen=True)
class Audit(Shards):
    run: RunOrFile  # Run folder, or artifact file.
    fields: Annotated[Words, Fields(("eval", "ttt"), brief=("eval.*", *TTT_FIELDS))]
    tokens: int | None = None  # Targets to score, from the start of the data; default: eight windows.
    only: tuple[str, ...] = ()  # Run only these checks, for example C2 C5.
    limit_bytes: int = PackConfig.limit_bytes  # Limit on the total bytes of artifact and script.
    train_limit: float | None = None  # Limit on the training time, in seconds.
    eval_limit: float | None = None  # Limit on the evaluation time, in seconds.
    json: Path | None = None  # File for the findings; default: audit.json in the run, if all checks run.

    def main(self) -> int:
        options.existing(self.run, "run or artifact")
        from pgolf_fast.artifact.container import sizes
        from pgolf_fast.artifact.load import stored_config
        from pgolf_fast.lab.audit.check import broken, findings_table, run_checks
        from pgolf_fast.lab.audit.rules import checks
        from pgolf_fast.lab.audit.target import open_target

        out = self.json or (self.run / "audit.json" if self.run.is_dir() and not self.only else None)
        if out is not None:
            need_writable(out.parent, "--json FILE")
        config = flip(stored_config(self.run, self.data), self.fields)
        least = config.eval_seq_len
        if self.tokens is not None and self.tokens < least:
            raise PgolfError(f"--tokens is {self.tokens}; it must be at least one window of {least}")
        console.logger.info("auditing %s: opening it and its data", self.run)
        chosen = options.pick(self, "tokens data tokenizer")
        target = open_target(self.run, evaluation=config.eval, ttt=config.ttt, **chosen)
        known = checks(replace(target, **options.pick(self, "limit_bytes train_limit eval_limit")))
        if unknown := set(self.only) - {check.id for check in known}:
            raise PgolfError(f"there is no check {', '.join(sorted(unknown))}: choose C1 to C{len(known)}")
        results = run_checks(check for check in known if not self.only or check.id in self.only)
        findings = [{**asdict(result), "verdict": result.verdict} for result in results]
        print(findings_table(findings))
        if out is not None:
            content = {
                "audited": str(self.run),
                "artifact_sha256": None if target.artifact is None else sizes(target.artifact).sha256,
                "tokens": len(target.tokens) - 1,
                "findings": findings,
            }
            write_json(out, content)
            options.wrote(out)
        if wrong := broken(results):
            print(f"{len(wrong)} of {len(results)} do not hold: {', '.join(wrong)}")
        return 1 if wrong else 0


@dataclass(frozen=True)
class Report:
    run: Run  # Run folder, finished or not.
    out: Path | None = None  # HTML file, or folder for report.html; default: the run.
    audit: bool = False  # First audit the run, as `pgolf audit` does.

    def main(self) -> int:
        from pgolf_fast.lab.report.sections import write_report

        folder, _ = options.run_folder(self.run)
        page = self.out or folder.path
        page = page / "report.html" if page.is_dir() else page
        need_writable(page.parent, "--out FILE")
        if self.out is not None and self.audit:
            folder.audit_file = page.with_suffix(".audit.json")
        console.logger.info("reading %s and drawing its plots", folder.path)
        status = 0
        if self.audit:
            try:
                status = Audit(run=folder.path, fields=(), json=folder.audit_file).main()
            except PgolfError as error:  # a run that is not packed yet still gets a page
                print(f"not audited: {error}")
                status = 2
        options.wrote(write_report(folder, page))
        return status


@dataclass(frozen=True)
class Ablate:
    preset: Preset  # Baseline; `pgolf config` lists the presets.
    fields: AllFields
    # One variant; repeat the option for more. Write lists with commas; none switches a field off.
    flip: Annotated[tuple[Words, ...], UseAppendAction, arg(metavar="FIELD=VALUE ...")] = ()
    seeds: tuple[int, ...] = (42,)  # Seeds of the weights; baseline and variants are trained with each.
    # Equal optimizer steps; equal training time by the clock; both, one after the other; or (measured) as
    # many steps as fit into the baseline's training time, by step costs measured before the runs.
    budget: Literal["steps", "time", "both", "measured"] = "steps"
    steps: int | None = None  # Steps of every run with budget steps; default: the preset's.
    seconds: float | None = None  # Training time of every run with budget time; default: the preset's.
    # plain: non-overlapping windows only; sliding: also sliding windows; all: also test-time training.
    scores: Literal["plain", "sliding", "all"] = "all"
    # What the intervals are taken over; default: seeds if there are several, else documents.
    interval: Literal["seeds", "documents"] | None = None
    out: Path | None = None  # Folder of all runs; default: runs/ablate_PRESET. Finished runs are reused.
    workers: int | None = None  # Runs in parallel; default: one per GPU, or one. CPU runs share the cores.
    shrink: Size | None = None  # Size of the preset.

    def main(self) -> None:
        base = options.preset_with(self.preset, self.shrink, self.fields)
        if not all(self.flip):
            raise PgolfError("--flip has no FIELD=VALUE: write it like --flip train.meta=none")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise PgolfError("pgolf ablate starts its own processes: run it without torchrun")
        count = len(self.seeds)
        if self.interval == "seeds" and count < 2:
            raise PgolfError(f"an interval over seeds needs at least 2 --seeds, and has {count}")
        if self.interval == "documents" and count > 1:
            raise PgolfError(f"an interval over documents takes one seed, and --seeds has {count}")
        for word in (*self.fields, *(word for words in self.flip for word in words)):
            if field_name(word) == "train.seed":
                raise PgolfError(f"{word} has no effect: give seeds with --seeds")
        from pgolf_fast.data.source import open_source
        from pgolf_fast.lab.compare.jobs import fingerprint, prepare
        from pgolf_fast.lab.compare.processes import job_task, run_tasks

        out = self.out or Path("runs", f"ablate_{base.name}")
        jobs, slots = self._plan(base, out)
        data = fingerprint(open_source(base.data, base.model.vocab_size))
        busy = f"another pgolf ablate is running in {out}: wait until it has ended, or choose another --out"
        with locked(out / "ablation.lock", busy):
            left = [job for job in jobs if prepare(job, data, self.scores)]
            counts = len(jobs), len(jobs) - len(left), len(slots)
            console.logger.info("%d runs, %d of them finished; %d at a time", *counts)
            if len({job.config.train.reptile for job in jobs if job.budget == "steps"}) > 1:
                console.logger.warning(
                    "variants differ in train.reptile, whose steps read other numbers of tokens than plain "
                    "ones, so equal steps are not equal work: compare these with --budget time"
                )
            failures = run_tasks([job_task(job.name, job.path) for job in left], slots)
            _print_ablation(jobs, out, None if failures else self.interval)
        if failures:
            name, reason = next(iter(failures.items()))
            first = f"{len(failures)} of {len(jobs)} runs failed, first {name} ({reason})"
            raise PgolfError(f"{first}; the same command tries them again")

    def _plan(self, base: Any, out: Path) -> tuple[list, list]:
        """Return the runs and the slots they run in, after measuring step costs for budget measured."""
        import torch

        from pgolf_fast.lab.compare import plan, processes

        budgets: tuple[plan.Budget, ...] = ("steps", "time") if self.budget == "both" else (self.budget,)
        variants = plan.make_variants(base, self.flip)
        for name, config in variants.items() if self.scores == "all" else ():  # before training, not after it
            if why := config.ttt.illegal:
                hint = "Give --scores sliding, and score single runs with pgolf eval --allow-illegal"
                raise PgolfError(f"{name}: ttt.adapter {config.ttt.adapter} breaks the rules: {why}. {hint}")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        slots = processes.make_slots(self.workers, gpus, timed="time" in budgets)
        costs = None
        if "measured" in budgets:
            costs = plan.step_costs(variants, out / "step_costs.json", workers=len(slots))
            print(plan.cost_table(costs, plan.BASELINE))
        limits: dict[str, Any] = {"steps": self.steps, "seconds": self.seconds}
        return plan.make_jobs(variants, self.seeds, budgets, out, costs=costs, **limits), slots


def _print_ablation(jobs: list, out: Path, interval: Any) -> None:
    from pgolf_fast.lab.compare import table

    with well_formed(out):
        runs = table.read_runs(jobs)
        rows, gains = table.make_rows(runs, interval), table.pass_gains(runs, interval)
    if not rows:
        return
    print(table.describe(rows, gains))
    if len(made_by := table.commits(runs)) > 1:
        print(f"\nnote: the runs were made by several versions of this package: {', '.join(made_by)}")
    write_json(out / "ablation.json", table.to_dict(rows, gains, runs))
    print()
    options.wrote(out / "ablation.json", table.draw_ablation(rows, runs, out / "ablation.png"))


@dataclass(frozen=True)
class Seeds:
    # Run folders of one recipe with different seeds, scored by `pgolf eval`.
    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN ...")]
    against: tuple[Path, ...] = ()  # Run folders of the recipe to beat.
    margin: float | None = None  # Nats per token to beat it by; default: 0.005, as the challenge asks.
    weights: Weights = "artifact"  # Scores of the packed artifacts, or of the float weights.

    def main(self) -> None:
        from pgolf_fast.lab.compare import statistics

        for where, runs in (("pgolf seeds", self.runs), ("--against", self.against or self.runs)):
            if len(runs) < 2:
                raise PgolfError(f"{where} needs at least 2 runs for a deviation, and has {len(runs)}")
        folders = [options.existing(run, "run folder") for run in (*self.runs, *self.against)]
        paths = [folder / f"scores_{self.weights}.json" for folder in folders]
        read = [read_scores(path) for path in paths]
        statistics.check_comparable(paths, read)
        scores = {"": read[: len(self.runs)], "against": read[len(self.runs) :]}
        print(statistics.group_table({name: group for name, group in scores.items() if group}))
        if self.against:
            margin = statistics.MARGIN if self.margin is None else self.margin
            print(f"\n{statistics.welch_table(scores[''], scores['against'], margin)}")


@dataclass(frozen=True)
class TttSweep(Shards):
    run: Run  # Run folder, packed.
    adapters: Words = ()  # Adapters by name; default: all, plus `run`, the run's own settings.
    stride: int | None = None  # Tokens between windows; default: the run's.
    tokens: int | None = None  # Score only this many validation tokens; default: all.
    after: int = 0  # Compare only documents that start at this target or later.
    allow_illegal: bool = False  # Also compare adapters that break the rules; their rows are labeled ILLEGAL.
    out: OutCopy = None

    def main(self) -> None:
        words = (*self.words, *options.given({"data.val_tokens": self.tokens, "eval.stride": self.stride}))
        config = options.run_folder(self.run, words)[1]
        known = adapters(config.eval_seq_len)
        usual = [*known, *([] if config.ttt in known.values() else [_OWN])]
        known[_OWN] = config.ttt
        for name in self.adapters:
            if name not in known:
                raise PgolfError(unknown("adapter", name, known))
        if self.after < 0:
            raise PgolfError(f"--after is {self.after}; it must not be negative")
        from pgolf_fast.distributed import join_world
        from pgolf_fast.lab.compare.sweep import sweep_run, sweep_table

        chosen = {name: known[name] for name in self.adapters or usual}
        with join_world() as world, results_in(self.run, self.out, words, None, world) as (folder, config):
            illegal = self.allow_illegal
            content = sweep_run(folder, config, chosen, world, after=self.after, allow_illegal=illegal)
        if world.is_main:
            print(sweep_table(content))
            for name, ttt in chosen.items():
                if ttt.illegal:
                    print(f"{name} BREAKS THE RULES of the challenge: {ttt.illegal}.")
            options.wrote(folder.sweep_file)


@dataclass(frozen=True)
class Analyze(Shards):
    # Run folders, checkpoints (.safetensors), artifacts (.pgolf), community .pt files.
    models: Annotated[tuple[Path, ...], Positional, arg(metavar="MODEL ...", help_behavior_hint="")] = ()
    only: tuple[str, ...] = ()  # Analyses, such as deltas quant; default: all that models and data allow.
    out: Path = Path("runs/analysis")  # Folder for analysis.json, the plots and report.html.
    # Weights to read from a run folder; auto takes the float weights if they are there.
    weights: Literal["auto", "float", "artifact"] = "auto"
    preset: str | None = None  # Preset for files without a configuration, such as .pt files.
    tokens: int = AnalysisOptions.tokens  # Validation targets to compute losses on.
    # Rows of additional hash tables whose buckets are counted, for example 3072 4096 10240.
    hash_rows: tuple[int, ...] = AnalysisOptions.hash_rows
    calibration_tokens: int = AnalysisOptions.calibration_tokens  # Tokens that weight the rounding errors.
    points: int = AnalysisOptions.points  # Points on the line between two models where the loss is measured.
    curvature_tokens: int = AnalysisOptions.curvature_tokens  # Validation targets of the error surface.
    probes: int = AnalysisOptions.probes  # Random vectors for the trace of the Hessian.
    lanczos_steps: int = AnalysisOptions.lanczos_steps  # Hessian-vector products for its extreme eigenvalues.
    seed: int = AnalysisOptions.seed  # Seed of all random vectors.

    def main(self) -> None:
        if not self.models:
            raise PgolfError("give at least one model: a run folder, a checkpoint, an artifact or a .pt file")
        for model in self.models:
            options.existing(model, "model")
        import torch

        from pgolf_fast.lab.analysis.models import open_models
        from pgolf_fast.lab.analysis.registry import check_names, run_analyses, write_results

        check_names(self.only)
        need_writable(self.out)
        config = None if self.preset is None else preset(self.preset)
        if self.data is not None:
            options.existing(self.data, "data folder")
        shared = {field.name for field in fields(AnalysisOptions)} & vars(self).keys()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = AnalysisOptions(device=device, **{name: getattr(self, name) for name in shared})
        models = open_models(self.models, self.weights, config)
        results = run_analyses(self.only, models, settings, lambda summary: print(f"{summary.text()}\n"))
        if results.skipped:
            reasons = (f"  {name}: {why}" for name, why in results.skipped.items())
            print("\n".join(["skipped:", *reasons]) + "\n")
        print(results.time_table())
        write_results(self.out, results)
        print(f"wrote {self.out / 'analysis.json'} and {self.out / 'report.html'}")
