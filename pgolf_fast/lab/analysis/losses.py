"""Where the loss is and whether probabilities mean what they say, on non-overlapping windows.

The shares by size of loss are PR 296's table, those by word start PR 1501's; calibration is that of C. Guo et
al., "On Calibration of Modern Neural Networks" (2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pgolf_fast.bench.drawing import label
from pgolf_fast.data.tokenizer import Tokenizer
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.figures import THRESHOLDS, Figures, figures, token_classes
from pgolf_fast.evaluation.score import LossFunction, Scorer, Stream, batch_size, frozen_losses
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.lab.analysis.calibration import Calibration
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.validation import Validation, diverged, open_validation
from pgolf_fast.lab.compare.statistics import bootstrap_ratio
from pgolf_fast.model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN, CONTEXT_TOKENS = 12, 24  # hardest targets, and what is shown before each
# PR 296's table of 62 M validation tokens: nats -> share of targets above, share of the loss; and its mean
PR296 = {1: (0.596, 0.85), 3: (0.327, 0.55), 5: (0.116, 0.30), 7: (0.027, 0.15), 10: (0.002, 0.03)}
PR296_MEAN = 1.9668


@dataclass(frozen=True)
class Measured:
    """One model's losses and what was found on the way."""

    name: str
    model: GPT
    losses: np.ndarray
    """By target, (targets,) float64."""
    figures: Figures
    calibration: Calibration

    @property
    def mean(self) -> float:
        return float(self.losses.mean())


def loss_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Shares by class and by size of loss, quantiles, the hardest targets, and calibration.

    Raises PgolfError where there is no validation data, a model's configuration is not known, or its losses
    are not finite.
    """
    validation = open_validation(subjects, options)
    stream, tokenizer = validation.stream(options.device), validation.source.tokenizer
    classes = token_classes(tokenizer)
    found = []
    for subject in subjects:
        model = subject.model(validation.source.table, options.device)
        calibration = Calibration(model)
        scorer = score_plain(model, stream, validation.seq_len, calibration.losses)
        losses = by_target(scorer, subject.name)
        found.append(Measured(subject.name, model, losses, figures(scorer, classes), calibration))
    starts = validation.source.table.has_leading_space[validation.tokens[1:]]
    return [
        _published_classes(found, starts),
        _classes(found),
        _published_sizes(found),
        _sizes(found, document_starts(validation.tokens)),
        _quantiles(found),
        _hardest(found, validation, tokenizer),
        _reliability(found),
        _probabilities(found),
    ]


def score_plain(model: GPT, stream: Stream, seq_len: int, losses_of: LossFunction | None = None) -> Scorer:
    """The model's losses over non-overlapping windows, filled in; `losses_of` stands in for its own."""
    size = batch_size(None, model.config, model.compute_dtype, stream.tokens.device)
    windows = plain_windows(stream.num_targets, seq_len)
    scorer = Scorer(stream, windows, seq_len, size, pad=False)
    scorer.score(losses_of or frozen_losses(model), 0, len(windows))
    return scorer


def by_target(scorer: Scorer, name: str) -> np.ndarray:
    """Its losses, (targets,) float64. Raises PgolfError naming the model where one is not finite."""
    losses = scorer.by_target().astype(np.float64)
    if not np.isfinite(losses).all():
        raise diverged(name, "losses")
    return losses


def _published_classes(found: Sequence[Measured], starts: np.ndarray) -> Finding:
    """PR 1501's two classes: targets with a leading space, and all others. `starts` is bool (targets,)."""
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        values[one.name] = {}
        for kind, chosen in (("word start", starts), ("other", ~starts)):
            own = one.losses[chosen]
            loss = float(own.mean()) if len(own) else None
            share = float(own.sum() / one.losses.sum())
            values[one.name][kind] = {"targets": float(chosen.mean()), "loss_share": share, "loss": loss}
            shown = "-" if loss is None else f"{loss:.4f}"
            rows.append((one.name, kind, f"{chosen.mean():.2%}", f"{share:.2%}", shown))
    return Finding(
        "losses by word start",
        "published",
        "Shows how much of the summed loss falls on tokens that begin a word (PR 1501 reports about 70 %, at "
        "3.37 nats against 1.08); cannot show that these are hard for what they hold, as a word start stands "
        "for more bytes than a piece within a word.",
        ("model", "targets", "of all", "of the loss", "nats/token"),
        rows,
        values,
    )


def _classes(found: Sequence[Measured]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        parts = one.figures.by_class
        nats = sum(part.nats for part in parts.values())
        tokens, text_bytes = (
            sum(getattr(p, unit) for p in parts.values()) for unit in ("tokens", "text_bytes")
        )
        values[one.name] = {kind: part.to_dict() for kind, part in parts.items()}
        for kind, part in parts.items():
            rows.append(
                (
                    one.name,
                    kind,
                    f"{part.tokens / tokens:.2%}",
                    f"{part.text_bytes / max(text_bytes, 1):.2%}",
                    f"{part.nats / nats:.2%}",
                    f"{part.loss:.4f}" if part.tokens else "-",
                    f"{part.bpb:.4f}" if part.text_bytes else "-",
                )
            )
    return Finding(
        "losses by class of target",
        "corrected",
        "Shows where the bits go, by token and by byte, with bytes and document ends apart; where the last "
        "column is alike, a class's share of the loss is its share of the text.",
        ("model", "targets", "of all", "of the bytes", "of the loss", "nats/token", "bits/byte"),
        rows,
        values,
    )


def least_shares(above: dict[int, float], mean: float) -> dict[int, float]:
    """The least share of the loss that targets above each threshold can carry, whatever they are exactly.

    above: threshold in nats -> share of targets above it; mean: nats per target. Each target counts as the
    highest threshold that it is above.
    """
    edges = sorted(above)
    held = [above[low] - (above[high] if high else 0.0) for low, high in pairwise([*edges, 0])]
    least = np.cumsum([low * share for low, share in zip(edges, held, strict=True)][::-1])[::-1]
    return {edge: float(nats) / mean for edge, nats in zip(edges, least, strict=True)}


def _published_sizes(found: Sequence[Measured]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        values[one.name] = {}
        for threshold, (targets, share) in PR296.items():
            above = one.figures.above[str(threshold)]
            values[one.name][str(threshold)] = {"targets": above.targets, "loss_share": above.loss}
            count = round(above.targets * len(one.losses))
            rows.append(
                (
                    one.name,
                    f"> {threshold}",
                    f"{count:,}",
                    f"{above.targets:.1%}",
                    f"{above.loss:.1%}",
                    f"{targets:.1%}",
                    f"{share:.0%}",
                )
            )
    least = least_shares({nats: targets for nats, (targets, _) in PR296.items()}, PR296_MEAN)
    return Finding(
        "losses by size",
        "published",
        "Shows that few tokens carry much of the loss, as in PR 296, whose figures are on the right; cannot "
        "show that they could be learned, and PR 296's shares do not fit its counts: "
        f"{PR296[3][0]:.1%} of targets above 3 nats carry at least {int(100 * least[3])}% of a mean of "
        f"{PR296_MEAN}, not {PR296[3][1]:.0%}.",
        ("model", "nats", "targets", "of all", "of the loss", "PR 296: of all", "PR 296: of the loss"),
        rows,
        {"models": values, "least_shares_of_pr_296": {str(nats): share for nats, share in least.items()}},
    )


def _sizes(found: Sequence[Measured], starts: np.ndarray) -> Finding:
    """`starts` are the first targets of documents, which are what the bootstrap draws."""
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        least = least_shares({t: one.figures.above[str(t)].targets for t in THRESHOLDS}, one.mean)
        total = np.add.reduceat(one.losses, starts)
        values[one.name] = {}
        for threshold in THRESHOLDS:
            above = one.figures.above[str(threshold)]
            part = np.add.reduceat(np.where(one.losses > threshold, one.losses, 0.0), starts)
            low, high = bootstrap_ratio(part, total)
            values[one.name][str(threshold)] = {
                "targets": above.targets,
                "loss_share": above.loss,
                "low": low,
                "high": high,
                "least": least[threshold],
            }
            rows.append(
                (
                    one.name,
                    f"> {threshold}",
                    f"{above.targets:.2%}",
                    f"{above.loss:.2%}",
                    f"{low:.1%} to {high:.1%}" if len(starts) > 1 else "-",
                    f"{least[threshold]:.1%}",
                )
            )
    return Finding(
        "losses by size, with intervals",
        "corrected",
        f"Shows the same summed in float64, with 95 % intervals over {len(starts):,} documents, beside the "
        "least that the counts alone imply; a share says how uneven the loss is, not what could be gained.",
        ("model", "nats", "of all", "of the loss", "95 % interval", "at least"),
        rows,
        values,
        drawn("losses", lambda axes: _paint_losses(axes, found), 2, width=9.0),
    )


def _paint_losses(panels: Sequence[Axes], found: Sequence[Measured]) -> None:
    counts, weights = panels
    edges = np.linspace(0, max(float(one.losses.max()) for one in found), 61).tolist()
    for one in found:
        share = np.full(len(one.losses), 1 / len(one.losses))
        counts.hist(one.losses, edges, weights=share, histtype="step", label=label(one.name))
        weights.hist(one.losses, edges, weights=one.losses / one.losses.sum(), histtype="step")
    counts.set(xlabel="loss of a target, nats", ylabel="share of targets", title="how many targets")
    weights.set(xlabel="loss of a target, nats", ylabel="share of the loss", title="how much of the loss")
    for axes in (counts, weights):
        axes.grid(alpha=0.3)
    counts.legend()


def _quantiles(found: Sequence[Measured]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        f = one.figures
        values[one.name] = {"loss_quantiles": f.quantiles, "loss_share_of_hardest_percent": f.hardest}
        rows += [
            (one.name, f"quantile {name[1:]} %", f"{nats:.4f} nats") for name, nats in f.quantiles.items()
        ]
        rows += [(one.name, f"hardest {p} %", f"{share:.2%} of the loss") for p, share in f.hardest.items()]
    return Finding(
        "quantiles of the loss",
        "corrected",
        "Shows the spread of losses over targets, and how much of the sum the hardest carry; cannot show "
        "which part of it is noise of the text, which no model predicts.",
        ("model", "targets", "loss"),
        rows,
        values,
    )


def _hardest(found: Sequence[Measured], validation: Validation, tokenizer: Tokenizer) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        values[one.name] = []
        for target in np.argsort(-one.losses, kind="stable")[:SHOWN].tolist():
            guess, probability = _guess(one.model, validation, target)
            token = int(validation.tokens[target + 1])
            before = validation.tokens[max(target + 1 - CONTEXT_TOKENS, 0) : target + 1]
            context = " ".join(tokenizer.decode(before.tolist()).split())
            loss = float(one.losses[target])
            pieces = tokenizer.piece(token), tokenizer.piece(guess)
            rows.append((one.name, f"{loss:.2f}", pieces[0], pieces[1], f"{probability:.1%}", context))
            values[one.name].append(
                {
                    "position": target + 1,
                    "loss": loss,
                    "target": pieces[0],
                    "guess": pieces[1],
                    "guess_probability": probability,
                    "context": context,
                }
            )
    return Finding(
        "hardest targets",
        "corrected",
        "Shows which targets surprise a model most, after what, and what it expected instead (a leading "
        "\u2581 is a space); a dozen extremes are examples, not a sample.",
        ("model", "nats", "target", "expected", "with", "after"),
        rows,
        values,
    )


@torch.no_grad()
def _guess(model: GPT, validation: Validation, target: int) -> tuple[int, float]:
    """The likeliest token where a target was scored, and its probability."""
    begin = target // validation.seq_len * validation.seq_len
    tokens = torch.from_numpy(validation.tokens[None, begin : target + 1]).to(model.qo_bank.device)
    hidden = model.hidden(tokens, last=1, context=validation.seq_len)
    probability, token = model.head(hidden)[0, -1].softmax(-1).max(-1)
    return int(token), float(probability)


def _reliability(found: Sequence[Measured]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
        c = one.calibration
        values[one.name] = c.to_dict()
        for low, high, count, confidence, accuracy in c.reliability():
            shown = (f"{confidence:.3f}", f"{accuracy:.3f}", f"{accuracy - confidence:+.3f}")
            rows.append(
                (one.name, f"{low:.1f} to {high:.1f}", f"{count:,}", *(shown if count else ("-",) * 3))
            )
        total = (f"{c.confidence:.3f}", f"{c.accuracy:.3f}", f"{c.accuracy - c.confidence:+.3f}")
        rows.append((one.name, "all", f"{c.targets:,}", *total))
        rows.append((one.name, "expected error", "", "", "", f"{c.top_error:.4f}"))
    return Finding(
        "calibration of the likeliest token",
        "corrected",
        "Shows whether the likeliest token is right as often as its probability says; the expected error "
        "depends on the bins, is above zero for a perfect model on few tokens, and says nothing of the rest.",
        ("model", "probability", "targets", "mean of it", "how often right", "difference"),
        rows,
        values,
        drawn("reliability", lambda axes: _paint_reliability(axes, found), 2, width=9.0, height=3.8),
    )


def _paint_reliability(panels: Sequence[Axes], found: Sequence[Measured]) -> None:
    top, every = panels
    top.plot((0, 1), (0, 1), color="0.5", linewidth=0.8)
    every.plot((1e-7, 1), (1e-7, 1), color="0.5", linewidth=0.8)
    for one in found:
        bins = [row for row in one.calibration.reliability() if row[2]]
        top.plot([b[3] for b in bins], [b[4] for b in bins], "o-", markersize=4, label=label(one.name))
        held = [row for row in one.calibration.every_probability() if row[3] and row[4]]
        every.plot([b[3] for b in held], [b[4] for b in held], "o-", markersize=4)
    top.set(xlabel="probability", ylabel="how often right", title="likeliest token")
    every.set(
        xscale="log", yscale="log", xlabel="probability", ylabel="how often it came", title="every token"
    )
    for axes in (top, every):
        axes.grid(alpha=0.3)
    top.legend()


def _probabilities(found: Sequence[Measured]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in found:
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
    return Finding(
        "calibration of the target's probability",
        "corrected",
        "Shows whether the losses are what the probabilities themselves predict (a calibrated model loses "
        "its own entropy on average); over-confidence in one place can hide the reverse in another.",
        ("model", "what", "measured", "predicted", "difference"),
        rows,
        values,
    )
