"""Distances among three models or more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.console import Table, number
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, ratio, tabulate
from pgolf_fast.lab.analysis.weights import common, norm
from pgolf_fast.model.bank import BANK_NAMES

EQUILATERAL = 0.85  # the shorter sides of a near-equilateral triangle exceed this share of the longest
SAME = 1e-12  # squared distances below this share of the squared norms are rounding, without a direction


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure the sides of every triangle of models as published, and its angles.

    Raises PgolfError naming a tensor whose shapes differ.
    """
    common(models)
    return [form(three) for three in combinations(models, 3) for form in (published, corrected)]


def published(three: Sequence[LoadedModel]) -> Summary:
    """Sum the distances of the tensors, and the norms of their centroid (PR 1502).

    A triangle is near-equilateral if its two shorter sides exceed 0.85 of the longest. The norm of the
    centroid is relative to the first model, as that of a midpoint is.
    """
    names = common(three)
    sides: dict[str, dict[str, float]] = {}
    for a, b in combinations(three, 2):
        distances = {name: norm(a.state[name] - b.state[name]) for name in names}
        banks, total = sum(distances[name] for name in BANK_NAMES), sum(distances.values())
        sides[f"{a.name} - {b.name}"] = {"banks": banks, "others": total - banks, "total": total}
    *shorter, longest = sorted(side["total"] for side in sides.values())
    equilateral = min(shorter) > EQUILATERAL * longest
    centroid = sum(norm(torch.stack([model.state[n] for model in three]).double().mean(0)) for n in names)
    share = ratio(centroid, sum(norm(three[0].state[name]) for name in names))
    columns: list[Column] = [(key, key, ".5g") for key in ("banks", "others", "total")]
    table = tabulate(("side",), columns, sides)
    rows = [
        ("near-equilateral", "-", "-", "yes" if equilateral else "no"),
        ("|centroid| / |first|", "-", "-", number(share, ".4f")),
    ]
    return Summary(
        f"triangle of {_names(three)}",
        "published",
        "Shows the distance between each pair of models; cannot show that they are different solutions, "
        "since any three weights of one length and one common cosine form an equilateral triangle.",
        Table(table.header, (*table.rows, *rows)),
        {"sides": sides, "near_equilateral": equilateral, "centroid_ratio": share},
    )


def corrected(three: Sequence[LoadedModel]) -> Summary:
    """Measure the angle at each model between the other two, for the banks and for everything else.

    Independent weights of the same norms a, b, c are orthogonal: the cosine of their angle at a is
    a^2 / sqrt((a^2 + b^2) (a^2 + c^2)), which is 1/2 if all norms are equal.
    """
    names = common(three)
    parts = {
        "banks": [name for name in names if name in BANK_NAMES],
        "others": [name for name in names if name not in BANK_NAMES],
    }
    values: dict[str, Any] = {}
    angles: dict[str, dict[str, Any]] = {}
    for part, members in parts.items():
        products = gram([model.state for model in three], members)
        angles[part] = {}
        for i, model in enumerate(three):
            j, k = (n for n in range(3) if n != i)
            independent = angle_at(torch.diag(products.diagonal()), i, j, k)
            angles[part][model.name] = {
                "degrees": angle_at(products, i, j, k),
                "if_independent": independent,
            }
        lengths = products.diagonal().sqrt()
        cosines = products / lengths[:, None] / lengths
        pairs = combinations(range(3), 2)
        known = [float(cosines[i, j]) if products[i, i] and products[j, j] else None for i, j in pairs]
        values[part] = {**angles[part], "cosines": known}
    columns: list[Column] = [("degrees", "degrees", ".2f"), ("if independent", "if_independent", ".2f")]
    return Summary(
        f"angles of {_names(three)}",
        "corrected",
        "Shows whether two models are in a common direction as seen from the third, more (a smaller angle) "
        "than independent weights of these norms would be; cannot show whether they compute the same, as "
        "hidden channels and heads are not aligned first.",
        tabulate(("part", "at"), columns, angles),
        values,
    )


def gram(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Tensor:
    """Return the inner products of models over the named tensors, float64 (models, models)."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in names:
        rows = torch.stack([state[name].double().flatten() for state in states])
        total += rows @ rows.T
    return total


def angle_at(products: Tensor, i: int, j: int, k: int) -> float | None:
    """Return the degrees between (j - i) and (k - i) from inner products; None if either is only rounding."""
    p = products
    dot = float(p[j, k] - p[i, j] - p[i, k] + p[i, i])
    first, second = (float(p[i, i] + p[n, n] - 2 * p[i, n]) for n in (j, k))
    if any(side <= SAME * float(p[i, i] + p[n, n]) for side, n in ((first, j), (second, k))):
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(first * second)))))


def _names(three: Sequence[LoadedModel]) -> str:
    return ", ".join(model.name for model in three)
