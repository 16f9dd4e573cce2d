"""Confidence intervals and significance tests for paired and unpaired runs, and tables of groups of seeds."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.scores import labeled

RESAMPLES = 2000
MARGIN = 0.005  # nats per token: the challenge accepts a record that is better by that at p < 0.01


@dataclass(frozen=True)
class Interval:
    """A mean difference in bits per byte, variant - baseline (negative is better), and its 95 % interval."""

    mean: float
    low: float
    high: float
    # seeds: covers new runs of both; documents: covers other text for these two runs only
    over: Literal["seeds", "documents"]
    count: int  # of seeds or documents


def welch_test(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> Any:
    """Test whether b exceeds a by more than `margin`, with unequal variances and group sizes (Welch 1947).

    Returns SciPy's one-sided result: `statistic`, `df` and `pvalue`. Raises PgolfError for fewer than two
    runs in a group, or if neither group's runs differ.
    """
    if min(len(a), len(b)) < 2:
        raise PgolfError("a deviation needs at least 2 runs in each group")
    if len(set(a)) == len(set(b)) == 1:
        raise PgolfError("all runs of a group have the same score: are they of different seeds?")
    return _scipy_stats().ttest_ind([x - margin for x in b], a, equal_var=False, alternative="greater")


def over_seeds(baseline: Sequence[float], variant: Sequence[float]) -> Interval:
    """Return Student's t interval of the mean of variant[i] - baseline[i], where i is the seed.

    Raises PgolfError for fewer than two seeds.
    """
    differences = [b - a for a, b in zip(baseline, variant, strict=True)]
    count = len(differences)
    if count < 2:
        raise PgolfError(f"an interval over seeds needs at least 2 seeds, and has {count}: give more --seeds")
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    half = float(_scipy_stats().t.ppf(0.975, count - 1)) * error
    return Interval(mean, mean - half, mean + half, "seeds", count)


def over_documents(baseline: np.ndarray, variant: np.ndarray, text_bytes: np.ndarray) -> Interval:
    """Return the paired bootstrap interval of one run of each over the documents that both scored.

    All three are sums per document (documents,), in nats and bytes. Variation between seeds is not covered.
    """
    gain, low, high = bootstrap_gain(baseline, variant, text_bytes)
    return Interval(-gain, -high, -low, "documents", len(text_bytes))


def bootstrap_gain(
    before: np.ndarray, after: np.ndarray, text_bytes: np.ndarray
) -> tuple[float, float, float]:
    """Return the bits per byte gained from `before` to `after`, and its 2.5 % and 97.5 % bootstrap points.

    All three are sums per document (documents,), in nats and bytes. Documents are drawn with replacement
    RESAMPLES times (Efron 1979). State that an adapter carries from one document to the next stays as it was:
    the interval covers other documents, not another order of them.
    """
    gained = before - after
    low, high = bootstrap_ratio(gained, math.log(2) * text_bytes)
    return float(gained.sum() / (math.log(2) * text_bytes.sum())), low, high


def bootstrap_ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of sum(part) / sum(whole) over documents drawn with replacement.

    Both are sums per document (documents,); `whole` is not negative.
    """
    count = len(whole)
    rng, ratios = np.random.default_rng(0), []
    # Resamples are drawn in batches of at most 2^22 counts (32 MiB) to bound memory.
    batch = max(1, 2**22 // count)
    for first in range(0, RESAMPLES, batch):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(batch, RESAMPLES - first))
        # A draw may hold no bytes at all; count it as one byte.
        ratios.append((times @ part) / np.maximum(times @ whole, math.log(2)))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


def _scipy_stats() -> Any:
    """Import scipy.stats. Raises PgolfError naming the extra if SciPy is missing."""
    try:
        from scipy import stats
    except ImportError as error:
        raise PgolfError("t-tests and seed intervals need SciPy: pip install 'pgolf-fast[stats]'") from error
    return stats


def check_comparable(paths: Sequence[Path], scores: Sequence[dict]) -> None:
    """Raise PgolfError if two runs are one file or one model, or were scored on different text."""
    seen: dict[object, Path] = {}
    for path, run in zip(paths, scores, strict=True):
        if path.resolve() in seen:
            raise PgolfError(f"{path.parent} is named twice: a run counts once")
        # Two seeds never give three equal scores
        losses = tuple(run[name]["loss"] for name in SCORES)
        for same in (path.resolve(), run.get("artifact_sha256") or losses, losses):
            if (other := seen.setdefault(same, path)) != path:
                both = f"{other.parent} and {path.parent}"
                raise PgolfError(f"{both} hold the same model or a copy: a run counts once")
        for name in SCORES:
            ours, first = ((s[name]["tokens"], s[name]["bytes"]) for s in (run, scores[0]))
            if ours != first:
                text = f"{path} scored {ours[0]:,} targets of {ours[1]:,} bytes, {paths[0]} {first[0]:,} of "
                raise PgolfError(f"{text}{first[1]:,}: compare runs on the same text")


def group_table(groups: Mapping[str, Sequence[dict]]) -> Table:
    """Tabulate mean and sample standard deviation of every score over the runs of a group.

    `groups` maps a label ("" for none) to the contents of scores files.
    """
    rows = []
    for (label, scores), score in itertools.product(groups.items(), SCORES):
        columns = [[run[score][unit] for run in scores] for unit in ("bpb", "loss")]
        values = [value(column) for column in columns for value in (statistics.fmean, statistics.stdev)]
        title = _title(score, scores, label)
        rows.append((title, len(scores), *(f"{value:.6f}" for value in values)))
    return Table(("score", "runs", "bpb", "deviation", "nats/token", "deviation"), rows)


def welch_table(ours: Sequence[dict], theirs: Sequence[dict], margin: float) -> Table:
    """Tabulate Welch's t-test of every score: `ours` better than `theirs` by more than `margin` nats."""
    rows = []
    for score in SCORES:
        a, b = ([run[score]["loss"] for run in runs] for runs in (ours, theirs))
        test, gain = welch_test(a, b, margin), statistics.fmean(b) - statistics.fmean(a)
        numbers = (f"{gain:+.6f}", f"{test.statistic:.3f}", f"{test.df:.2f}", f"{test.pvalue:.3g}")
        rows.append((_title(score, [*ours, *theirs]), *numbers))
    return Table(("score", "nats gained", "t", "degrees", f"p of more than {margin:g}"), rows)


def _title(score: str, runs: Sequence[dict], label: str = "") -> str:
    illegal = score == "sliding_ttt" and any(run.get("illegal") for run in runs)
    return labeled(f"{SCORES[score]}, {label}" if label else SCORES[score], illegal)
