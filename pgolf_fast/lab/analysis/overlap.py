"""Angles between the leading subspaces of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf_fast.console import Table, number
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, mean, tabulate
from pgolf_fast.lab.analysis.weights import flattened, large, leading, pairs
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALIGNED = 0.9  # the published form counts directions whose cosine exceeds this


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines of the principal angles between subspaces with orthonormal columns.

    a and b are (..., d, k); the result (..., k) is in descending order (Bjorck and Golub 1973).
    """
    return torch.linalg.svdvals(a.mT @ b).clamp_max(1.0)


def random_overlap(directions: int, dimension: int) -> tuple[float, float]:
    """Return mean and deviation of the mean squared cosine of random k-dimensional subspaces in d dimensions.

    The mean is k / d; the sum of squares has variance 2 k^2 (d-k)^2 / (d^2 (d-1) (d+2)).
    """
    k, d = directions, dimension
    if d == 1:
        return 1.0, 0.0
    return k / d, math.sqrt(2 / ((d - 1) * (d + 2))) * (d - k) / d


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure principal angles of each pair of models: across slots as published, and within each slot.

    Raises PgolfError naming a tensor whose shapes differ.
    """
    return [form(a, b) for a, b in pairs(models) for form in (published, corrected)]


def published(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare the leading left singular vectors of large tensors, with banks flattened to one row per slot.

    As many vectors as a quarter of the smaller side, at most 32: 5 for 22 slots and 2 for 11 (PR 1501).
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name in (n for n in large(a.state) if n in b.state):
        matrices = [flattened(model.state[name]) for model in (a, b)]
        k = leading(min(matrices[0].shape))
        left = [torch.linalg.svd(matrix, full_matrices=False).U[:, :k] for matrix in matrices]
        cosines = principal_cosines(*left)
        tensors[name] = {
            "directions": k,
            "dimension": len(left[0]),
            "mean_cosine": float(cosines.mean()),
            "aligned": float((cosines > ALIGNED).double().mean()),
            "cosines": cosines.tolist(),
        }
    columns: list[Column] = [
        ("directions", "directions", "d"),
        ("of", "dimension", "d"),
        ("mean cosine", "mean_cosine", ".3f"),
        (f"above {ALIGNED}", "aligned", ".3f"),
    ]
    overall = {key: mean(v[key] for v in tensors.values()) for key in ("mean_cosine", "aligned")}
    table = tabulate(("tensor",), columns, tensors)
    last = ("mean", "-", "-", *(number(value, ".3f") for value in overall.values()))
    sizes = dict.fromkeys(f"{tensors[n]['directions']} of {tensors[n]['dimension']}" for n in BANK_NAMES)
    return Summary(
        f"subspace overlap, {a.name} and {b.name}",
        "published",
        f"Shows which mixtures of slots are strongest in a bank ({', '.join(sizes)}), or of tokens in a "
        "table; cannot show whether layers work in the same subspaces, as directions of the residual stream "
        "are not compared, and random mixtures of so few slots overlap as much.",
        Table(table.header, (*table.rows, last)),
        {"tensors": tensors, "mean": overall},
    )


def corrected(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare the leading left and right singular subspaces of each slot, next to random ones."""
    values: dict[str, Any] = {}
    for name in BANK_NAMES:
        stacks = [model.state[name].double() for model in (a, b)]
        k = leading(min(stacks[0].shape[1:]))
        parts = [torch.linalg.svd(stack, full_matrices=False) for stack in stacks]
        sides = {"outputs": [p.U[:, :, :k] for p in parts], "inputs": [p.Vh.mT[:, :, :k] for p in parts]}
        values[name] = {}
        for side, (x, y) in sides.items():
            by_chance, deviation = random_overlap(k, x.shape[1])
            values[name][side] = {
                "directions": k,
                "dimension": x.shape[1],
                "mean_squared_cosine_by_slot": principal_cosines(x, y).square().mean(1).tolist(),
                "if_random": by_chance,
                "spread_if_random": deviation,
            }
    slots = "mean_squared_cosine_by_slot"
    columns: list[Column] = [
        ("slots", slots, lambda by_slot: f"{len(by_slot)}"),
        ("directions", "directions", "d"),
        ("of", "dimension", "d"),
        ("mean cosine²", slots, lambda by_slot: f"{fmean(by_slot):.4f}"),
        ("spread", slots, lambda by_slot: f"{pstdev(by_slot):.4f}"),
        ("if random", "if_random", ".4f"),
        ("± if random", "spread_if_random", ".1e"),
    ]
    return Summary(
        f"subspace overlap by slot, {a.name} and {b.name}",
        "corrected",
        "Shows whether the strongest outputs and inputs of the same matrix share a subspace more than random "
        "ones would; cannot show why (a common initialization or data set is enough), and compares hidden "
        "channels and heads (outputs of the MLP's first matrix and of Q, K, V, inputs of its second and of "
        "attention's projection) only in the order they happen to have.",
        tabulate(("bank", "side"), columns, values),
        values,
        draw("overlap", lambda axes: _paint(axes, values), 2, width=9),
    )


def _paint(axes: list[Axes], values: dict[str, Any]) -> None:
    for panel, side in zip(axes, ("outputs", "inputs"), strict=True):
        for name, sides in values.items():
            part = sides[side]
            (line,) = panel.plot(part["mean_squared_cosine_by_slot"], "o-", markersize=3, label=name)
            panel.axhline(part["if_random"], color=line.get_color(), linestyle=":", linewidth=1)
        panel.set(xlabel="slot", ylabel="mean squared cosine", title=f"{side} (dotted: random)")
    axes[0].legend(fontsize=8)
