"""Distribution of the loss over targets, and calibration, on non-overlapping windows.

Shares by size of the loss are PR 296's table, and shares by word start are PR 1501's; calibration follows
C. Guo et al., "On Calibration of Modern Neural Networks" (2017).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.bench.drawing import Axes, label
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Frozen
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.figures import THRESHOLDS, figures, shares, token_classes
from pgolf_fast.evaluation.score import LossFunction, Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.lab.analysis.models import LoadedModel, Validation, diverged, open_validation
from pgolf_fast.lab.analysis.summary import Options, Summary, columns, draw, tabulate
from pgolf_fast.lab.audit.watch import by_target
from pgolf_fast.lab.compare.statistics import bootstrap_ratio
from pgolf_fast.model.gpt import GPT

SHOWN, CONTEXT_TOKENS = 12, 24  # hardest targets, and tokens shown before each
# PR 296's table of 62 M validation tokens: nats -> share of targets above, share of the loss; and the mean
PR296 = {1: (0.596, 0.85), 3: (0.327, 0.55), 5: (0.116, 0.30), 7: (0.027, 0.15), 10: (0.002, 0.03)}
PR296_MEAN = 1.9668
BINS = 10  # of equal width, for the probability of the likeliest token
DECADES, BINS_PER_DECADE = 6, 2  # for the probability of every token; a last bin holds all lower ones


@dataclass(frozen=True)
class ModelLosses:
    """Losses of one model and what was computed from them."""

    name: str
    network: GPT
    losses: np.ndarray  # by target, (targets,) float64
    figures: dict[str, Any]  # as `evaluation.figures.figures` returns them
    calibration: "Calibration"


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure shares by class and by size of the loss, quantiles, the hardest targets, and calibration."""
    validation = open_validation(models, options)
    stream = validation.stream(options.device)
    classes = token_classes(validation.source.tokenizer)
    measured = []
    for model in models:
        network = model.network(validation.source.table, options.device)
        calibration = Calibration(network)
        scorer, losses = score_plain(model.name, network, stream, validation.seq_len, calibration.losses)
        measured.append(ModelLosses(model.name, network, losses, figures(scorer, classes), calibration))
    starts = validation.source.table.has_leading_space[validation.tokens[1:]]
    summaries = [_published_classes(measured, starts), _classes(measured), _published_sizes(measured)]
    summaries += [_sizes(measured, document_starts(validation.tokens)), _quantiles(measured)]
    return [*summaries, _hardest(measured, validation), _reliability(measured), _probabilities(measured)]


def score_plain(
    name: str, model: GPT, stream: Stream, seq_len: int, losses_of: LossFunction | None = None
) -> tuple[Scorer, np.ndarray]:
    """Score non-overlapping windows with `losses_of`, by default the model's own; losses (targets,) float64.

    Raises PgolfError naming the model if a loss is not finite.
    """
    size = batch_size(None, model.config, model.compute_dtype, stream.tokens.device)
    windows = plain_windows(stream.num_targets, seq_len)
    scorer = Scorer(stream, windows, seq_len, size, pad=False)
    try:
        scorer.score(losses_of or Frozen(model).score, 0, len(windows))
    except PgolfError as error:
        raise diverged(name, "losses") from error
    return scorer, by_target(scorer).astype(np.float64)


def _published_classes(measured: Sequence[ModelLosses], starts: np.ndarray) -> Summary:
    """Compare targets with a leading space, `starts` bool (targets,), with all others (PR 1501)."""
    values: dict[str, Any] = {one.name: {} for one in measured}
    for one in measured:
        for kind, chosen in (("word start", starts), ("other", ~starts)):
            own = one.losses[chosen]
            share, loss = float(own.sum() / one.losses.sum()), float(own.mean()) if len(own) else None
            values[one.name][kind] = {"targets": float(chosen.mean()), "loss_share": share, "loss": loss}
    shown = columns(".2%", targets="of all", loss_share="of the loss") + columns(".4f", loss="nats/token")
    return Summary.published(
        "losses by word start",
        "Shows how much of the summed loss falls on tokens that begin a word (PR 1501 reports about 70 %, at "
        "3.37 nats against 1.08); cannot show that these tokens are hard for their length, as a word start "
        "represents more bytes than a piece within a word.",
        *tabulate(("model", "targets"), shown, values),
    )


def _classes(measured: Sequence[ModelLosses]) -> Summary:
    values: dict[str, Any] = {one.name: one.figures["by_class"] for one in measured}
    rows: list[tuple[str, ...]] = []
    for name, parts in values.items():
        for kind, own in shares(parts).items():
            means = (number(parts[kind][unit], ".4f") for unit in ("loss", "bpb"))
            rows.append((name, kind, *(f"{share:.2%}" for share in own.values()), *means))
    header = ("model", "targets", "of all", "of the bytes", "of the loss", "nats/token", "bits/byte")
    return Summary(
        "losses by class of target",
        "Shows where the bits go, by token and by byte, with bytes and document ends as separate classes; "
        "classes with equal values in the last column have the same share of the loss as of the text.",
        Table(header, rows),
        values,
    )


def least_shares(above: dict[int, float], mean: float) -> dict[int, float]:
    """Return the least share of the loss that targets above each threshold can carry.

    above: threshold in nats -> share of targets above it; mean: nats per target.
    """
    edges = sorted(above)
    # Each target counts as the highest threshold that it exceeds
    between = [above[low] - (above[high] if high else 0.0) for low, high in pairwise([*edges, 0])]
    least = np.cumsum([low * share for low, share in zip(edges, between, strict=True)][::-1])[::-1]
    return {edge: float(nats) / mean for edge, nats in zip(edges, least, strict=True)}


def _published_sizes(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {one.name: {} for one in measured}
    for one in measured:
        for threshold, (targets, loss) in PR296.items():
            above = one.figures["above_nats"][str(threshold)]
            values[one.name][str(threshold)] = {"targets": above["targets"], "loss_share": above["loss"]}
            count = round(above["targets"] * len(one.losses))
            cells = (f"{share:.1%}" for share in (above["targets"], above["loss"], targets))
            rows.append((one.name, f"> {threshold}", f"{count:,}", *cells, f"{loss:.0%}"))
    least = least_shares({nats: targets for nats, (targets, _) in PR296.items()}, PR296_MEAN)
    header = ("model", "nats", "targets", "of all", "of the loss", "PR 296: of all", "PR 296: of the loss")
    return Summary.published(
        "losses by size",
        "Shows that few tokens carry much of the loss, as in PR 296, whose figures are on the right; cannot "
        "show that they could be learned, and PR 296's shares do not match its counts: "
        f"{PR296[3][0]:.1%} of targets above 3 nats carry at least {int(100 * least[3])}% of a mean of "
        f"{PR296_MEAN}, not {PR296[3][1]:.0%}.",
        Table(header, rows),
        {"models": values, "least_shares_of_pr_296": {str(nats): share for nats, share in least.items()}},
    )


def _sizes(measured: Sequence[ModelLosses], starts: np.ndarray) -> Summary:
    """Add bootstrap intervals over documents, whose first targets are `starts`, and lower bounds."""
    rows: list[tuple[str, ...]] = []
    values: dict[str, dict[str, Any]] = {one.name: {} for one in measured}
    for one in measured:
        above = {t: one.figures["above_nats"][str(t)] for t in THRESHOLDS}
        counts = {t: found["targets"] for t, found in above.items()}
        total = np.add.reduceat(one.losses, starts)
        for threshold, least in least_shares(counts, float(one.losses.mean())).items():
            targets, share = counts[threshold], above[threshold]["loss"]
            part = np.add.reduceat(np.where(one.losses > threshold, one.losses, 0.0), starts)
            low, high = bootstrap_ratio(part, total)
            interval = f"{low:.1%} to {high:.1%}" if len(starts) > 1 else "-"
            cells = (f"{targets:.2%}", f"{share:.2%}", interval, f"{least:.1%}")
            rows.append((one.name, f"> {threshold}", *cells))
            bounds = {"least": least, "low": low, "high": high}
            values[one.name][str(threshold)] = {"targets": targets, "loss_share": share, **bounds}
    return Summary(
        "losses by size, with intervals",
        f"Shows the same shares, summed in float64, with 95 % intervals over {len(starts):,} documents and "
        "the minimum that the counts alone imply; a share shows how uneven the loss is, not a possible gain.",
        Table(("model", "nats", "of all", "of the loss", "95 % interval", "at least"), rows),
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
    counts.legend()


def _quantiles(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for one in measured:
        shown = ("loss_quantiles", "loss_share_of_hardest_percent")
        values[one.name] = {name: one.figures[name] for name in shown}
        quantiles, hardest = values[one.name].values()
        rows += [(one.name, f"quantile {q[1:]} %", f"{nats:.4f} nats") for q, nats in quantiles.items()]
        rows += [(one.name, f"hardest {p} %", f"{share:.2%} of the loss") for p, share in hardest.items()]
    return Summary(
        "quantiles of the loss",
        "Shows the spread of losses over targets, and how much of the sum the hardest carry; cannot show "
        "which part of it is noise of the text, which no model predicts.",
        Table(("model", "targets", "loss"), rows),
        values,
    )


def _hardest(measured: Sequence[ModelLosses], validation: Validation) -> Summary:
    tokenizer, tokens = validation.source.tokenizer, validation.tokens
    values: dict[str, list[dict[str, Any]]] = {one.name: [] for one in measured}
    for one in measured:
        for target in np.argsort(-one.losses, kind="stable")[:SHOWN].tolist():
            guess, probability = _guess(one.network, validation, target)
            before = tokens[max(target + 1 - CONTEXT_TOKENS, 0) : target + 1]
            context, piece = tokenizer.decode(before.tolist()), tokenizer.piece(int(tokens[target + 1]))
            entry = {"position": target + 1, "loss": float(one.losses[target]), "target": piece}
            entry |= {"guess": tokenizer.piece(guess), "guess_probability": probability}
            values[one.name].append({**entry, "context": " ".join(context.split())})
    shown = columns(".2f", loss="nats") + columns(str, target="target", guess="expected")
    shown += columns(".1%", guess_probability="probability") + columns(str, context="after")
    return Summary(
        "hardest targets",
        "Shows which targets surprise a model most, the text before them, and what the model expected "
        "instead (a leading \u2581 is a space); a dozen extremes are examples, not a sample.",
        *tabulate(("model",), shown, values),
    )


@torch.no_grad()
def _guess(model: GPT, validation: Validation, target: int) -> tuple[int, float]:
    begin = target // validation.seq_len * validation.seq_len
    tokens = torch.from_numpy(validation.tokens[None, begin : target + 1]).to(model.qo_bank.device)
    hidden = model.hidden(tokens, last=1, context=validation.seq_len)
    probability, token = model.head(hidden)[0, -1].softmax(-1).max(-1)
    return int(token), float(probability)


class Calibration:
    """Sums over all predictions made through `losses`, for the likeliest token and for every token."""

    def __init__(self, model: GPT):
        self._model, self._lock = model, threading.Lock()
        with torch.no_grad():
            self._banks = model.banks()
        self._top = np.zeros((3, BINS))  # targets, summed probability, how many right
        self._every = np.zeros((3, DECADES * BINS_PER_DECADE + 1))  # predictions, summed probability, hits
        self._sums = np.zeros(4)  # loss, entropy, probability of the target, sum of squared probabilities

    @torch.no_grad()
    def losses(self, tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        """Return losses in nats, (B, T) and (B, W) -> (B, W) float32, with the logits in memory."""
        last = None if targets.shape[1] == tokens.shape[1] else targets.shape[1]
        logits = self._model.head(self._model.hidden(tokens, self._banks, last=last, context=context))
        logs = logits.flatten(0, 1).log_softmax(-1)
        wanted = targets.flatten()
        losses = -logs.gather(1, wanted[:, None])[:, 0]
        self._add(logs, wanted, losses)
        return losses.view_as(targets).float()

    def _add(self, logs: Tensor, wanted: Tensor, losses: Tensor) -> None:
        probabilities = logs.exp()
        confidence, guess = probabilities.max(-1)
        top = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        places = (logs * (-BINS_PER_DECADE / np.log(10))).floor().long().clamp(0, self._every.shape[1] - 1)
        hits = places.gather(1, wanted[:, None])[:, 0]
        sums = (losses, -(probabilities * logs).sum(-1), (-losses).exp(), probabilities.square().sum(-1))
        added_top = _histograms(top, BINS, None, confidence, guess == wanted)
        added_every = _histograms(places.flatten(), self._every.shape[1], None, probabilities.flatten())
        added_hits = _histograms(hits, self._every.shape[1], None)
        with self._lock:  # the scorer calls `losses` from several threads
            self._top += added_top
            self._every += np.concatenate((added_every, added_hits))
            self._sums += [float(values.double().sum()) for values in sums]

    def likeliest(self) -> dict[str, Any]:
        """Return calibration of the likeliest token, and by bin that of every token, as plain JSON values.

        Expected calibration error: |hits - summed probability| by bin, per target.
        """
        edges = [10 ** (-i / BINS_PER_DECADE) for i in range(self._every.shape[1])]
        tenths = [i / BINS for i in range(BINS + 1)]
        count, confidence, right = self._top.sum(1).tolist()
        return {
            **{"targets": int(count), "confidence": confidence / count, "accuracy": right / count},
            "expected_error": _expected_error(self._top, count),
            "likeliest": _bins(self._top, tenths[:-1], tenths[1:]),
            "every_token": _bins(self._every, [*edges[1:], 0.0], edges),
        }

    def probabilities(self) -> dict[str, float]:
        """Return mean loss (nats) and probability of the target, and both if targets were predictions."""
        count = self._top[0].sum()
        loss, entropy, target, expected = (self._sums / count).tolist()
        return {
            **{"mean_loss": loss, "mean_entropy": entropy, "mean_target_probability": target},
            "mean_expected_target_probability": expected,
            "expected_error": _expected_error(self._every, count),
        }


def _expected_error(sums: np.ndarray, targets: float) -> float:
    return float(np.abs(sums[2] - sums[1]).sum() / targets)


def _bins(sums: np.ndarray, lows: Sequence[float], highs: Sequence[float]) -> list[dict[str, Any]]:
    """Tabulate bins (from, to]: count, mean probability and frequency; zeros for an empty bin."""
    names, counts = ("from", "to", "count", "probability", "frequency"), sums[0].astype(int).tolist()
    parts = (lows, highs, counts, *(sums[1:] / np.maximum(sums[0], 1)).tolist())
    return [dict(zip(names, values, strict=True)) for values in zip(*parts, strict=True)]


def _histograms(places: Tensor, bins: int, *weights: Tensor | None) -> np.ndarray:
    """Sum each of `weights` (None counts) by bin, float64 (weights, bins)."""
    at, given = places.cpu().numpy(), (w if w is None else w.double().cpu().numpy() for w in weights)
    return np.stack([np.bincount(at, weight, minlength=bins) for weight in given])


def _reliability(measured: Sequence[ModelLosses]) -> Summary:
    values = {one.name: one.calibration.likeliest() for one in measured}
    rows: list[tuple[str, ...]] = []
    for name, all_bins in values.items():
        whole = (all_bins["targets"], all_bins["confidence"], all_bins["accuracy"])
        bins = {f"{b['from']:.1f} to {b['to']:.1f}": tuple(b.values())[2:] for b in all_bins["likeliest"]}
        for place, (count, confidence, accuracy) in {**bins, "all": whole}.items():
            cells = (f"{confidence:.3f}", f"{accuracy:.3f}", f"{accuracy - confidence:+.3f}")
            rows.append((name, place, f"{count:,}", *(cells if count else ("-",) * 3)))
        rows.append((name, "expected error", "", "", "", f"{all_bins['expected_error']:.4f}"))
    return Summary(
        "calibration of the likeliest token",
        "Shows whether the likeliest token is correct as often as its probability says; the expected error "
        "depends on the bins, is above zero for a perfect model on few tokens, and ignores all other tokens.",
        Table(("model", "probability", "targets", "mean probability", "accuracy", "difference"), rows),
        values,
        draw("reliability", lambda axes: _paint_reliability(axes, values), 2, width=9.0, height=3.8),
    )


def _paint_reliability(panels: Sequence[Axes], values: dict[str, dict[str, Any]]) -> None:
    top, every = panels
    for axes, least, kind in ((top, 0.0, "likeliest"), (every, 1e-7, "every_token")):
        axes.plot((least, 1), (least, 1), color="0.5", linewidth=0.8)
        for name, bins in values.items():
            # A logarithmic axis has no zero
            seen = [b for b in bins[kind] if b["count"] and (axes is top or b["frequency"])]
            x, y = ([b[key] for b in seen] for key in ("probability", "frequency"))
            axes.plot(x, y, "o-", markersize=4, label=label(name))
    top.set(xlabel="probability", ylabel="accuracy", title="likeliest token")
    every.set(xscale="log", yscale="log", xlabel="probability", ylabel="frequency", title="every token")
    top.legend()


def _probabilities(measured: Sequence[ModelLosses]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values = {one.name: one.calibration.probabilities() for one in measured}
    for name, means in values.items():
        loss, entropy, target, expected, error = means.values()
        pairs = {"loss, nats": (loss, entropy), "probability of the target": (target, expected)}
        rows += [(name, what, f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}") for what, (a, b) in pairs.items()]
        rows.append((name, "expected error, all tokens", "", "", f"{error:.4f}"))
    return Summary(
        "calibration of the target's probability",
        "Shows whether the losses are those that the probabilities predict (the mean loss of a calibrated "
        "model is its own entropy); overconfidence in one place can hide underconfidence in another.",
        Table(("model", "quantity", "measured", "predicted", "difference"), rows),
        values,
    )
