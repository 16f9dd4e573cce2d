"""Confidence intervals and significance tests for paired and unpaired runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np

from pgolf_fast.errors import PgolfError

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean difference in bits per byte, variant - baseline (negative is better), and its 95 % interval."""

    mean: float
    low: float
    high: float
    over: Literal["seeds", "documents"]
    """seeds: covers new runs of both; documents: covers other text for these two runs only."""
    count: int
    """Number of seeds or documents."""


@dataclass(frozen=True)
class WelchTest:
    """One-sided Welch's t-test of "the mean of b exceeds the mean of a by more than a margin"."""

    t: float
    degrees: float
    p: float


def welch_test(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> WelchTest:
    """Test whether b exceeds a by more than `margin`, with unequal variances and group sizes (Welch 1947).

    Raises PgolfError for fewer than two runs in a group, or if neither group's runs differ.
    """
    if min(len(a), len(b)) < 2:
        raise PgolfError("a deviation needs at least 2 runs in each group")
    if len(set(a)) == len(set(b)) == 1:
        raise PgolfError("all runs of a group have the same score: are they of different seeds?")
    result = _scipy_stats().ttest_ind([x - margin for x in b], a, equal_var=False, alternative="greater")
    return WelchTest(float(result.statistic), float(result.df), float(result.pvalue))


def over_seeds(baseline: Sequence[float], variant: Sequence[float]) -> Interval:
    """Return Student's t interval of the mean of variant[i] - baseline[i], where i is the seed.

    Raises PgolfError for fewer than two seeds.
    """
    differences = [b - a for a, b in zip(baseline, variant, strict=True)]
    count = len(differences)
    if count < 2:
        raise PgolfError(f"an interval over seeds needs at least 2 seeds, and has {count}: give more --seeds")
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    half = student_quantile(0.975, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, "seeds", count)


def over_documents(baseline: np.ndarray, variant: np.ndarray, text_bytes: np.ndarray) -> Interval:
    """Return the paired bootstrap interval of one run of each over the documents that both scored.

    All three are sums per document (documents,), in nats and bytes. Variation between seeds is not covered.
    """
    gain, low, high = bootstrap_gain(baseline, variant, text_bytes)
    return Interval(-gain, -high, -low, "documents", len(text_bytes))


def bootstrap_gain(
    before: np.ndarray, after: np.ndarray, text_bytes: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the bits per byte gained from `before` to `after`, and its 2.5 % and 97.5 % bootstrap points.

    All three are sums per document (documents,), in nats and bytes. Documents are drawn with replacement
    RESAMPLES times (Efron 1979). State that an adapter carries from one document to the next stays as it was:
    the interval covers other documents, not another order of them.
    """
    gained = before - after
    low, high = bootstrap_ratio(gained, math.log(2) * text_bytes, seed=seed)
    return float(gained.sum() / (math.log(2) * text_bytes.sum())), low, high


def bootstrap_ratio(part: np.ndarray, whole: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of sum(part) / sum(whole) over documents drawn with replacement.

    Both are sums per document (documents,); `whole` is not negative.
    """
    count = len(whole)
    rng, ratios = np.random.default_rng(seed), []
    # Resamples are drawn in batches of at most 2^22 counts (32 MiB) to bound memory.
    batch = max(1, 2**22 // count)
    for first in range(0, RESAMPLES, batch):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(batch, RESAMPLES - first))
        # A draw may hold no bytes at all; count it as one byte.
        ratios.append((times @ part) / np.maximum(times @ whole, math.log(2)))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


def student_quantile(p: float, degrees: float) -> float:
    """Return the p-quantile of Student's t distribution."""
    return float(_scipy_stats().t.ppf(p, degrees))


def _scipy_stats() -> ModuleType:
    """Import scipy.stats. Raises PgolfError naming the extra if SciPy is missing."""
    try:
        from scipy import stats
    except ImportError as error:
        raise PgolfError("t-tests and seed intervals need SciPy: pip install 'pgolf-fast[stats]'") from error
    return stats
