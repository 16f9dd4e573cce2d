"""Tables of an ablation: every variant against the baseline, every scoring pass against the one before."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.jobs import PASSES, documents, finished
from pgolf_fast.lab.compare.plan import BASELINE, Job
from pgolf_fast.lab.compare.statistics import Interval, over_documents, over_seeds

IntervalOver = Literal["seeds", "documents"]
SIGN = "difference = variant - baseline in bits per byte: negative is better than the baseline"
INTERVALS = {
    "seeds": "95 % intervals: Student's t on the paired differences of seeds",
    "documents": (
        "95 % intervals: paired bootstrap over the documents of one seed; "
        "variation between seeds is NOT covered"
    ),
}


@dataclass(frozen=True)
class FinishedRun:
    """A job and its result.json."""

    job: Job
    result: dict[str, Any]

    def bpb(self, score: str) -> float:
        return self.result["scores"][score]["bpb"]


@dataclass(frozen=True)
class VariantScore:
    """One score of a variant under one budget; numbers are means over seeds."""

    budget: str
    variant: str
    seeds: tuple[int, ...]
    steps: float
    ms_per_step: float | None
    """Median over a run's steps but the first, so rare slow steps (meta-learning) do not count. None if a
    run has only one step."""
    ms_per_step_mean: float | None
    """Mean over the same steps: includes rare slow steps and other load on the machine."""
    artifact_bytes: float
    score: str
    bpb: float
    difference: Interval | None
    """Difference from the baseline's runs of the same seeds; None for the baseline, or without such runs."""


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
        for score in _shared_scores(by_seed):
            rows.append(_row(budget, variant, score, by_seed, base, interval))
    return rows


def pass_gains(runs: Sequence[FinishedRun], interval: IntervalOver | None = None) -> list[PassGain]:
    """Return what each scoring pass gains over the one before it, for every variant with two or more.

    Sliding windows are compared with non-overlapping ones, test-time training with sliding windows.
    """
    gains = []
    for (budget, variant), by_seed in _by_variant(runs).items():
        scores = _shared_scores(by_seed)
        for before, after in pairwise(scores):
            gain = _interval(by_seed, before, by_seed, after, interval)
            gains.append(PassGain(budget, variant, before, after, gain))
    return gains


def _by_variant(runs: Sequence[FinishedRun]) -> dict[tuple[str, str], dict[int, FinishedRun]]:
    groups: dict[tuple[str, str], dict[int, FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.job.budget, run.job.variant), {})[run.job.seed] = run
    return groups


def _shared_scores(by_seed: dict[int, FinishedRun]) -> list[str]:
    """Return the scores that every seed has, in the order of PASSES."""
    return [s for s in PASSES["all"] if all(s in run.result["scores"] for run in by_seed.values())]


def _row(
    budget: str,
    variant: str,
    score: str,
    runs: dict[int, FinishedRun],
    base: dict[int, FinishedRun],
    interval: IntervalOver | None,
) -> VariantScore:
    def mean(name: str) -> float:
        return statistics.fmean(run.result[name] for run in runs.values())

    timed = all(run.result["ms_per_step"] is not None for run in runs.values())
    return VariantScore(
        budget,
        variant,
        tuple(runs),
        mean("steps"),
        mean("ms_per_step") if timed else None,
        mean("ms_per_step_mean") if timed else None,
        mean("artifact_bytes"),
        score,
        statistics.fmean(run.bpb(score) for run in runs.values()),
        _difference(base, runs, score, interval),
    )


def _difference(
    base: dict[int, FinishedRun], runs: dict[int, FinishedRun], score: str, interval: IntervalOver | None
) -> Interval | None:
    """Return the difference in one score over the seeds of both, or None if they share none."""
    shared = [seed for seed in runs if seed in base and score in base[seed].result["scores"]]
    if not shared:
        return None
    old, new = ({seed: by_seed[seed] for seed in shared} for by_seed in (base, runs))
    _check_same_text([*old.values(), *new.values()], score)
    return _interval(old, score, new, score, interval)


def _interval(
    base: dict[int, FinishedRun],
    before: str,
    runs: dict[int, FinishedRun],
    after: str,
    interval: IntervalOver | None,
) -> Interval:
    """Compare score `after` of `runs` with score `before` of `base`; both have the same seeds."""
    if interval == "seeds" or (interval is None and len(base) > 1):
        return over_seeds([base[s].bpb(before) for s in base], [runs[s].bpb(after) for s in base])
    if len(base) > 1:
        raise PgolfError(f"an interval over documents is of one seed, and there are {len(base)}: give one")
    (seed,) = base
    old, new = (documents(by_seed[seed].job.path) for by_seed in (base, runs))
    return over_documents(old[before], new[after], old["text_bytes"])


def _check_same_text(runs: Sequence[FinishedRun], score: str) -> None:
    first, *rest = ({k: run.result["scores"][score][k] for k in ("tokens", "bytes")} for run in runs)
    if any(other != first for other in rest):
        raise PgolfError(f"{runs[0].job.name} and others of its table were not scored on the same text")


def ablation_table(rows: Sequence[VariantScore]) -> Table:
    """Tabulate every variant's scores against the baseline."""
    header = ("budget", "variant", "seeds", "steps", "ms/step", "mean", "bytes", "score", "bpb")
    lines = [
        (
            row.budget,
            row.variant,
            len(row.seeds),
            f"{row.steps:,.0f}",
            *("-" if ms is None else f"{ms:.1f}" for ms in (row.ms_per_step, row.ms_per_step_mean)),
            f"{row.artifact_bytes:,.0f}",
            SCORES[row.score],
            f"{row.bpb:.5f}",
            *show_interval(row.difference),
        )
        for row in rows
    ]
    return Table((*header, "difference", "95 % interval"), lines)


def gain_table(gains: Sequence[PassGain]) -> Table:
    """Tabulate what each scoring pass gains over the one before."""
    header = ("budget", "variant", "score", "compared with", "difference", "95 % interval")
    return Table(
        header,
        [
            (g.budget, g.variant, SCORES[g.after], SCORES[g.before], *show_interval(g.difference))
            for g in gains
        ],
    )


def describe(rows: Sequence[VariantScore], gains: Sequence[PassGain] = ()) -> str:
    """Format the tables as text, preceded by the meaning of signs and intervals."""
    kinds = {row.difference.over for row in rows if row.difference is not None}
    kinds |= {gain.difference.over for gain in gains}
    notes = [SIGN, *(INTERVALS[kind] for kind in sorted(kinds, reverse=True))]
    notes.append("ms/step: median of a run's steps but the first; mean: with rare steps and other load")
    parts = ["\n".join(notes), ablation_table(rows).text()]
    if gains:
        parts.append(gain_table(gains).text())
    return "\n\n".join(parts)


def show_interval(interval: Interval | None) -> tuple[str, str]:
    """Format a difference and its interval."""
    if interval is None:
        return "-", "-"
    return f"{interval.mean:+.5f}", f"{interval.low:+.5f} to {interval.high:+.5f}"


def to_dict(
    rows: Sequence[VariantScore], gains: Sequence[PassGain], runs: Sequence[FinishedRun]
) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "sign": SIGN,
        "intervals": INTERVALS,
        "comparison": [asdict(row) for row in rows],
        "passes": [asdict(gain) for gain in gains],
        "runs": [{**run.result, "folder": str(run.job.path)} for run in runs],
    }


def commits(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the versions of this package that made the runs."""
    return sorted({run.result["commit"] for run in runs})
