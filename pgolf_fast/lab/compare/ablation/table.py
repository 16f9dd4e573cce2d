"""The table of an ablation: every variant beside the baseline, score by score."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pgolf_fast import console
from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.ablation.job import PASSES, documents, finished
from pgolf_fast.lab.compare.ablation.plan import BASELINE, Job
from pgolf_fast.lab.compare.ablation.statistics import Interval, over_documents, over_seeds

IntervalOver = Literal["seeds", "documents"]
HEADER = (
    "budget",
    "variant",
    "seeds",
    "steps",
    "ms/step",
    "mean",
    "bytes",
    "score",
    "bpb",
    "difference",
    "95 % interval",
)
SIGN = "difference = variant - baseline in bits per byte: negative is better than the baseline"


@dataclass(frozen=True)
class Run:
    """A finished run, and its result.json."""

    job: Job
    result: dict[str, Any]

    def bpb(self, score: str) -> float:
        return self.result["scores"][score]["bpb"]


@dataclass(frozen=True)
class Row:
    """One score of a variant under one budget; numbers are means over seeds."""

    budget: str
    variant: str
    seeds: tuple[int, ...]
    steps: float
    ms_per_step: float | None
    """Median of a run's steps but the first: the cost of rare ones, as of meta-learning, is not in it. None
    where a run has one step only."""
    ms_per_step_mean: float | None
    """With the rare steps, and with whatever else the machine did."""
    artifact_bytes: float
    score: str
    bpb: float
    difference: Interval | None
    """From the baseline's runs of the same seeds; None for the baseline, and where it has none of them."""


def read_runs(jobs: Iterable[Job]) -> list[Run]:
    """Those of the runs that are finished."""
    return [Run(job, result) for job in jobs if (result := finished(job)) is not None]


def make_rows(runs: Sequence[Run], interval: IntervalOver | None = None) -> list[Row]:
    """Each score of each variant under each budget, in the order of the runs.

    A difference is over the seeds that both have finished. Its interval is over seeds where there are two or
    more, else over documents; `interval` asks for one kind. Raises PgolfError where that cannot be had.
    """
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        groups.setdefault((run.job.budget, run.job.variant), {})[run.job.seed] = run
    rows = []
    for (budget, variant), by_seed in groups.items():
        base = {} if variant == BASELINE else groups.get((budget, BASELINE), {})
        for score in PASSES["all"]:
            if all(score in run.result["scores"] for run in by_seed.values()):
                rows.append(_row(budget, variant, score, by_seed, base, interval))
    return rows


def _row(
    budget: str,
    variant: str,
    score: str,
    runs: dict[int, Run],
    base: dict[int, Run],
    interval: IntervalOver | None,
) -> Row:
    def mean(name: str) -> float:
        return statistics.fmean(run.result[name] for run in runs.values())

    timed = all(run.result["ms_per_step"] is not None for run in runs.values())
    return Row(
        budget,
        variant,
        tuple(runs),
        mean("steps"),
        mean("ms_per_step") if timed else None,
        mean("ms_per_step_mean") if timed else None,
        mean("artifact_bytes"),
        score,
        statistics.fmean(run.bpb(score) for run in runs.values()),
        difference(base, runs, score, interval),
    )


def difference(
    base: dict[int, Run], runs: dict[int, Run], score: str, interval: IntervalOver | None = None
) -> Interval | None:
    """Of one score over the seeds of both; None where they share none. Raises PgolfError as `make_rows`."""
    shared = [seed for seed in runs if seed in base and score in base[seed].result["scores"]]
    if not shared:
        return None
    _check_same_text([base[seed] for seed in shared] + [runs[seed] for seed in shared], score)
    if interval == "seeds" or (interval is None and len(shared) > 1):
        return over_seeds([base[s].bpb(score) for s in shared], [runs[s].bpb(score) for s in shared])
    if len(shared) > 1:
        raise PgolfError(f"an interval over documents is of one seed, and there are {len(shared)}: give one")
    before, after = (documents(run.job.path) for run in (base[shared[0]], runs[shared[0]]))
    return over_documents(before[score], after[score], before["text_bytes"])


def _check_same_text(runs: Sequence[Run], score: str) -> None:
    first, *rest = ({k: run.result["scores"][score][k] for k in ("tokens", "bytes")} for run in runs)
    if any(other != first for other in rest):
        raise PgolfError(f"{runs[0].job.name} and others of its table were not scored on the same text")


def print_table(rows: Sequence[Row], *, timed: bool = True) -> str:
    """The rows as text, with what the signs and intervals mean above; without `timed`, no milliseconds."""
    lines = [
        (
            row.budget,
            row.variant,
            str(len(row.seeds)),
            f"{row.steps:,.0f}",
            *("-" if ms is None else f"{ms:.1f}" for ms in (row.ms_per_step, row.ms_per_step_mean) if timed),
            f"{row.artifact_bytes:,.0f}",
            SCORES[row.score],
            f"{row.bpb:.5f}",
            *show_interval(row.difference),
        )
        for row in rows
    ]
    kinds = {row.difference.over for row in rows if row.difference is not None}
    notes = [SIGN, *(INTERVALS[kind] for kind in sorted(kinds, reverse=True))]
    if timed:
        notes.append("ms/step: median of a run's steps but the first; mean: with rare steps and other load")
    header = [name for name in HEADER if timed or name not in ("ms/step", "mean")]
    return "\n".join([*notes, "", console.table(lines, header)])


INTERVALS = {
    "seeds": "95 % intervals: Student's t on the differences seed by seed",
    "documents": (
        "95 % intervals: paired bootstrap over the documents of one seed; "
        "how much another seed would change is NOT covered"
    ),
}


def show_interval(interval: Interval | None) -> tuple[str, str]:
    """The difference and its interval as text."""
    if interval is None:
        return "-", "-"
    return f"{interval.mean:+.5f}", f"{interval.low:+.5f} to {interval.high:+.5f}"


def to_dict(rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, Any]:
    """Everything as JSON values."""
    return {
        "sign": SIGN,
        "intervals": INTERVALS,
        "comparison": [asdict(row) for row in rows],
        "runs": [{**run.result, "folder": str(run.job.path)} for run in runs],
    }


def commits(runs: Sequence[Run]) -> list[str]:
    """The versions of this package that the runs were made by."""
    return sorted({run.result["commit"] for run in runs})
