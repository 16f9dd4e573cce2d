"""Distribution of the loss over targets, and calibration, on non-overlapping windows.

Shares by size of the loss are PR 296's table, and shares by word start are PR 1501's; calibration follows
C. Guo et al., "On Calibration of Modern Neural Networks" (2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pgolf_fast.bench.drawing import label
from pgolf_fast.console import Table
from pgolf_fast.evaluation.adapters.base import Frozen
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.figures import THRESHOLDS, Figures, figures, token_classes
from pgolf_fast.evaluation.score import LossFunction, Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.lab.analysis.calibration import Calibration
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, tabulate
from pgolf_fast.lab.analysis.validation import Validation, diverged, open_validation
from pgolf_fast.lab.compare.statistics import bootstrap_ratio
from pgolf_fast.model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN, CONTEXT_TOKENS = 12, 24  # hardest targets, and tokens shown before each
# PR 296's table of 62 M validation tokens: nats -> share of targets above, share of the loss; and the mean
PR296 = {1: (0.596, 0.85), 3: (0.327, 0.55), 5: (0.116, 0.30), 7: (0.027, 0.15), 10: (0.002, 0.03)}
PR296_MEAN = 1.9668


@dataclass(frozen=True)
class ModelLosses:
    """Losses of one model and what was computed from them."""

    name: str
    network: GPT
    losses: np.ndarray
    """By target, (targets,) float64."""
    figures: Figures
    calibration: Calibration


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure shares by class and by size of the loss, quantiles, the hardest targets, and calibration.

    Raises PgolfError without validation data, for an unknown configuration, and for losses that are not
    finite.
    """
    validation = open_validation(models, options)
    stream = validation.stream(options.device)
    classes = token_classes(validation.source.tokenizer)
    measured = []
    for model in models:
        network = model.network(validation.source.table, options.device)
        calibration = Calibration(network)
        scorer = score_plain(network, stream, validation.seq_len, calibration.losses)
        losses = by_target(scorer, model.name)
        measured.append(ModelLosses(model.name, network, losses, figures(scorer, classes), calibration))
    starts = validation.source.table.has_leading_space[validation.tokens[1:]]
    return [
        _published_classes(measured, starts),
        _classes(measured),
        _published_sizes(measured),
        _sizes(measured, document_starts(validation.tokens)),
        _quantiles(measured),
        _hardest(measured, validation),
        _reliability(measured),
        _probabilities(measured),
    ]


def score_plain(model: GPT, stream: Stream, seq_len: int, losses_of: LossFunction | None = None) -> Scorer:
    """Score non-overlapping windows with `losses_of`, by default the model's own losses."""
    size = batch_size(None, model.config, model.compute_dtype, stream.tokens.device)
    windows = plain_windows(stream.num_targets, seq_len)
    scorer = Scorer(stream, windows, seq_len, size, pad=False)
    scorer.score(losses_of or Frozen(model).score, 0, len(windows))
    return scorer


def by_target(scorer: Scorer, name: str) -> np.ndarray:
    """Return the losses (targets,) float64. Raises PgolfError naming the model if one is not finite."""
    losses = scorer.by_target().astype(np.float64)
    if not np.isfinite(losses).all():
        raise diverged(name, "losses")
    return losses


def _published_classes(measured: Sequence[ModelLosses], starts: np.ndarray) -> Summary:
    """Compare targets with a leading space, `starts` bool (targets,), with all others (PR 1501)."""
    values: dict[str, Any] = {}
    for one in measured:
        values[one.name] = {}
        for kind, chosen in (("word start", starts), ("other", ~starts)):
            own = one.losses[chosen]
            values[one.name][kind] = {
                "targets": float(chosen.mean()),
                "loss_share": float(own.sum() / one.losses.sum()),
                "loss": float(own.mean()) if len(own) else None,
            }
    columns: list[Column] = [
        ("of all", "targets", ".2%"),
        ("of the loss", "loss_share", ".2%"),
        ("nats/token", "loss", ".4f"),
    ]
    return Summary(
        "losses by word start",
        "published",
        "Shows how much of the summed loss falls on tokens that begin a word (PR 1501 reports about 70 %, at "
        "3.37 nats against 1.08); cannot show that these tokens are hard for their length, as a word start "
        "represents more bytes than a piece within a word.",
        tabulate(("model", "targets"), columns, values),
        values,
    )


def _classes(measured: Sequence[ModelLosses]) -> Summary:
    shares: dict[str, dict[str, dict[str, Any]]] = {}
    for one in measured:
        parts = one.figures.by_class
        nats = sum(part.nats for part in parts.values())
        tokens, text_bytes = (sum(getattr(p, u) for p in parts.values()) for u in ("tokens", "text_bytes"))
        shares[one.name] = {
            kind: {
                "tokens": part.tokens / tokens,
                "bytes": part.text_bytes / max(text_bytes, 1),
                "nats": part.nats / nats,
                "loss": part.loss if part.tokens else None,
                "bpb": part.bpb if part.text_bytes else None,
            }
            for kind, part in parts.items()
        }
    columns: list[Column] = [
        ("of all", "tokens", ".2%"),
        ("of the bytes", "bytes", ".2%"),
        ("of the loss", "nats", ".2%"),
        ("nats/token", "loss", ".4f"),
        ("bits/byte", "bpb", ".4f"),
    ]
    return Summary(
        "losses by class of target",
        "corrected",
        "Shows where the bits go, by token and by byte, with bytes and document ends as separate classes; "
        "classes with equal values in the last column have the same share of the loss as of the text.",
        tabulate(("model", "targets"), columns, shares),
        {one.name: {kind: p.to_dict() for kind, p in one.figures.by_class.items()} for one in measured},
    )


def least_shares(above: dict[int, float], mean: float) -> dict[int, float]:
    """Return the least share of the loss that targets above each threshold can carry.

    above: threshold in nats -> share of targets above it; mean: nats per target. Each target counts as the
    highest threshold that it exceeds.
    """
    edges = sorted(above)
    between = [above[low] - (above[high] if high else 0.0) for low, high in pairwise([*edges, 0])]
    least = np.cumsum([low * share for low, share in zip(edges, between, strict=True)][::-1])[::-1]
    return {edge: float(nats) / mean for edge, nats in zip(edges, least, strict=True)}


def _published_sizes(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in measured:
        values[one.name] = {}
        for threshold, published in PR296.items():
            above = one.figures.above[str(threshold)]
            values[one.name][str(threshold)] = {"targets": above.targets, "loss_share": above.loss}
            count = round(above.targets * len(one.losses))
            shares = (above.targets, above.loss, published[0])
            cells = (*(f"{share:.1%}" for share in shares), f"{published[1]:.0%}")
            rows.append((one.name, f"> {threshold}", f"{count:,}", *cells))
    least = least_shares({nats: targets for nats, (targets, _) in PR296.items()}, PR296_MEAN)
    header = ("model", "nats", "targets", "of all", "of the loss", "PR 296: of all", "PR 296: of the loss")
    return Summary(
        "losses by size",
        "published",
        "Shows that few tokens carry much of the loss, as in PR 296, whose figures are on the right; cannot "
        "show that they could be learned, and PR 296's shares do not match its counts: "
        f"{PR296[3][0]:.1%} of targets above 3 nats carry at least {int(100 * least[3])}% of a mean of "
        f"{PR296_MEAN}, not {PR296[3][1]:.0%}.",
        Table(header, rows),
        {"models": values, "least_shares_of_pr_296": {str(nats): share for nats, share in least.items()}},
    )


def _sizes(measured: Sequence[ModelLosses], starts: np.ndarray) -> Summary:
    """Add bootstrap intervals over documents, whose first targets are `starts`, and lower bounds."""
    values: dict[str, dict[str, Any]] = {}
    for one in measured:
        counts = {t: one.figures.above[str(t)].targets for t in THRESHOLDS}
        least = least_shares(counts, float(one.losses.mean()))
        total = np.add.reduceat(one.losses, starts)
        values[one.name] = {}
        for threshold in THRESHOLDS:
            above = one.figures.above[str(threshold)]
            part = np.add.reduceat(np.where(one.losses > threshold, one.losses, 0.0), starts)
            low, high = bootstrap_ratio(part, total)
            shares = {"targets": above.targets, "loss_share": above.loss, "least": least[threshold]}
            values[one.name][str(threshold)] = {**shares, "low": low, "high": high}

    def interval(part: dict[str, float]) -> str:
        return f"{part['low']:.1%} to {part['high']:.1%}" if len(starts) > 1 else "-"

    columns: list[Column] = [
        ("of all", "targets", ".2%"),
        ("of the loss", "loss_share", ".2%"),
        ("95 % interval", "interval", str),
        ("at least", "least", ".1%"),
    ]
    shown = {
        name: {f"> {nats}": {**part, "interval": interval(part)} for nats, part in parts.items()}
        for name, parts in values.items()
    }
    return Summary(
        "losses by size, with intervals",
        "corrected",
        f"Shows the same shares, summed in float64, with 95 % intervals over {len(starts):,} documents and "
        "the minimum that the counts alone imply; a share shows how uneven the loss is, not a possible gain.",
        tabulate(("model", "nats"), columns, shown),
        values,
        draw("losses", lambda axes: _paint_losses(axes, measured), 2, width=9.0),
    )


def _paint_losses(panels: Sequence[Axes], measured: Sequence[ModelLosses]) -> None:
    counts, weights = panels
    edges = np.linspace(0, max(float(one.losses.max()) for one in measured), 61).tolist()
    for one in measured:
        share = np.full(len(one.losses), 1 / len(one.losses))
        counts.hist(one.losses, edges, weights=share, histtype="step", label=label(one.name))
        weights.hist(one.losses, edges, weights=one.losses / one.losses.sum(), histtype="step")
    counts.set(xlabel="loss of a target, nats", ylabel="share of targets", title="targets")
    weights.set(xlabel="loss of a target, nats", ylabel="share of the loss", title="loss")
    for axes in (counts, weights):
        axes.grid(alpha=0.3)
    counts.legend()


def _quantiles(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in measured:
        quantiles, hardest = one.figures.quantiles, one.figures.hardest
        values[one.name] = {"loss_quantiles": quantiles, "loss_share_of_hardest_percent": hardest}
        rows += [(one.name, f"quantile {q[1:]} %", f"{nats:.4f} nats") for q, nats in quantiles.items()]
        rows += [(one.name, f"hardest {p} %", f"{share:.2%} of the loss") for p, share in hardest.items()]
    return Summary(
        "quantiles of the loss",
        "corrected",
        "Shows the spread of losses over targets, and how much of the sum the hardest carry; cannot show "
        "which part of it is noise of the text, which no model predicts.",
        Table(("model", "targets", "loss"), rows),
        values,
    )


def _hardest(measured: Sequence[ModelLosses], validation: Validation) -> Summary:
    tokenizer, tokens = validation.source.tokenizer, validation.tokens
    values: dict[str, list[dict[str, Any]]] = {}
    for one in measured:
        values[one.name] = []
        for target in np.argsort(-one.losses, kind="stable")[:SHOWN].tolist():
            guess, probability = _guess(one.network, validation, target)
            before = tokens[max(target + 1 - CONTEXT_TOKENS, 0) : target + 1]
            values[one.name].append(
                {
                    "position": target + 1,
                    "loss": float(one.losses[target]),
                    "target": tokenizer.piece(int(tokens[target + 1])),
                    "guess": tokenizer.piece(guess),
                    "guess_probability": probability,
                    "context": " ".join(tokenizer.decode(before.tolist()).split()),
                }
            )
    rows = [
        (name, f"{t['loss']:.2f}", t["target"], t["guess"], f"{t['guess_probability']:.1%}", t["context"])
        for name, targets in values.items()
        for t in targets
    ]
    return Summary(
        "hardest targets",
        "corrected",
        "Shows which targets surprise a model most, the text before them, and what the model expected "
        "instead (a leading \u2581 is a space); a dozen extremes are examples, not a sample.",
        Table(("model", "nats", "target", "expected", "probability", "after"), rows),
        values,
    )


@torch.no_grad()
def _guess(model: GPT, validation: Validation, target: int) -> tuple[int, float]:
    """Return the likeliest token at the position of a target, and its probability."""
    begin = target // validation.seq_len * validation.seq_len
    tokens = torch.from_numpy(validation.tokens[None, begin : target + 1]).to(model.qo_bank.device)
    hidden = model.hidden(tokens, last=1, context=validation.seq_len)
    probability, token = model.head(hidden)[0, -1].softmax(-1).max(-1)
    return int(token), float(probability)


def _reliability(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    for one in measured:
        c = one.calibration
        bins = [(f"{low:.1f} to {high:.1f}", n, p, right) for low, high, n, p, right in c.reliability()]
        for name, count, confidence, accuracy in (*bins, ("all", c.targets, c.confidence, c.accuracy)):
            cells = (f"{confidence:.3f}", f"{accuracy:.3f}", f"{accuracy - confidence:+.3f}")
            rows.append((one.name, name, f"{count:,}", *(cells if count else ("-",) * 3)))
        rows.append((one.name, "expected error", "", "", "", f"{c.top_error:.4f}"))
    return Summary(
        "calibration of the likeliest token",
        "corrected",
        "Shows whether the likeliest token is correct as often as its probability says; the expected error "
        "depends on the bins, is above zero for a perfect model on few tokens, and ignores all other tokens.",
        Table(("model", "probability", "targets", "mean probability", "accuracy", "difference"), rows),
        {one.name: one.calibration.to_dict() for one in measured},
        draw("reliability", lambda axes: _paint_reliability(axes, measured), 2, width=9.0, height=3.8),
    )


def _paint_reliability(panels: Sequence[Axes], measured: Sequence[ModelLosses]) -> None:
    top, every = panels
    top.plot((0, 1), (0, 1), color="0.5", linewidth=0.8)
    every.plot((1e-7, 1), (1e-7, 1), color="0.5", linewidth=0.8)
    for one in measured:
        bins = [row for row in one.calibration.reliability() if row[2]]
        top.plot([b[3] for b in bins], [b[4] for b in bins], "o-", markersize=4, label=label(one.name))
        bins = [row for row in one.calibration.every_probability() if row[3] and row[4]]
        every.plot([b[3] for b in bins], [b[4] for b in bins], "o-", markersize=4)
    top.set(xlabel="probability", ylabel="accuracy", title="likeliest token")
    every.set(xscale="log", yscale="log", xlabel="probability", ylabel="frequency", title="every token")
    for axes in (top, every):
        axes.grid(alpha=0.3)
    top.legend()


def _probabilities(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in measured:
        c = one.calibration
        values[one.name] = {
            "mean_loss": c.loss,
            "mean_entropy": c.entropy,
            "mean_target_probability": c.target_probability,
            "mean_expected_target_probability": c.expected_probability,
            "expected_error": c.every_error,
        }
        pairs = (
            ("loss, nats", c.loss, c.entropy),
            ("probability of the target", c.target_probability, c.expected_probability),
        )
        rows += [(one.name, what, f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}") for what, a, b in pairs]
        rows.append((one.name, "expected error, all tokens", "", "", f"{c.every_error:.4f}"))
    return Summary(
        "calibration of the target's probability",
        "corrected",
        "Shows whether the losses are those that the probabilities predict (the mean loss of a calibrated "
        "model is its own entropy); overconfidence in one place can hide underconfidence in another.",
        Table(("model", "quantity", "measured", "predicted", "difference"), rows),
        values,
    )
