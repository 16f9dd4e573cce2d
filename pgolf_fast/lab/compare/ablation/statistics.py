"""What differences between paired runs say: intervals over seeds, or over documents of one seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.seeds import student_quantile
from pgolf_fast.lab.compare.sweep import bootstrap_gain


@dataclass(frozen=True)
class Interval:
    """A mean difference in bits per byte, variant - baseline (negative is better), and its 95 % interval."""

    mean: float
    low: float
    high: float
    over: Literal["seeds", "documents"]
    """seeds: new runs of both; documents: other text for these two runs, and no other run."""
    count: int
    """How many of them."""


def over_seeds(baseline: Sequence[float], variant: Sequence[float]) -> Interval:
    """Student's t interval of the mean of variant[i] - baseline[i], runs of one seed each.

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
    """The paired bootstrap of one run of each over the documents that both scored.

    All are sums by document (documents,), in nats and bytes. How other seeds would differ is not in it.
    """
    gain, low, high = bootstrap_gain(baseline, variant, text_bytes)
    return Interval(-gain, -high, -low, "documents", len(text_bytes))
