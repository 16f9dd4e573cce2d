"""Legal test-time training: score a chunk with frozen weights, then learn from it (PR 1501)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pgolf_fast import report
from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.score import Score, Stream, frozen_losses, window_losses
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import fake_int6


@dataclass(frozen=True)
class TTTResult:
    """The score, what was adapted, and how often; `by_chunk` is the running score after each chunk."""

    score: Score
    trainable: int
    updates: int
    by_chunk: list[Score]


def trainable_parameters(model: GPT, config: TTTConfig) -> list[nn.Parameter]:
    """The parameters that adapt: the banks, or all but the first blocks' own scalars."""
    if config.parameters == "banks":
        return model.bank_parameters()
    frozen = tuple(f"blocks.{i}." for i in range(config.freeze_blocks))
    return [p for name, p in model.named_parameters() if not name.startswith(frozen)]


def legal_ttt(
    model: GPT,
    stream: Stream,
    windows: Windows,
    seq_len: int,
    batch: int,
    config: TTTConfig,
    *,
    grid: Transform = fake_int6,
    before_restore: Callable[[], object] | None = None,
) -> TTTResult:
    """Score every window, adapting on each chunk after it is scored and never after the last.

    `grid` is what `config.quantize_forward` rounds the banks to: the artifact's own grid, or int6 by
    default; the projections, which are not on it, are rounded to int6. The model's weights are what they were
    when this returns or raises; `before_restore` is called while it still has the adapted ones.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    try:
        result = _Adapter(model, stream, seq_len, config, grid).run(windows, batch)
        if before_restore is not None:
            before_restore()
        return result
    finally:
        model.projection_transform = None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = grads[name]


def chunk_lr(config: TTTConfig, chunk: int, chunks: int) -> float:
    """Constant within a chunk, a half cosine from `config.lr` to zero across them."""
    return 0.5 * config.lr * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


class _Adapter:
    def __init__(
        self,
        model: GPT,
        stream: Stream,
        seq_len: int,
        config: TTTConfig,
        grid: Transform,
    ):
        self.model, self.stream, self.seq_len, self.config = model, stream, seq_len, config
        self.bank_transform = grid if config.quantize_forward == "banks" else None
        self.projection_transform = fake_int6 if config.quantize_forward == "projections" else None
        self.chunks = math.ceil(stream.num_targets / config.chunk_tokens)
        self.trainable = trainable_parameters(model, config)
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in self.trainable:
            parameter.requires_grad_()
            parameter.grad = torch.zeros_like(parameter)
        self.sgd = torch.optim.SGD(self.trainable, lr=0.0, momentum=config.momentum)
        self.scored = np.zeros(stream.num_targets, dtype=bool)
        self.updates = 0

    def run(self, windows: Windows, batch: int) -> TTTResult:
        chunk_of = np.minimum(windows.first // self.config.chunk_tokens, self.chunks - 1)
        total, by_chunk = Score(), []
        for chunk in report.progress(range(self.chunks), "score and adapt", total=self.chunks, unit="chunk"):
            total = total + self._score(windows[np.flatnonzero(chunk_of == chunk)], batch)
            by_chunk.append(total)
            if chunk < self.chunks - 1:
                self._adapt(chunk)
        return TTTResult(total, sum(p.numel() for p in self.trainable), self.updates, by_chunk)

    def _score(self, windows: Windows, batch: int) -> Score:
        total = Score()
        losses_of = frozen_losses(self.model, self.bank_transform)
        for targets, losses in window_losses(losses_of, self.stream, windows, self.seq_len, batch):
            total = total + Score(
                float(losses.sum()), len(losses), int(self.stream.target_bytes[targets].sum())
            )
            self.scored[targets] = True
        return total

    def _adapt(self, chunk: int) -> None:
        """Epochs of SGD over the chunk's sequences in order (a rest shorter than a sequence is left out)."""
        c = self.config
        begin = chunk * c.chunk_tokens
        length = min(c.chunk_tokens, self.stream.num_targets - begin)
        sequences = length // self.seq_len
        for group in self.sgd.param_groups:
            group["lr"] = chunk_lr(c, chunk, self.chunks)
        for _ in range(c.epochs):
            for first in range(0, sequences, c.batch_seqs):
                count = min(c.batch_seqs, sequences - first)
                self._update(begin + first * self.seq_len, count)

    def _update(self, begin: int, sequences: int) -> None:
        end = begin + sequences * self.seq_len
        if not self.scored[begin:end].all():
            raise AssertionError(f"test-time training would use unscored targets in {begin}..{end}")
        tokens = self.stream.tokens[begin : end + 1]
        x, y = tokens[:-1].view(sequences, -1), tokens[1:].view(sequences, -1)
        self.model.projection_transform = self.projection_transform
        self.model.loss(x, y, self.model.banks(self.bank_transform)).backward()
        self.model.projection_transform = None
        nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip)
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=False)
        self.updates += 1
