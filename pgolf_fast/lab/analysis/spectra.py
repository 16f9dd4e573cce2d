"""Singular values of a model's matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf_fast.bench.drawing import label
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import mean, number, ratio, spread
from pgolf_fast.lab.analysis.weights import flattened, large
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDS = 5  # singular values listed from either end


def singular_values(matrix: Tensor) -> Tensor:
    """Of a matrix, or of each of a stack of them, in descending order, float64."""
    return torch.linalg.svdvals(matrix.double())


def condition(values: Tensor) -> float | None:
    """Largest over smallest singular value; None where the smallest is zero."""
    return ratio(float(values[0]), float(values[-1]))


def stable_rank(values: Tensor) -> float | None:
    """Sum of squares over the largest square: how many directions as strong as the first there would be."""
    return ratio(float(values.square().sum()), float(values[0].square()))


def effective_rank(values: Tensor) -> float | None:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
    total = float(values.sum())
    if not total:
        return None
    shares = values / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def spectrum_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Singular values of banks flattened to (slots, rows * columns), as published, and of each slot."""
    return [published(subjects), corrected(subjects)]


def published(subjects: Sequence[Subject]) -> Finding:
    """Largest singular value, Frobenius norm, stable rank and condition of each large tensor (PR 1501)."""
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {}
    for subject in subjects:
        parts: dict[str, dict[str, float | None]] = {}
        ends = {}
        for name in large(subject.state):
            values = singular_values(flattened(subject.state[name]))
            parts[name] = {
                "op_norm": float(values[0]),
                "frobenius": float(values.norm()),
                "stable_rank": stable_rank(values),
                "condition": condition(values),
            }
            ends[name] = {"top": values[:ENDS].tolist(), "bottom": values[-ENDS:].tolist()}
            rows.append((subject.name, name, *map(number, parts[name].values())))
        means = {key: mean([part[key] for part in parts.values()]) for key in next(iter(parts.values()))}
        lipschitz = sum(math.log(part["op_norm"]) for part in parts.values() if part["op_norm"])
        rows.append((subject.name, f"mean of {len(parts)}", *map(number, means.values())))
        rows.append((subject.name, "sum of ln of largest", number(lipschitz), "-", "-", "-"))
        tensors = {name: {**parts[name], **ends[name]} for name in parts}
        found[subject.name] = {"tensors": tensors, "means": means, "log_lipschitz": lipschitz}
    return Finding(
        "spectra of flattened banks",
        "published",
        "Shows the singular values of a bank read as a matrix with one row for each slot; cannot show "
        "anything about its weight matrices, since a few long and nearly orthogonal rows of similar length "
        "have a condition near 1 and full rank whatever is in them, and embedding tables rule the means.",
        ("model", "tensor", "largest", "Frobenius", "stable rank", "condition"),
        rows,
        found,
    )


def corrected(subjects: Sequence[Subject]) -> Finding:
    """Stable rank, condition, effective rank and largest singular value of each slot, by bank."""
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {}
    curves: dict[str, dict[str, Tensor]] = {}
    for subject in subjects:
        found[subject.name], curves[subject.name] = {}, {}
        for name in BANK_NAMES:
            every = singular_values(subject.state[name])
            kinds: dict[str, list[float | None]] = {
                "largest": [float(values[0]) for values in every],
                "stable_rank": [stable_rank(values) for values in every],
                "effective_rank": [effective_rank(values) for values in every],
                "condition": [condition(values) for values in every],
            }
            full = every.shape[1]
            tops = every[:, :ENDS].tolist()
            found[subject.name][name] = {"full_rank": full, **kinds, "top": tops}
            curves[subject.name][name] = every.mean(0)
            rows.append(
                (
                    subject.name,
                    name,
                    f"{len(every)}",
                    f"{full}",
                    *(spread(values) for values in kinds.values()),
                )
            )
    return Finding(
        "spectra of slots",
        "corrected",
        "Shows for each weight matrix how its strength is spread over directions (mean ± standard deviation "
        "over the slots of a bank); cannot show which directions the data uses, nor what any of it does to "
        "the loss.",
        (
            "model",
            "bank",
            "slots",
            "full rank",
            "largest",
            "stable rank",
            "effective rank",
            "condition",
        ),
        rows,
        found,
        drawn("spectra", lambda axes: _paint(axes, curves), len(BANK_NAMES), width=11, height=3),
    )


def _paint(axes: list[Axes], curves: dict[str, dict[str, Tensor]]) -> None:
    for panel, name in zip(axes, BANK_NAMES, strict=True):
        for subject, banks in curves.items():
            panel.plot(range(1, len(banks[name]) + 1), banks[name].tolist(), label=label(subject))
        panel.set(title=name, xlabel="singular value", xscale="log")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("mean over slots")
    axes[0].legend(fontsize=7)
