"""Bits per byte of a token stream: losses of windows, batch by batch, summed in float64.

Every scored target leaves its loss in one row of float32 numbers, in the order of the windows, and sums are
taken over that row. So a score depends neither on how windows are batched and shared out over processes nor
on the order in which they are computed, as far as a loss itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.data.tokenizer import ByteTable, target_bytes
from pgolf_fast.distributed import ALONE, Ranks
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.windows import Batch, BatchSize, Windows, batches
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT

# Of a batch, per thread. 64 windows of 256 of `small` took 0.93 s in batches of 8 to 32, 1.06 by 4, 1.5 by 1.
CPU_TOKENS = 4096
GPU_TOKENS = 2**20  # more are no quicker, and offsets stay below 2^31 up to a width of 2048


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

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON; None for what nothing can be divided by."""
        bpb = self.bpb if self.text_bytes else None
        loss = self.loss if self.tokens else None
        return {"bpb": bpb, "loss": loss, "tokens": self.tokens, "bytes": self.text_bytes}


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


# tokens (B, T), targets (B, W) of the last W positions, length positions are encoded for, and where windows
# have rows these (B,) -> losses (B, W)
LossFunction = Callable[..., Tensor]


def frozen_losses(
    model: GPT, transform: Transform = None, token_losses: Callable[..., Tensor] | None = None
) -> LossFunction:
    """Losses of `model` as it stands now, without gradients; the banks are read through `transform`.

    `token_losses` stands in for `model.token_losses`, say compiled.
    """
    token_losses = token_losses or model.token_losses
    with torch.no_grad():
        banks = model.banks(transform)

    def losses(tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        with torch.no_grad():
            return token_losses(tokens, targets, banks, context=context)

    return losses


def batch_size(
    batch: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks = ALONE
) -> BatchSize:
    """Windows of one batch: as many as told, or (None) as a CPU's cache or half of a GPU's free memory holds.

    Powers of two, and the first rank's on every rank, so that the batches are the same everywhere.
    """
    if batch is not None:
        return lambda length: batch
    tokens = CPU_TOKENS
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
        tokens = min(GPU_TOKENS, free // 2 // (_numbers_a_token(config) * dtype.itemsize))
        tokens = int(ranks.same(tokens))
    return lambda length: 2 ** max(0, (tokens // length).bit_length() - 1)


def _numbers_a_token(config: ModelConfig) -> int:
    """A generous count of the activations that one position keeps alive at the widest place of a forward."""
    streams = config.num_layers // 2 + 12  # skips; x, x0, the norms, q, the context, ... some in float32
    return streams * config.model_dim + 8 * config.kv_dim + 2 * config.mlp_up_rows + config.mlp_hidden


class Scorer:
    """Fills in the losses of windows, part by part; with several processes, each computes its share."""

    def __init__(
        self,
        stream: Stream,
        windows: Windows,
        seq_len: int,
        size: BatchSize,
        ranks: Ranks = ALONE,
        *,
        pad: bool | None = None,
    ):
        """`pad` fills every batch up to the size of its run's first, for programs that are compiled for one
        shape; None does so on a GPU."""
        device = stream.tokens.device
        self.stream, self.windows, self.seq_len, self.size, self.ranks = stream, windows, seq_len, size, ranks
        self.places = windows.places()
        self.losses = torch.zeros(int(self.places[-1]), dtype=torch.float32, device=device)
        """Of all scored targets, in nats, in the order of the windows."""
        self._pad = device.type == "cuda" if pad is None else pad
        self._start = torch.from_numpy(windows.start).to(device)
        self._row = None if windows.row is None else torch.from_numpy(windows.row).to(device)
        self._bytes = np.concatenate(([0], np.cumsum(stream.target_bytes)))

    def score(self, losses_of: LossFunction, low: int, high: int) -> Score:
        """The sums over windows low .. high-1, on every rank."""
        if low == high:
            return Score()
        mine = batches(self.windows, low, high, self.size)[self.ranks.rank :: self.ranks.world_size]
        _on_every_thread(lambda batch: self._fill(losses_of, batch), mine, self._start.device)
        self.ranks.sum_(self.losses[self.places[low] : self.places[high]])
        return self.sums(low, high)

    def sums(self, low: int, high: int) -> Score:
        """The sums over windows low .. high-1 whose losses are filled in."""
        losses = self.losses[self.places[low] : self.places[high]].cpu().numpy()
        part = self.windows[low:high]
        text_bytes = int((self._bytes[part.end] - self._bytes[part.first]).sum())
        return Score(float(losses.sum(dtype=np.float64)), len(losses), text_bytes)

    def by_target(self) -> np.ndarray:
        """All losses in the order of the stream, (targets,) float32; for windows that score each once."""
        found = np.empty(self.stream.num_targets, dtype=np.float32)
        found[self.targets(0, len(self.windows))] = self.losses.cpu().numpy()
        return found

    def targets(self, low: int, high: int) -> np.ndarray:
        """The targets of windows low .. high-1 in the order of their losses, (scored,) int64."""
        places = self.places[low : high + 1]
        ahead = np.repeat(self.windows.first[low:high] - places[:-1], np.diff(places))
        return ahead + np.arange(places[0], places[-1])

    def _fill(self, losses_of: LossFunction, batch: Batch) -> None:
        start, *rows = (self._padded(t, batch) for t in (self._start, self._row) if t is not None)
        spans = self.stream.tokens.unfold(0, batch.length + 1, 1)[start]  # (B, length + 1)
        tokens, targets = spans[:, :-1].contiguous(), spans[:, 1 + batch.length - batch.scored :].contiguous()
        losses = losses_of(tokens, targets, self.seq_len, *rows)[: batch.high - batch.low]
        place = self.places[batch.low]
        self.losses[place : place + losses.numel()] = losses.flatten()

    def _padded(self, values: Tensor, batch: Batch) -> Tensor:
        """Those of a batch's windows, where all batches must be of one size with the last repeated."""
        own = values[batch.low : batch.high]
        missing = batch.full - len(own) if self._pad else 0
        return torch.cat((own, own[-1:].expand(missing))) if missing else own


def _on_every_thread(function: Callable[[Batch], None], items: list[Batch], device: torch.device) -> None:
    """On a CPU a batch is one thread's work: no thread waits for another within it, and its bits are the same
    for any number of threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for _ in pool.map(function, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a matrix library may keep one number for all threads


def score_windows(
    token_losses: LossFunction, stream: Stream, windows: Windows, seq_len: int, batch: int
) -> Score:
    """The sums over all scored targets, by this process alone."""
    scorer = Scorer(stream, windows, seq_len, lambda length: batch)
    return scorer.score(token_losses, 0, len(windows))
