"""How far apart the weights of two models are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import mean, number, ratio
from pgolf_fast.lab.analysis.weights import common, cosine, norm, pairs
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def delta_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Relative distances and cosines of each two models: of whole tensors as published, and of each slot.

    Raises PgolfError naming a tensor whose shapes differ.
    """
    return [form(a, b) for a, b in pairs(subjects) for form in (published, corrected)]


def published(a: Subject, b: Subject) -> Finding:
    """Every tensor of at least 2 elements, flattened: |A|, |B|, |B - A|, |B - A| / |A|, cosine (PR 1501)."""
    found: dict[str, dict[str, float | None]] = {}
    for name in common((a, b)):
        x, y = a.state[name], b.state[name]
        if x.numel() >= 2:
            norms, distance = (norm(x), norm(y)), norm(y - x)
            found[name] = {
                "norm_a": norms[0],
                "norm_b": norms[1],
                "distance": distance,
                "relative_l2": ratio(distance, norms[0]),
                "cosine": cosine(x, y),
            }
    order = sorted(found, key=lambda name: -(found[name]["relative_l2"] or 0.0))
    rows = [
        (name, *(number(value, ".4f" if key == "cosine" else ".5g") for key, value in found[name].items()))
        for name in order
    ]
    banks = [found[name]["cosine"] for name in BANK_NAMES]
    others = [found[name]["cosine"] for name in found if name not in BANK_NAMES]
    return Finding(
        f"weight deltas, {a.name} to {b.name}",
        "published",
        "Shows how far apart two tensors lie as long vectors; cannot show that the networks differ, since "
        "reordering hidden channels or heads changes every number here and nothing that is computed.",
        ("tensor", "|A|", "|B|", "|B-A|", "|B-A|/|A|", "cosine"),
        rows,
        {
            "tensors": {name: found[name] for name in order},
            "mean_cosine_banks": mean(banks),
            "mean_cosine_others": mean(others),
        },
    )


def corrected(a: Subject, b: Subject) -> Finding:
    """Cosine and relative distance of each slot's matrix, beside those of independent weights.

    Of two vectors of n elements with independent random directions the cosine is 0 +- 1/sqrt(n), and
    |B - A| / |A| is sqrt(1 + |B|^2 / |A|^2). A slot that is zero in one of them has None.
    """
    values: dict[str, Any] = {}
    rows = []
    for name in BANK_NAMES:
        x, y = a.state[name].double().flatten(1), b.state[name].double().flatten(1)
        lengths, others, apart = x.norm(dim=1), y.norm(dim=1), (y - x).norm(dim=1)
        usable = (lengths > 0) & (others > 0)
        by_slot = {
            "cosine_by_slot": (x * y).sum(1) / (lengths * others),
            "relative_l2_by_slot": apart / lengths,
            "relative_l2_if_independent": (1 + (others / lengths).square()).sqrt(),
        }
        cosines, relative, independent = (found[usable] for found in by_slot.values())
        width = 1 / math.sqrt(x.shape[1])
        values[name] = {
            "elements": x.shape[1],
            "cosine_spread_if_independent": width,
            **{
                key: [v if known else None for v, known in zip(found.tolist(), usable, strict=True)]
                for key, found in by_slot.items()
            },
        }
        if not len(cosines):
            rows.append((name, f"{len(x)}", *["-"] * 4, f"0 ± {width:.1e}", "-", "-"))
            continue
        spread = cosines.std(correction=0)
        rows.append(
            (
                name,
                f"{len(x)}",
                *(f"{float(v):.4f}" for v in (cosines.mean(), spread, cosines.min(), cosines.max())),
                f"0 ± {width:.1e}",
                f"{float(relative.mean()):.4f}",
                f"{float(independent.mean()):.4f}",
            )
        )
    return Finding(
        f"weight deltas by slot, {a.name} to {b.name}",
        "corrected",
        "Shows for each matrix whether two models share a direction beyond what independent weights would; "
        "cannot show whether they compute the same, as hidden channels and heads are not aligned first (that "
        "is not attempted).",
        (
            "bank",
            "slots",
            "mean cosine",
            "spread",
            "lowest",
            "highest",
            "if independent",
            "|B-A|/|A|",
            "if independent",
        ),
        rows,
        values,
        drawn("cosines", lambda axes: _paint(axes, values)),
    )


def _paint(axes: list[Axes], values: dict[str, Any]) -> None:
    for name, bank in values.items():
        cosines = [math.nan if cosine is None else cosine for cosine in bank["cosine_by_slot"]]
        (line,) = axes[0].plot(cosines, "o-", markersize=3, label=name)
        width = 2 * bank["cosine_spread_if_independent"]
        for level in (-width, width):
            axes[0].axhline(level, color=line.get_color(), linestyle=":", linewidth=1)
    axes[0].set(xlabel="slot", ylabel="cosine", title="cosine by slot (dotted: independent weights, ± 2 sd)")
    axes[0].legend(fontsize=8)
