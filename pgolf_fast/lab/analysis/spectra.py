"""Singular values of the weight matrices."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.bench.drawing import Axes, label
from pgolf_fast.console import Table, number
from pgolf_fast.lab.analysis.geometry import flattened, large
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.summary import Options, Summary, columns, count, draw, mean, ratio, tabulate
from pgolf_fast.model.bank import BANK_NAMES

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
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total else None


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure singular values of flattened banks as published, and of the matrix of each slot."""
    return [published(models), corrected(models)]


def published(models: Sequence[LoadedModel]) -> Summary:
    """Measure each large tensor, with banks flattened to one row per slot (PR 1501)."""
    keys = ("op_norm", "frobenius", "stable_rank", "condition")
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
        means = {key: mean(part[key] for part in tensors.values()) for key in keys}
        lipschitz = sum(math.log(part["op_norm"]) for part in tensors.values() if part["op_norm"])
        for name, part in {**tensors, f"mean of {len(tensors)}": means}.items():
            rows.append((model.name, name, *(number(part[key]) for key in keys)))
        rows.append((model.name, "sum of ln of largest", number(lipschitz), "-", "-", "-"))
        values[model.name] = {"tensors": tensors, "means": means, "log_lipschitz": lipschitz}
    return Summary(
        "spectra of flattened banks",
        "Shows the singular values of a bank flattened to a matrix with one row per slot; cannot show "
        "anything about its weight matrices, since a few long, nearly orthogonal rows of similar length have "
        "a condition near 1 and full rank whatever they contain, and embedding tables dominate the means.",
        Table(("model", "tensor", "largest", "Frobenius", "stable rank", "condition"), rows),
        values,
        form="published",
    )


def corrected(models: Sequence[LoadedModel]) -> Summary:
    """Measure the matrix of each slot, averaged by bank."""
    slots = {m.name: {bank: singular_values(m.state[bank]) for bank in BANK_NAMES} for m in models}
    values = {m: {bank: _slot_values(sigma) for bank, sigma in banks.items()} for m, banks in slots.items()}
    shown = columns(count, largest="slots") + columns("d", full_rank="full rank")
    shown += columns(_mean_and_deviation, largest="largest", stable_rank="stable rank")
    shown += columns(_mean_and_deviation, effective_rank="effective rank", condition="condition")
    return Summary(
        "spectra of slots",
        "Shows for each weight matrix how its strength is spread over directions (mean ± standard deviation "
        "over the slots of a bank); cannot show which directions the data uses, nor how any of it affects "
        "the loss.",
        tabulate(("model", "bank"), shown, values),
        values,
        draw("spectra", lambda axes: _paint(axes, slots), len(BANK_NAMES), width=11, height=3),
    )


def _slot_values(slots: Tensor) -> dict[str, Any]:
    return {
        "full_rank": slots.shape[1],
        "largest": slots[:, 0].tolist(),
        "stable_rank": [stable_rank(sigma) for sigma in slots],
        "effective_rank": [effective_rank(sigma) for sigma in slots],
        "condition": [condition(sigma) for sigma in slots],
        "top": slots[:, :ENDS].tolist(),
    }


def _mean_and_deviation(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or not math.isfinite(fmean(known)):
        return "-"
    return f"{fmean(known):.4g} ± {pstdev(known):.2g}"


def _paint(axes: list[Axes], slots: dict[str, dict[str, Tensor]]) -> None:
    for panel, name in zip(axes, BANK_NAMES, strict=True):
        for model, banks in slots.items():
            curve = banks[name].mean(0).tolist()
            panel.plot(range(1, len(curve) + 1), curve, label=label(model))
        panel.set(title=name, xlabel="singular value", xscale="log")
    axes[0].set_ylabel("mean over slots")
    axes[0].legend()
