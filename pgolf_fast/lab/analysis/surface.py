"""The error surface: what stood for it, and its curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from pgolf_fast.bench.drawing import label
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.curvature import Estimate, LossSurface, extremes, random_signs, trace
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.spectra import ENDS, condition, effective_rank, singular_values
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import number, ratio, unmeasured
from pgolf_fast.lab.analysis.validation import Validation, diverged, validation_or_why
from pgolf_fast.lab.analysis.weights import flattened
from pgolf_fast.model.bank import BANK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHERS = "others"
LARGEST = 3  # Hessian eigenvalues from the top
CONVERGED = 0.1  # of an eigenvalue, the residual up to which it is not marked


def surface_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Published proxies from the banks' singular values; the Hessian's trace and extreme eigenvalues.

    The second needs tokens, and says what it lacks. Raises PgolfError for data that was asked for and cannot
    be read.
    """
    first, validation = published(subjects), validation_or_why(subjects, options)
    try:
        if isinstance(validation, str):
            raise PgolfError(validation)
        return [first, *corrected(subjects, validation, options)]
    except PgolfError as error:
        return [first, unmeasured("curvature of the loss", str(error))]


def published(subjects: Sequence[Subject]) -> Finding:
    """Of banks as (slots, rows * columns): condition, effective rank, sum of squares ("trace"), gap, top 5.

    The gap is the first singular value less the second, the last the five largest squares' share (PR 1502).
    """
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {}
    for subject in subjects:
        found[subject.name] = {}
        for name in BANK_NAMES:
            values = singular_values(flattened(subject.state[name]))
            squares = values.square()
            total = float(squares.sum())
            parts = {
                "condition": condition(values),
                "effective_rank": effective_rank(values),
                "trace_proxy": total,
                "gap": float(values[0] - values[1]) if len(values) > 1 else None,
                "top_energy": ratio(float(squares[:ENDS].sum()), total),
            }
            found[subject.name][name] = parts
            rows.append((subject.name, name, *map(number, parts.values())))
    return Finding(
        "error surface by proxies",
        "published",
        "Shows five functions of a flattened bank's singular values; cannot show anything of the error "
        'surface, since no loss and no data enters (the "trace" is the squared length of the weights).',
        ("model", "bank", "condition", "effective rank", '"trace"', "gap", f"top {ENDS} energy"),
        rows,
        found,
    )


def corrected(subjects: Sequence[Subject], validation: Validation, options: Options) -> list[Finding]:
    """Loss, gradient, Hessian trace (in all, and of each bank) and extreme Hessian eigenvalues.

    Raises PgolfError where a model is not what its configuration says, or its loss or gradient is not finite.
    """
    ids = torch.from_numpy(validation.first(options.curvature_tokens)).to(options.device)
    tokens, targets = (part.view(-1, validation.seq_len) for part in (ids[:-1], ids[1:]))
    found: dict[str, Any] = {}
    for subject in subjects:
        model = subject.model(validation.source.table, options.device, torch.float64)
        surface = LossSurface(model, tokens, targets)
        if not math.isfinite(surface.loss + float(surface.gradient.norm())):
            raise diverged(subject.name, "loss and gradient")
        signs = random_signs(surface.size, options.seed, options.device)
        top, bottom = extremes(surface.product, next(signs), options.lanczos_steps, LARGEST)
        whole, parts = trace(surface.product, islice(signs, options.probes), _blocks(surface))
        found[subject.name] = {
            "loss": surface.loss,
            "gradient": float(surface.gradient.norm()),
            "trace": asdict(whole),
            "trace_by_part": {name: asdict(part) for name, part in parts.items()},
            "largest_eigenvalues": [asdict(value) for value in top],
            "smallest_eigenvalue": asdict(bottom),
        }
    return [_curvature(found, targets.numel(), options), _by_part(found)]


def _blocks(surface: LossSurface) -> dict[str, slice]:
    """The banks, each of which is one parameter, and all that comes after them in the vector."""
    banks = {name: surface.blocks[name] for name in BANK_NAMES}
    return {**banks, OTHERS: slice(max(place.stop for place in banks.values()), surface.size)}


def _curvature(found: dict[str, Any], targets: int, options: Options) -> Finding:
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{part['loss']:.4f}",
            number(part["gradient"]),
            _shown(part["trace"]),
            "; ".join(map(_eigenvalue, part["largest_eigenvalues"])),
            _eigenvalue(part["smallest_eigenvalue"]),
        )
        for name, part in found.items()
    ]
    return Finding(
        "curvature of the loss",
        "corrected",
        f"Shows how sharply the mean loss of {targets:,} validation targets bends at the weights: the "
        f"Hessian's trace (± standard error, {options.probes} random vectors) and extreme eigenvalues by "
        f"{options.lanczos_steps} Lanczos steps (lower bounds of the largest, upper bound of the smallest; "
        "within ± the residual lies some eigenvalue, not always that one; ? marks residuals above "
        f"{CONVERGED:.0%}); cannot show which model generalises, as rescaling weights that a norm follows "
        "changes curvature and not the function.",
        ("model", "loss", "|gradient|", "trace", "largest eigenvalues", "smallest"),
        rows,
        {"targets": targets, "models": found},
    )


def _by_part(found: dict[str, Any]) -> Finding:
    rows: list[tuple[str, ...]] = [
        (name, part, _shown(value))
        for name, model in found.items()
        for part, value in model["trace_by_part"].items()
    ]
    return Finding(
        "Hessian trace by part",
        "corrected",
        "Shows how much of the trace belongs to each bank and to everything else (± standard error); cannot "
        "show how parts bend together, which is in none of these sums.",
        ("model", "part", "trace"),
        rows,
        {name: model["trace_by_part"] for name, model in found.items()},
        drawn("trace", lambda axes: _paint(axes, found)),
    )


def _shown(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4g} ± {estimate['error']:.2g}"


def _eigenvalue(estimate: dict[str, float]) -> str:
    """Marked where more steps would still change it."""
    return _shown(estimate) + ("?" if estimate["error"] > CONVERGED * abs(estimate["value"]) else "")


def _paint(axes: list[Axes], found: dict[str, Any]) -> None:
    for i, (name, model) in enumerate(found.items()):
        parts = [Estimate(**part) for part in model["trace_by_part"].values()]
        places = [j + 0.8 * i / len(found) for j in range(len(parts))]
        heights, errors = [part.value for part in parts], [part.error for part in parts]
        axes[0].bar(places, heights, 0.8 / len(found), yerr=errors, label=label(name))
    axes[0].set_xticks([j + 0.4 - 0.4 / len(found) for j in range(len(parts))], list(model["trace_by_part"]))
    axes[0].set(ylabel="trace of the Hessian", title="curvature by part")
    axes[0].legend(fontsize=8)
