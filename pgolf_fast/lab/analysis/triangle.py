"""Distances among three models or more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import number, ratio
from pgolf_fast.lab.analysis.weights import common, norm
from pgolf_fast.model.bank import BANK_NAMES

EQUILATERAL = 0.85  # of the longest side, that the others must exceed
SAME = 1e-12  # of the squared lengths, the squared distance below which it is rounding: no direction


def triangle_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Sides of every triangle of models as published, and its angles beside those of independent weights.

    Raises PgolfError naming a tensor whose shapes differ.
    """
    common(subjects)
    return [form(three) for three in combinations(subjects, 3) for form in (published, corrected)]


def published(three: Sequence[Subject]) -> Finding:
    """Sums of the tensors' distances: of banks, of the others, of all; and of the norms of the centroid.

    Near-equilateral: the two shorter sides exceed 0.85 of the longest. The centroid's ratio is the sum of its
    tensors' norms over that of the first model's, as the midpoint's is (PR 1502).
    """
    names = common(three)
    sides: dict[str, dict[str, float]] = {}
    for a, b in combinations(three, 2):
        apart = {name: norm(a.state[name] - b.state[name]) for name in names}
        banks = sum(apart[name] for name in BANK_NAMES)
        total = sum(apart.values())
        sides[f"{a.name} - {b.name}"] = {"banks": banks, "others": total - banks, "total": total}
    lengths = sorted(side["total"] for side in sides.values())
    equilateral = lengths[1] > EQUILATERAL * lengths[2] and lengths[0] > EQUILATERAL * lengths[2]
    centroid = sum(norm(torch.stack([s.state[n] for s in three]).double().mean(0)) for n in names)
    share = ratio(centroid, sum(norm(three[0].state[name]) for name in names))
    rows = [(name, *(number(value, ".5g") for value in side.values())) for name, side in sides.items()]
    rows.append(("near-equilateral", "-", "-", "yes" if equilateral else "no"))
    rows.append(("|centroid| / |first|", "-", "-", number(share, ".4f")))
    return Finding(
        f"triangle of {_names(three)}",
        "published",
        "Shows the distances between each two models; cannot show that they are different solutions, since "
        "any three weights of one length and one common cosine form an equilateral triangle.",
        ("side", "banks", "others", "total"),
        rows,
        {"sides": sides, "near_equilateral": equilateral, "centroid_ratio": share},
    )


def corrected(three: Sequence[Subject]) -> Finding:
    """The angle at each model between the ways to the other two, of banks and of everything else.

    Beside it the angle of independent weights of the same lengths a, b, c, which are orthogonal: at a, its
    cosine is a^2 / sqrt((a^2 + b^2) (a^2 + c^2)), 1/2 where all are equal.
    """
    names = common(three)
    parts = {
        "banks": [name for name in names if name in BANK_NAMES],
        "others": [name for name in names if name not in BANK_NAMES],
    }
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {}
    for part, members in parts.items():
        products = gram([s.state for s in three], members)
        found[part] = {}
        for i, subject in enumerate(three):
            j, k = (n for n in range(3) if n != i)
            angle = angle_at(products, i, j, k)
            independent = angle_at(torch.diag(products.diagonal()), i, j, k)
            found[part][subject.name] = {"degrees": angle, "if_independent": independent}
            rows.append((part, subject.name, number(angle, ".2f"), number(independent, ".2f")))
        lengths = products.diagonal().sqrt()
        cosines = products / lengths[:, None] / lengths
        found[part]["cosines"] = [
            float(cosines[i, j]) if products[i, i] and products[j, j] else None
            for i, j in combinations(range(3), 2)
        ]
    return Finding(
        f"angles of {_names(three)}",
        "corrected",
        "Shows whether two models lie in a common direction as seen from the third, more (a smaller angle) "
        "than independent weights of these lengths would; cannot show whether they compute the same, as "
        "hidden channels and heads are not aligned first.",
        ("part", "at", "degrees", "if independent"),
        rows,
        found,
    )


def gram(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Tensor:
    """Inner products of models over the named tensors, float64 (models, models)."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in names:
        rows = torch.stack([state[name].double().flatten() for state in states])
        total += rows @ rows.T
    return total


def angle_at(products: Tensor, i: int, j: int, k: int) -> float | None:
    """Degrees between (j - i) and (k - i), from inner products; None where one is zero but for rounding."""
    p = products
    dot = float(p[j, k] - p[i, j] - p[i, k] + p[i, i])
    first, second = (float(p[i, i] + p[n, n] - 2 * p[i, n]) for n in (j, k))
    if any(side <= SAME * float(p[i, i] + p[n, n]) for side, n in ((first, j), (second, k))):
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(first * second)))))


def _names(three: Sequence[Subject]) -> str:
    return ", ".join(subject.name for subject in three)
