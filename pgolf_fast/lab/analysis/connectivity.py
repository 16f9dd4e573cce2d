"""Straight line between the weights of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.bench.drawing import label
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Frozen
from pgolf_fast.evaluation.score import Scorer, batch_size
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.lab.analysis.losses import by_target
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, ratio, tabulate, unmeasured
from pgolf_fast.lab.analysis.validation import Validation, validation_or_why
from pgolf_fast.lab.analysis.weights import common, cosine, norm, pairs
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure the midpoint of each pair of models as published, its expected norms, and the loss on the line.

    The loss needs tokens; without them, a summary says what is missing. Raises PgolfError naming a tensor
    whose shapes differ, or if the options name data that cannot be read.
    """
    validation = validation_or_why(models, options)
    summaries: list[Summary] = []
    for a, b in pairs(models):
        summaries += [published(a, b), expected(a, b)]
        name = f"loss from {a.name} to {b.name}"
        try:
            if isinstance(validation, str):
                raise PgolfError(validation)
            summaries.append(corrected(a, b, name, validation, options))
        except PgolfError as error:
            summaries.append(unmeasured(name, str(error)))
    return summaries


def published(a: LoadedModel, b: LoadedModel) -> Summary:
    """Sum |A|, |B|, |A - B| and |(A + B) / 2| over all tensors; divide the last by the first (PR 1501)."""
    names = common((a, b))
    sums = {
        "norm_a": sum(norm(a.state[name]) for name in names),
        "norm_b": sum(norm(b.state[name]) for name in names),
        "distance": sum(norm(a.state[name] - b.state[name]) for name in names),
        "norm_middle": sum(norm(middle(a.state[name], b.state[name])) for name in names),
    }
    share = ratio(sums["norm_middle"], sums["norm_a"])
    header = ("sum of |A|", "sum of |B|", "sum of |A-B|", "sum of |(A+B)/2|", "ratio")
    return Summary(
        f"mode connectivity, {a.name} to {b.name}",
        "published",
        "Shows how much shorter the average of two models is; cannot show whether they are connected, since "
        "no loss is measured and nothing supports reading 1 as one basin and less than 0.8 as two.",
        Table(header, [(*(f"{value:.2f}" for value in sums.values()), number(share, ".4f"))]),
        {**sums, "ratio": share},
    )


def expected(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare each bank's |(A + B) / 2| / |A| with sqrt((1 + cosine) / 2), its value for equal norms."""
    values: dict[str, dict[str, float | None]] = {}
    for name in BANK_NAMES:
        x, y = a.state[name], b.state[name]
        angle = cosine(x, y)
        values[name] = {
            "cosine": angle,
            "length": ratio(norm(y), norm(x)),
            "ratio": ratio(norm(middle(x, y)), norm(x)),
            "from_cosine": None if angle is None else math.sqrt((1 + angle) / 2),
        }
    columns: list[Column] = [
        ("cosine", "cosine", ".4f"),
        ("|B|/|A|", "length", ".4f"),
        ("|(A+B)/2|/|A|", "ratio", ".4f"),
        ("sqrt((1+cosine)/2)", "from_cosine", ".4f"),
    ]
    return Summary(
        f"midpoint norms, {a.name} to {b.name}",
        "corrected",
        "Shows that the published ratio repeats the cosine: sqrt((1 + cosine) / 2) for weights of equal "
        f"norm, {math.sqrt(0.5):.4f} for independent ones; cannot show more than the cosine does.",
        tabulate(("bank",), columns, values),
        values,
    )


def middle(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() + y.double()) / 2


def corrected(a: LoadedModel, b: LoadedModel, name: str, validation: Validation, options: Options) -> Summary:
    """Measure the loss at points of the line, and its excess over the line between the losses of the ends.

    The barrier is the largest excess, or 0 (Entezari et al. 2022); ± is the standard error over windows.
    Raises PgolfError as `path_losses`.
    """
    losses = path_losses(a, b, validation, options)
    shares = np.linspace(0, 1, options.points)
    straight = (1 - shares)[:, None] * losses[0] + shares[:, None] * losses[-1]
    excess, count = losses - straight, losses.shape[1]
    means = excess.mean(1)
    errors = excess.std(1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(shares), math.nan)
    top = int(means.argmax())
    barrier = {"height": float(means[top]), "error": float(errors[top]), "at": float(shares[top])}
    values = {
        "targets": count * validation.seq_len,
        "at": shares.tolist(),
        "loss": losses.mean(1).tolist(),
        "excess": means.tolist(),
        "excess_error": errors.tolist(),
        "barrier": barrier,
    }
    rows = [
        (f"{share:.3f}", f"{loss:.4f}", f"{more:+.4f}", number(error, ".1e"))
        for share, loss, more, error in zip(shares, values["loss"], means, errors, strict=True)
    ]
    rows.append(("barrier", "-", f"{barrier['height']:+.4f}", number(barrier["error"], ".1e")))
    return Summary(
        name,
        "corrected",
        f"Shows whether the loss of {values['targets']:,} validation targets rises between two models (in "
        "nats, above the straight line between their losses); a barrier cannot show that no other path "
        "avoids it, nor that the models differ in more than the order of their hidden channels.",
        Table(("share of the second", "loss", "excess", "±"), rows),
        values,
        draw("path", lambda axes: _paint(axes, values, a.name, b.name)),
    )


def path_losses(a: LoadedModel, b: LoadedModel, validation: Validation, options: Options) -> np.ndarray:
    """Return mean losses in nats at points from a to b, float64 (points, windows).

    Raises PgolfError if the two are not weights of one network, or if a loss is not finite.
    """
    if a.need_config().model != b.need_config().model:
        raise PgolfError(f"{a.name} and {b.name} are different networks: there is no line between them")
    stream = validation.stream(options.device)
    windows = plain_windows(stream.num_targets, validation.seq_len)
    network, *ends = (m.network(validation.source.table, options.device) for m in (a, a, b))
    parameters = [dict(end.named_parameters()) for end in ends]
    size = batch_size(None, network.config, network.compute_dtype, options.device)
    rows = []
    for share in np.linspace(0, 1, options.points):
        _interpolate(network, parameters, float(share))
        scorer = Scorer(stream, windows, validation.seq_len, size)
        scorer.score(Frozen(network).score, 0, len(windows))
        losses = by_target(scorer, f"{a.name} to {b.name}")
        rows.append(losses.reshape(len(windows), -1).mean(1))
    return np.stack(rows)


@torch.no_grad()
def _interpolate(network: GPT, ends: Sequence[Mapping[str, Tensor]], share: float) -> None:
    first, second = ends
    for name, parameter in network.named_parameters():
        parameter.copy_((1 - share) * first[name] + share * second[name])


def _paint(axes: list[Axes], values: dict[str, Any], first: str, second: str) -> None:
    shares, losses = values["at"], values["loss"]
    axes[0].errorbar(shares, losses, values["excess_error"], fmt="o-", markersize=4, label="loss")
    axes[0].plot([0, 1], [losses[0], losses[-1]], ":", color="0.5", label="straight line")
    axes[0].set_xticks([0, 0.25, 0.5, 0.75, 1], [label(first), "0.25", "0.5", "0.75", label(second)])
    axes[0].set(ylabel="nats", title="loss on the line between the weights")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
