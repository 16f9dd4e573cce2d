"""Bits per byte of a token stream: sums of losses, tokens and bytes over windows, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_fast import report
from pgolf_fast.data.tokenizer import ByteTable, target_bytes
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT


@dataclass(frozen=True)
class Score:
    """Summed loss in nats, and the targets and text bytes it is over."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes)

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte: sum of losses / (ln 2 * sum of bytes)."""
        return self.nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.nan


class Stream:
    """Tokens on the model's device with the byte count of every target."""

    def __init__(self, tokens: np.ndarray, table: ByteTable, device: torch.device):
        if len(tokens) < 2:
            raise PgolfError(f"nothing to score: the stream has {len(tokens)} tokens and needs at least 2")
        ids = tokens.astype(np.int64)
        self.tokens = torch.from_numpy(ids).to(device)
        self.target_bytes = target_bytes(table, ids[:-1], ids[1:])

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1


# (tokens, targets) both (B, T) -> losses (B, T)
LossFunction = Callable[[Tensor, Tensor], Tensor]


def window_losses(
    token_losses: LossFunction, stream: Stream, windows: Windows, seq_len: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per batch of windows: indices of the scored targets and their losses in float64.

    Every window is padded to `seq_len` with token 0: harmless, as the model is causal and padding unscored.
    """
    offsets = torch.arange(seq_len, device=stream.tokens.device)
    for at in range(0, len(windows), batch):
        part = windows[at : at + batch]
        start, end = (torch.from_numpy(t).to(offsets.device)[:, None] for t in (part.start, part.end))
        index = start + offsets
        inside = index < end
        index = torch.where(inside, index, 0)
        x = torch.where(inside, stream.tokens[index], 0)
        y = torch.where(inside, stream.tokens[index + 1], 0)
        losses = token_losses(x, y).double().cpu().numpy()
        scored = (inside & (index >= torch.from_numpy(part.first).to(offsets.device)[:, None])).cpu().numpy()
        yield index.cpu().numpy()[scored], losses[scored]


def score_windows(
    token_losses: LossFunction,
    stream: Stream,
    windows: Windows,
    seq_len: int,
    batch: int,
    what: str | None = None,
) -> Score:
    """The sums over all scored targets. With `what`, progress is shown under that name."""
    total = Score()
    batches = window_losses(token_losses, stream, windows, seq_len, batch)
    if what is not None:
        batches = report.progress(batches, what, total=-(-len(windows) // batch), unit="batch")
    for targets, losses in batches:
        total = total + Score(float(losses.sum()), len(losses), int(stream.target_bytes[targets].sum()))
    return total


def frozen_losses(model: GPT, transform: Transform = None) -> LossFunction:
    """Losses of `model` as it stands, without gradients; the banks are read through `transform`."""

    def losses(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return model.token_losses(tokens, targets, model.banks(transform))

    return losses
