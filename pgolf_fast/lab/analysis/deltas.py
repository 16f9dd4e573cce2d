"""Distances between the weights of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from pgolf_fast.console import Table, number
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, mean, ratio, tabulate
from pgolf_fast.lab.analysis.weights import common, cosine, norm, pairs
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Compare each pair of models by distance and cosine: whole tensors as published, and each slot.

    Raises PgolfError naming a tensor whose shapes differ.
    """
    return [form(a, b) for a, b in pairs(models) for form in (published, corrected)]


def published(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare every tensor of at least 2 elements as one vector (PR 1501)."""
    tensors: dict[str, dict[str, float | None]] = {}
    for name in common((a, b)):
        x, y = a.state[name], b.state[name]
        if x.numel() >= 2:
            length, distance = norm(x), norm(y - x)
            tensors[name] = {
                "norm_a": length,
                "norm_b": norm(y),
                "distance": distance,
                "relative_l2": ratio(distance, length),
                "cosine": cosine(x, y),
            }
    tensors = dict(sorted(tensors.items(), key=lambda item: -(item[1]["relative_l2"] or 0.0)))
    columns: list[Column] = [
        ("|A|", "norm_a", ".5g"),
        ("|B|", "norm_b", ".5g"),
        ("|B-A|", "distance", ".5g"),
        ("|B-A|/|A|", "relative_l2", ".5g"),
        ("cosine", "cosine", ".4f"),
    ]
    return Summary(
        f"weight deltas, {a.name} to {b.name}",
        "published",
        "Shows how far apart two tensors are as long vectors; cannot show that the networks differ, since "
        "reordering hidden channels or heads changes every number here but not the function.",
        tabulate(("tensor",), columns, tensors),
        {
            "tensors": tensors,
            "mean_cosine_banks": mean(tensors[name]["cosine"] for name in BANK_NAMES),
            "mean_cosine_others": mean(t["cosine"] for name, t in tensors.items() if name not in BANK_NAMES),
        },
    )


def corrected(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare the matrix of each slot, next to what independent weights would give.

    Two vectors of n elements with independent random directions have cosine 0 +- 1/sqrt(n), and
    |B - A| / |A| = sqrt(1 + |B|^2 / |A|^2). A slot that is zero in either model has None.
    """
    values = {name: _compare_slots(a.state[name], b.state[name]) for name in BANK_NAMES}
    header = (
        *("bank", "slots", "mean cosine", "spread", "lowest", "highest", "if independent"),
        *("|B-A|/|A|", "if independent"),
    )
    return Summary(
        f"weight deltas by slot, {a.name} to {b.name}",
        "corrected",
        "Shows for each matrix whether two models share a direction more than independent weights would; "
        "cannot show whether they compute the same, as hidden channels and heads are not aligned first (that "
        "is not attempted).",
        Table(header, [(name, *_cells(bank)) for name, bank in values.items()]),
        values,
        draw("cosines", lambda axes: _paint(axes, values)),
    )


def _compare_slots(a: Tensor, b: Tensor) -> dict[str, Any]:
    x, y = a.double().flatten(1), b.double().flatten(1)
    norm_x, norm_y, distance = x.norm(dim=1), y.norm(dim=1), (y - x).norm(dim=1)
    # A zero slot has no direction; it keeps its place as None
    usable = ((norm_x > 0) & (norm_y > 0)).tolist()
    by_slot = {
        "cosine_by_slot": (x * y).sum(1) / (norm_x * norm_y),
        "relative_l2_by_slot": distance / norm_x,
        "relative_l2_if_independent": (1 + (norm_y / norm_x).square()).sqrt(),
    }
    return {
        "elements": x.shape[1],
        "cosine_spread_if_independent": 1 / math.sqrt(x.shape[1]),
        **{
            key: [value if known else None for value, known in zip(slots.tolist(), usable, strict=True)]
            for key, slots in by_slot.items()
        },
    }


def _cells(bank: dict[str, Any]) -> list[str]:
    cosines = [value for value in bank["cosine_by_slot"] if value is not None]
    statistics = (fmean, pstdev, min, max)
    return [
        f"{len(bank['cosine_by_slot'])}",
        *(number(statistic(cosines) if cosines else None, ".4f") for statistic in statistics),
        f"0 ± {bank['cosine_spread_if_independent']:.1e}",
        number(mean(bank["relative_l2_by_slot"]), ".4f"),
        number(mean(bank["relative_l2_if_independent"]), ".4f"),
    ]


def _paint(axes: list[Axes], values: dict[str, Any]) -> None:
    for name, bank in values.items():
        cosines = [math.nan if cosine is None else cosine for cosine in bank["cosine_by_slot"]]
        (line,) = axes[0].plot(cosines, "o-", markersize=3, label=name)
        width = 2 * bank["cosine_spread_if_independent"]
        for level in (-width, width):
            axes[0].axhline(level, color=line.get_color(), linestyle=":", linewidth=1)
    axes[0].set(xlabel="slot", ylabel="cosine", title="cosine by slot (dotted: independent weights, ± 2 sd)")
    axes[0].legend(fontsize=8)
