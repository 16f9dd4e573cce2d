"""Calibration of predicted probabilities, accumulated while losses are computed."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.model.gpt import GPT

BINS = 10  # of equal width, for the probability of the likeliest token
DECADES, BINS_PER_DECADE = 6, 2  # for the probability of every token; a last bin holds all lower ones


class Calibration:
    """Sums over all predictions made through `losses`, for the likeliest token and for every token.

    `losses` may be called from several threads at once.
    """

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

    @property
    def targets(self) -> int:
        return int(self._top[0].sum())

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest token."""
        return float(self._top[1].sum() / self.targets)

    @property
    def accuracy(self) -> float:
        """Share of predictions whose likeliest token is the target."""
        return float(self._top[2].sum() / self.targets)

    @property
    def top_error(self) -> float:
        """Expected calibration error of the likeliest token: |hits - probability| by bin, per target."""
        return float(np.abs(self._top[2] - self._top[1]).sum() / self.targets)

    @property
    def every_error(self) -> float:
        """Expected calibration error of all tokens: |hits - summed probability| by bin, per target."""
        return float(np.abs(self._every[2] - self._every[1]).sum() / self.targets)

    @property
    def loss(self) -> float:
        """Mean loss in nats."""
        return float(self._sums[0] / self.targets)

    @property
    def entropy(self) -> float:
        """Expected loss in nats if targets were drawn from the predictions."""
        return float(self._sums[1] / self.targets)

    @property
    def target_probability(self) -> float:
        return float(self._sums[2] / self.targets)

    @property
    def expected_probability(self) -> float:
        """Expected probability of the target if targets were drawn from the predictions."""
        return float(self._sums[3] / self.targets)

    def reliability(self) -> list[tuple[float, float, int, float, float]]:
        """Return (from, to inclusive, targets, mean probability, accuracy) by bin of the likeliest token."""
        return [
            (i / BINS, (i + 1) / BINS, *_means(self._top[:, i]))  # type: ignore[misc]
            for i in range(BINS)
        ]

    def every_probability(self) -> list[tuple[float, float, int, float, float]]:
        """Return (from, to, predictions, mean probability, frequency) by bin of every token."""
        edges = [10 ** (-i / BINS_PER_DECADE) for i in range(self._every.shape[1])]
        lows = [*edges[1:], 0.0]
        return [
            (low, high, *_means(self._every[:, i]))  # type: ignore[misc]
            for i, (low, high) in enumerate(zip(lows, edges, strict=True))
        ]

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        names = ("from", "to", "count", "probability", "frequency")
        tables = {"likeliest": self.reliability(), "every_token": self.every_probability()}
        return {
            "targets": self.targets,
            "confidence": self.confidence,
            "accuracy": self.accuracy,
            "expected_error": self.top_error,
            **{name: [dict(zip(names, row, strict=True)) for row in rows] for name, rows in tables.items()},
        }


def _histograms(places: Tensor, bins: int, *weights: Tensor | None) -> np.ndarray:
    """Sum each of `weights` (None counts) by bin, float64 (weights, bins)."""
    at = places.cpu().numpy()
    return np.stack(
        [np.bincount(at, None if w is None else w.double().cpu().numpy(), minlength=bins) for w in weights]
    )


def _means(sums: np.ndarray) -> tuple[int, float, float]:
    """Return count, mean probability and frequency; zeros for an empty bin."""
    count, probability, hits = sums.tolist()
    return int(count), probability / max(count, 1), hits / max(count, 1)
