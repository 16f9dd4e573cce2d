"""Singular values of the weight matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf_fast.bench.drawing import label
from pgolf_fast.console import Table, number
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, mean, mean_and_deviation, ratio, tabulate
from pgolf_fast.lab.analysis.weights import flattened, large
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDS = 5  # singular values listed from either end


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix or a stack of matrices in descending order, float64."""
    return torch.linalg.svdvals(matrix.double())


def condition(values: Tensor) -> float | None:
    """Return the largest over the smallest singular value, or None if the smallest is zero."""
    return ratio(float(values[0]), float(values[-1]))


def stable_rank(values: Tensor) -> float | None:
    """Return the sum of squares over the largest square: the number of equally strong directions."""
    return ratio(float(values.square().sum()), float(values[0].square()))


def effective_rank(values: Tensor) -> float | None:
    """Return exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
    total = float(values.sum())
    if not total:
        return None
    shares = values / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure singular values of flattened banks as published, and of the matrix of each slot."""
    return [published(models), corrected(models)]


def published(models: Sequence[LoadedModel]) -> Summary:
    """Measure each large tensor, with banks flattened to one row per slot (PR 1501)."""
    headers = {
        "op_norm": "largest",
        "frobenius": "Frobenius",
        "stable_rank": "stable rank",
        "condition": "condition",
    }
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for model in models:
        tensors: dict[str, dict[str, Any]] = {}
        for name in large(model.state):
            sigma = singular_values(flattened(model.state[name]))
            tensors[name] = {
                "op_norm": float(sigma[0]),
                "frobenius": float(sigma.norm()),
                "stable_rank": stable_rank(sigma),
                "condition": condition(sigma),
                "top": sigma[:ENDS].tolist(),
                "bottom": sigma[-ENDS:].tolist(),
            }
        means = {key: mean(part[key] for part in tensors.values()) for key in headers}
        lipschitz = sum(math.log(part["op_norm"]) for part in tensors.values() if part["op_norm"])
        for name, part in {**tensors, f"mean of {len(tensors)}": means}.items():
            rows.append((model.name, name, *(number(part[key]) for key in headers)))
        rows.append((model.name, "sum of ln of largest", number(lipschitz), "-", "-", "-"))
        values[model.name] = {"tensors": tensors, "means": means, "log_lipschitz": lipschitz}
    return Summary(
        "spectra of flattened banks",
        "published",
        "Shows the singular values of a bank flattened to a matrix with one row per slot; cannot show "
        "anything about its weight matrices, since a few long, nearly orthogonal rows of similar length have "
        "a condition near 1 and full rank whatever they contain, and embedding tables dominate the means.",
        Table(("model", "tensor", *headers.values()), rows),
        values,
    )


def corrected(models: Sequence[LoadedModel]) -> Summary:
    """Measure the matrix of each slot, averaged by bank."""
    values: dict[str, dict[str, dict[str, Any]]] = {}
    curves: dict[str, dict[str, Tensor]] = {}
    for model in models:
        values[model.name], curves[model.name] = {}, {}
        for name in BANK_NAMES:
            slots = singular_values(model.state[name])
            values[model.name][name] = {
                "full_rank": slots.shape[1],
                "largest": slots[:, 0].tolist(),
                "stable_rank": [stable_rank(sigma) for sigma in slots],
                "effective_rank": [effective_rank(sigma) for sigma in slots],
                "condition": [condition(sigma) for sigma in slots],
                "top": slots[:, :ENDS].tolist(),
            }
            curves[model.name][name] = slots.mean(0)
    averaged = ("largest", "stable_rank", "effective_rank", "condition")
    columns: list[Column] = [
        ("slots", "largest", lambda slots: f"{len(slots)}"),
        ("full rank", "full_rank", "d"),
        *((key.replace("_", " "), key, mean_and_deviation) for key in averaged),
    ]
    return Summary(
        "spectra of slots",
        "corrected",
        "Shows for each weight matrix how its strength is spread over directions (mean ± standard deviation "
        "over the slots of a bank); cannot show which directions the data uses, nor how any of it affects "
        "the loss.",
        tabulate(("model", "bank"), columns, values),
        values,
        draw("spectra", lambda axes: _paint(axes, curves), len(BANK_NAMES), width=11, height=3),
    )


def _paint(axes: list[Axes], curves: dict[str, dict[str, Tensor]]) -> None:
    for panel, name in zip(axes, BANK_NAMES, strict=True):
        for model, banks in curves.items():
            panel.plot(range(1, len(banks[name]) + 1), banks[name].tolist(), label=label(model))
        panel.set(title=name, xlabel="singular value", xscale="log")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("mean over slots")
    axes[0].legend(fontsize=7)
