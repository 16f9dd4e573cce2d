"""Tables and plot of an ablation: variants against the baseline, scoring passes against the one before."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pgolf_fast.bench.drawing import write_png
from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.jobs import PASSES, documents, finished
from pgolf_fast.lab.compare.plan import BASELINE, Job
from pgolf_fast.lab.compare.statistics import Interval, over_documents, over_seeds

IntervalOver = Literal["seeds", "documents"]
SIGN = "difference = variant - baseline in bits per byte: negative is better than the baseline"
INTERVALS = {"seeds": "95 % intervals: Student's t on the paired differences of seeds"}
INTERVALS["documents"] = "95 % intervals: paired bootstrap over the documents of one seed; "
INTERVALS["documents"] += "variation between seeds is NOT covered"
_DIFFERENCE = ("difference", "95 % interval")


@dataclass(frozen=True)
class FinishedRun:
    """A job and its result.json."""

    job: Job
    result: dict[str, Any]

    def bpb(self, score: str) -> float:
        """Return a score. Raises PgolfError if it is not a number."""
        bpb = self.result["scores"][score]["bpb"]
        if bpb is None or not math.isfinite(bpb):
            raise PgolfError(f"{self.job.path}: its {score} score is {bpb}; remove it and run it again")
        return bpb


BySeed = dict[int, FinishedRun]


@dataclass(frozen=True)
class VariantScore:
    """One score of a variant under one budget; numbers are means over seeds."""

    budget: str
    variant: str
    seeds: tuple[int, ...]
    steps: float
    # Median over a run's steps but the first, so rare slow steps (meta-learning) do not count; None if a run
    # has only one step
    ms_per_step: float | None
    ms_per_step_mean: float | None  # over the same steps: with rare slow steps and other load on the machine
    artifact_bytes: float
    score: str
    bpb: float
    difference: Interval | None  # from the baseline's runs of the same seeds; None if there are none


@dataclass(frozen=True)
class PassGain:
    """Difference between two scoring passes over the same artifacts of one variant."""

    budget: str
    variant: str
    before: str
    after: str
    difference: Interval


def read_runs(jobs: Iterable[Job]) -> list[FinishedRun]:
    """Read the results of the jobs that are finished."""
    return [FinishedRun(job, result) for job in jobs if (result := finished(job)) is not None]


def make_rows(runs: Sequence[FinishedRun], interval: IntervalOver | None = None) -> list[VariantScore]:
    """Return each score of each variant under each budget, in the order of the runs.

    A difference is over the seeds that both have finished. Its interval is over seeds if there are two or
    more, else over documents; `interval` asks for one kind. Raises PgolfError if that is not possible.
    """
    groups = _by_variant(runs)
    rows = []
    for (budget, variant), by_seed in groups.items():
        base = {} if variant == BASELINE else groups.get((budget, BASELINE), {})
        means: dict[str, Any] = {}
        for name in ("steps", "ms_per_step", "ms_per_step_mean", "artifact_bytes"):
            column = [run.result[name] for run in by_seed.values()]
            means[name] = None if None in column else statistics.fmean(column)
        for score in _shared_scores(by_seed):
            bpb = statistics.fmean(run.bpb(score) for run in by_seed.values())
            difference = _difference(base, by_seed, score, interval)
            one: dict[str, Any] = {"score": score, "bpb": bpb, "difference": difference}
            rows.append(VariantScore(budget, variant, tuple(by_seed), **means, **one))
    return rows


def pass_gains(runs: Sequence[FinishedRun], interval: IntervalOver | None = None) -> list[PassGain]:
    """Return what each scoring pass gains over the one before it, for every variant with two or more.

    Sliding windows are compared with non-overlapping ones, test-time training with sliding windows.
    """
    return [
        PassGain(*group, before, after, _interval(by_seed, before, by_seed, after, interval))
        for group, by_seed in _by_variant(runs).items()
        for before, after in pairwise(_shared_scores(by_seed))
    ]


def _by_variant(runs: Sequence[FinishedRun]) -> dict[tuple[str, str], BySeed]:
    groups: dict[tuple[str, str], BySeed] = {}
    for run in runs:
        groups.setdefault((run.job.budget, run.job.variant), {})[run.job.seed] = run
    return groups


def _shared_scores(by_seed: BySeed) -> list[str]:
    """Return the scores that every seed has, in the order of PASSES."""
    return [s for s in PASSES["all"] if all(s in run.result["scores"] for run in by_seed.values())]


def _difference(base: BySeed, runs: BySeed, score: str, interval: IntervalOver | None) -> Interval | None:
    """Return the difference in one score over the seeds of both, or None if they share none."""
    shared = [seed for seed in runs if seed in base and score in base[seed].result["scores"]]
    if not shared:
        return None
    old, new = ({seed: by_seed[seed] for seed in shared} for by_seed in (base, runs))
    both = [*old.values(), *new.values()]
    texts = [[run.result["scores"][score][k] for k in ("tokens", "bytes")] for run in both]
    if any(text != texts[0] for text in texts):
        raise PgolfError(f"{both[0].job.name} and other runs in its table were not scored on the same text")
    return _interval(old, score, new, score, interval)


def _interval(base: BySeed, before: str, runs: BySeed, after: str, interval: IntervalOver | None) -> Interval:
    """Compare score `after` of `runs` with score `before` of `base`; both have the same seeds."""
    if interval == "seeds" or (interval is None and len(base) > 1):
        return over_seeds([base[s].bpb(before) for s in base], [runs[s].bpb(after) for s in base])
    if len(base) > 1:
        raise PgolfError(f"an interval over documents takes one seed, and there are {len(base)}: give one")
    (seed,) = base
    old, new = (documents(by_seed[seed].job.path) for by_seed in (base, runs))
    return over_documents(old[before], new[after], old["text_bytes"])


def describe(rows: Sequence[VariantScore], gains: Sequence[PassGain] = ()) -> str:
    """Format the tables as text, preceded by the meaning of signs and intervals."""
    differences = [*(row.difference for row in rows), *(gain.difference for gain in gains)]
    kinds = {one.over for one in differences if one is not None}
    notes = [SIGN, *(INTERVALS[kind] for kind in sorted(kinds, reverse=True))]
    notes.append("ms/step: median of a run's steps but the first; mean: with rare steps and other load")
    header = ("budget", "variant", "seeds", "steps", "ms/step", "mean", "bytes", "score", "bpb", *_DIFFERENCE)
    lines = []
    for row in rows:
        speed = (f"{row.steps:,.0f}", *(number(ms, ".1f") for ms in (row.ms_per_step, row.ms_per_step_mean)))
        score = (f"{row.artifact_bytes:,.0f}", SCORES[row.score], f"{row.bpb:.5f}")
        difference = _show_interval(row.difference)
        lines.append((row.budget, row.variant, len(row.seeds), *speed, *score, *difference))
    parts = ["\n".join(notes), Table(header, lines).text()]
    passes = [
        (g.budget, g.variant, SCORES[g.after], SCORES[g.before], *_show_interval(g.difference)) for g in gains
    ]
    if passes:
        columns = ("budget", "variant", "score", "compared with", *_DIFFERENCE)
        parts.append(Table(columns, passes).text())
    return "\n\n".join(parts)


def _show_interval(interval: Interval | None) -> tuple[str, str]:
    if interval is None:
        return "-", "-"
    return f"{interval.mean:+.5f}", f"{interval.low:+.5f} to {interval.high:+.5f}"


def to_dict(
    rows: Sequence[VariantScore], gains: Sequence[PassGain], runs: Sequence[FinishedRun]
) -> dict[str, Any]:
    """Return everything as JSON values."""
    tables = {"comparison": [asdict(row) for row in rows], "passes": [asdict(gain) for gain in gains]}
    results = [{**run.result, "folder": str(run.job.path)} for run in runs]
    return {"sign": SIGN, "intervals": INTERVALS, **tables, "runs": results}


def commits(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the versions of this package that made the runs."""
    return sorted({run.result["commit"] for run in runs})


def draw_ablation(rows: Sequence[VariantScore], runs: Sequence[FinishedRun], path: Path) -> Path | None:
    """Write a PNG with a row of panels per budget, a column per score, and a line per variant.

    Returns None if nothing is compared or matplotlib is missing (with a warning).
    """
    compared = [(row, row.difference) for row in rows if row.difference is not None]
    if not compared:
        return None
    parts = [(row.budget, row.score, row.variant) for row, _ in compared]
    budgets, scores, names = (list(dict.fromkeys(part)) for part in zip(*parts, strict=True))

    def paint(figure) -> None:
        grid = figure.subplots(len(budgets), len(scores), sharex=True, sharey=True, squeeze=False)
        for row, d in compared:
            axes, y = grid[budgets.index(row.budget)][scores.index(row.score)], names.index(row.variant)
            bar = [[d.mean - d.low], [d.high - d.mean]]
            axes.errorbar(d.mean, y, xerr=bar, fmt="D", color="C0", capsize=4)
            points = seed_differences(row, runs)
            axes.plot(points, [y] * len(points), "o", color="0.55", markersize=4, zorder=3)
        grid[0][0].invert_yaxis()  # the axes are shared, so this puts every panel in the order of the table
        for budget, panels in zip(budgets, grid, strict=True):
            for score, axes in zip(scores, panels, strict=True):
                axes.axvline(0, color="0.3", linewidth=0.8)
                axes.set(title=f"{SCORES[score]}, equal {budget}")
                axes.set_yticks(range(len(names)), names)
                axes.margins(y=0.3)
                axes.grid(alpha=0.3, axis="x")
        what = "bits per byte above the baseline (left is better)"
        figure.supxlabel(f"{what}; bars: 95 % intervals, dots: seeds")

    size = (2 + 3.6 * len(scores), len(budgets) * (1.4 + 0.45 * len(names)))
    return write_png(path, paint, size, "picture")


def seed_differences(row: VariantScore, runs: Sequence[FinishedRun]) -> list[float]:
    """Return variant - baseline for each seed that both have."""
    bpb = {
        (run.job.variant, run.job.seed): run.bpb(row.score)
        for run in runs
        if run.job.budget == row.budget and row.score in run.result["scores"]
    }
    shared = [seed for seed in row.seeds if (BASELINE, seed) in bpb]
    return [bpb[row.variant, seed] - bpb[BASELINE, seed] for seed in shared]
