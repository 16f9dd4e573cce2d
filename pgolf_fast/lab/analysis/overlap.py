"""Angles between the leading subspaces of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import mean, number
from pgolf_fast.lab.analysis.weights import flattened, large, leading, pairs
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALIGNED = 0.9  # cosine above which the published analysis counts two directions as one


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles between two subspaces with orthonormal columns, or stacks of them.

    a and b (..., d, k); the result (..., k) is in descending order (Bjorck and Golub 1973).
    """
    return torch.linalg.svdvals(a.mT @ b).clamp_max(1.0)


def random_overlap(directions: int, dimension: int) -> tuple[float, float]:
    """Mean and standard deviation of the mean squared cosine between random subspaces of k in d dimensions.

    The mean is k / d; the sum of squares has the variance 2 k^2 (d-k)^2 / (d^2 (d-1) (d+2)).
    """
    k, d = directions, dimension
    if d == 1:
        return 1.0, 0.0
    return k / d, math.sqrt(2 / ((d - 1) * (d + 2))) * (d - k) / d


def overlap_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Principal angles of each two models: in the space of slots as published, and of each slot's matrix.

    Raises PgolfError naming a tensor whose shapes differ.
    """
    return [form(a, b) for a, b in pairs(subjects) for form in (published, corrected)]


def published(a: Subject, b: Subject) -> Finding:
    """Cosines between the leading left singular vectors of large tensors, banks as (slots, rows * columns).

    As many as a quarter of the smaller side, at most 32: 5 for 22 slots and 2 for 11 (PR 1501).
    """
    found: dict[str, dict[str, Any]] = {}
    for name in (n for n in large(a.state) if n in b.state):
        matrices = [flattened(subject.state[name]) for subject in (a, b)]
        k = leading(min(matrices[0].shape))
        left = [torch.linalg.svd(matrix, full_matrices=False).U[:, :k] for matrix in matrices]
        cosines = principal_cosines(*left)
        found[name] = {
            "directions": k,
            "dimension": len(left[0]),
            "mean_cosine": float(cosines.mean()),
            "aligned": float((cosines > ALIGNED).double().mean()),
            "cosines": cosines.tolist(),
        }
    rows: list[tuple[str, ...]] = [
        (n, f"{v['directions']}", f"{v['dimension']}", f"{v['mean_cosine']:.3f}", f"{v['aligned']:.3f}")
        for n, v in found.items()
    ]
    overall = {key: mean(v[key] for v in found.values()) for key in ("mean_cosine", "aligned")}
    rows.append(("mean", "-", "-", *(number(value, ".3f") for value in overall.values())))
    sizes = dict.fromkeys(f"{found[n]['directions']} of {found[n]['dimension']}" for n in BANK_NAMES)
    return Finding(
        f"subspace overlap, {a.name} and {b.name}",
        "published",
        f"Shows which mixtures of slots are strongest in a bank ({', '.join(sizes)}), and for tables of "
        "tokens; cannot show whether layers work in the same subspaces, as no direction of the residual "
        "stream enters, and random mixtures of so few slots overlap much as well.",
        ("tensor", "directions", "of", "mean cosine", f"above {ALIGNED}"),
        rows,
        {"tensors": found, "mean": overall},
    )


def corrected(a: Subject, b: Subject) -> Finding:
    """Mean squared cosines of each slot's leading left and right singular subspaces, beside random ones'."""
    found: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name in BANK_NAMES:
        stacks = [subject.state[name].double() for subject in (a, b)]
        slots, k = len(stacks[0]), leading(min(stacks[0].shape[1:]))
        parts = [torch.linalg.svd(stack, full_matrices=False) for stack in stacks]
        sides = {"outputs": [p.U[:, :, :k] for p in parts], "inputs": [p.Vh.mT[:, :, :k] for p in parts]}
        found[name] = {}
        for side, (x, y) in sides.items():
            squares = principal_cosines(x, y).square().mean(1)
            by_chance, deviation = random_overlap(k, x.shape[1])
            found[name][side] = {
                "directions": k,
                "dimension": x.shape[1],
                "mean_squared_cosine_by_slot": squares.tolist(),
                "if_random": by_chance,
                "spread_if_random": deviation,
            }
            rows.append(
                (
                    name,
                    side,
                    f"{slots}",
                    f"{k}",
                    f"{x.shape[1]}",
                    *(f"{float(v):.4f}" for v in (squares.mean(), squares.std(correction=0))),
                    f"{by_chance:.4f} ± {deviation:.1e}",
                )
            )
    return Finding(
        f"subspace overlap by slot, {a.name} and {b.name}",
        "corrected",
        "Shows whether the strongest outputs and inputs of the same matrix lie in a common subspace more "
        "than random ones would; cannot show why (a common initial draw or data set is enough), and compares "
        "hidden channels and heads (outputs of the MLP's first matrix and of Q, K, V, inputs of its second "
        "and of attention's projection) only in the order they happen to have.",
        ("bank", "side", "slots", "directions", "of", "mean cosine²", "spread", "if random"),
        rows,
        found,
        drawn("overlap", lambda axes: _paint(axes, found), 2, width=9),
    )


def _paint(axes: list[Axes], found: dict[str, Any]) -> None:
    for panel, side in zip(axes, ("outputs", "inputs"), strict=True):
        for name, sides in found.items():
            part = sides[side]
            (line,) = panel.plot(part["mean_squared_cosine_by_slot"], "o-", markersize=3, label=name)
            panel.axhline(part["if_random"], color=line.get_color(), linestyle=":", linewidth=1)
        panel.set(xlabel="slot", ylabel="mean squared cosine", title=f"{side} (dotted: random)")
    axes[0].legend(fontsize=8)
