"""Error surface: published proxies, and the curvature of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.curvature import LossSurface, extremes, random_signs, trace
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.spectra import ENDS, condition, effective_rank, singular_values
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, paint_bars, ratio, tabulate, unmeasured
from pgolf_fast.lab.analysis.validation import Validation, diverged, validation_or_why
from pgolf_fast.lab.analysis.weights import flattened
from pgolf_fast.model.bank import BANK_NAMES

OTHERS = "others"
LARGEST = 3  # Hessian eigenvalues from the top
CONVERGED = 0.1  # residual, relative to an eigenvalue, above which the eigenvalue gets a question mark


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Compute the published proxies from singular values, and the Hessian's trace and extreme eigenvalues.

    The Hessian needs tokens; without them, a summary says what is missing. Raises PgolfError if the options
    name data that cannot be read.
    """
    proxies, validation = published(models), validation_or_why(models, options)
    try:
        if isinstance(validation, str):
            raise PgolfError(validation)
        return [proxies, *corrected(models, validation, options)]
    except PgolfError as error:
        return [proxies, unmeasured("curvature of the loss", str(error))]


def published(models: Sequence[LoadedModel]) -> Summary:
    """Compute five functions of the singular values of each bank, flattened to one row per slot (PR 1502).

    They are condition, effective rank, sum of squares ("trace"), first less second value ("gap"), and the
    share of the five largest squares.
    """
    values: dict[str, dict[str, dict[str, float | None]]] = {}
    for model in models:
        values[model.name] = {}
        for name in BANK_NAMES:
            sigma = singular_values(flattened(model.state[name]))
            squares = sigma.square()
            values[model.name][name] = {
                "condition": condition(sigma),
                "effective_rank": effective_rank(sigma),
                "trace_proxy": float(squares.sum()),
                "gap": float(sigma[0] - sigma[1]) if len(sigma) > 1 else None,
                "top_energy": ratio(float(squares[:ENDS].sum()), float(squares.sum())),
            }
    columns: list[Column] = [
        ("condition", "condition", ".4g"),
        ("effective rank", "effective_rank", ".4g"),
        ('"trace"', "trace_proxy", ".4g"),
        ("gap", "gap", ".4g"),
        (f"top {ENDS} energy", "top_energy", ".4g"),
    ]
    return Summary(
        "error surface by proxies",
        "published",
        "Shows five functions of a flattened bank's singular values; cannot show anything about the error "
        'surface, since they depend on no loss and no data (the "trace" is the squared norm of the weights).',
        tabulate(("model", "bank"), columns, values),
        values,
    )


def corrected(models: Sequence[LoadedModel], validation: Validation, options: Options) -> list[Summary]:
    """Measure loss, gradient, Hessian trace (total and by bank) and extreme Hessian eigenvalues.

    Raises PgolfError if a configuration does not fit the weights, or if a loss or gradient is not finite.
    """
    ids = torch.from_numpy(validation.first(options.curvature_tokens)).to(options.device)
    tokens, targets = (part.view(-1, validation.seq_len) for part in (ids[:-1], ids[1:]))
    values: dict[str, Any] = {}
    for model in models:
        network = model.network(validation.source.table, options.device, torch.float64)
        surface = LossSurface(network, tokens, targets)  # differences of gradients need float64
        if not math.isfinite(surface.loss + float(surface.gradient.norm())):
            raise diverged(model.name, "loss and gradient")
        signs = random_signs(surface.size, options.seed, options.device)
        top, bottom = extremes(surface.product, next(signs), options.lanczos_steps, LARGEST)
        whole, parts = trace(surface.product, islice(signs, options.probes), _blocks(surface))
        values[model.name] = {
            "loss": surface.loss,
            "gradient": float(surface.gradient.norm()),
            "trace": asdict(whole),
            "trace_by_part": {name: asdict(part) for name, part in parts.items()},
            "largest_eigenvalues": [asdict(value) for value in top],
            "smallest_eigenvalue": asdict(bottom),
        }
    return [_curvature(values, targets.numel(), options), _by_part(values)]


def _blocks(surface: LossSurface) -> dict[str, slice]:
    """Return the ranges of the banks, which come first, and of all other parameters."""
    banks = {name: surface.blocks[name] for name in BANK_NAMES}
    return {**banks, OTHERS: slice(max(place.stop for place in banks.values()), surface.size)}


def _curvature(values: dict[str, Any], targets: int, options: Options) -> Summary:
    columns: list[Column] = [
        ("loss", "loss", ".4f"),
        ("|gradient|", "gradient", ".4g"),
        ("trace", "trace", _with_error),
        ("largest eigenvalues", "largest_eigenvalues", lambda several: "; ".join(map(_eigenvalue, several))),
        ("smallest", "smallest_eigenvalue", _eigenvalue),
    ]
    return Summary(
        "curvature of the loss",
        "corrected",
        f"Shows how sharply the mean loss of {targets:,} validation targets bends at the weights: the "
        f"Hessian's trace (± standard error, {options.probes} random vectors) and extreme eigenvalues by "
        f"{options.lanczos_steps} Lanczos steps (lower bounds of the largest, upper bound of the smallest; "
        "within ± the residual there is some eigenvalue, not always that one; ? means a residual above "
        f"{CONVERGED:.0%}); cannot show which model generalizes, as rescaling weights in front of a norm "
        "changes curvature but not the function.",
        tabulate(("model",), columns, values),
        {"targets": targets, "models": values},
    )


def _by_part(values: dict[str, Any]) -> Summary:
    parts = {name: model["trace_by_part"] for name, model in values.items()}
    rows = {name: {part: {"trace": value} for part, value in own.items()} for name, own in parts.items()}
    heights, errors = (
        {name: [part[key] for part in own.values()] for name, own in parts.items()}
        for key in ("value", "error")
    )

    def paint(axes: list) -> None:
        paint_bars(axes[0], [*BANK_NAMES, OTHERS], heights, errors)
        axes[0].set(ylabel="trace of the Hessian", title="curvature by part")

    return Summary(
        "Hessian trace by part",
        "corrected",
        "Shows how much of the trace belongs to each bank and to everything else (± standard error); cannot "
        "show how parts bend together, which none of these sums includes.",
        tabulate(("model", "part"), [("trace", "trace", _with_error)], rows),
        parts,
        draw("trace", paint),
    )


def _with_error(uncertain: dict[str, float]) -> str:
    return f"{uncertain['value']:.4g} ± {uncertain['error']:.2g}"


def _eigenvalue(uncertain: dict[str, float]) -> str:
    """Format an eigenvalue, with a question mark if more steps would still change it."""
    return _with_error(uncertain) + ("?" if uncertain["error"] > CONVERGED * abs(uncertain["value"]) else "")
