"""Bits per byte of a token stream: losses of windows, batch by batch, summed in float64.

The losses of all scored targets fill one float32 row in the order of the windows, and sums are taken over it.
A score depends on batching, ranks and the order of windows only where the individual losses do.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.data.tokenizer import ByteTable, target_bytes
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.windows import Batch, BatchSize, Windows, batches

# Per batch and thread. 64 windows of 256 of `small`: 0.93 s in batches of 8 to 32, 1.06 s of 4, 1.5 s of 1.
CPU_TOKENS = 4096
GPU_TOKENS = 2**20  # more are no faster, and offsets stay below 2^31 up to a width of 2048


@dataclass(frozen=True)
class Score:
    """Summed loss in nats over `tokens` targets, which are `text_bytes` of text."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Score") -> "Score":
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
        """Return plain values for JSON; None for a ratio with denominator 0."""
        ratios = {"bpb": self.bpb if self.text_bytes else None, "loss": self.loss if self.tokens else None}
        return {**ratios, "tokens": self.tokens, "bytes": self.text_bytes}


class Stream:
    """Tokens on the model's device, and the bytes of every target: `side_bytes`, or those of its piece."""

    def __init__(
        self, tokens: np.ndarray, table: ByteTable, device: torch.device, side_bytes: np.ndarray | None = None
    ):
        if len(tokens) < 2:
            raise PgolfError(f"nothing to score: the stream has {len(tokens)} tokens and needs at least 2")
        ids = tokens.astype(np.int64)
        self.tokens, self.num_targets = torch.from_numpy(ids).to(device), len(ids) - 1
        counted = target_bytes(table, ids[:-1], ids[1:])  # raises for unknown ids
        self.target_bytes = counted if side_bytes is None else side_bytes


# tokens (B, T), targets (B, W) of the last W positions, the length that positions are encoded for, and the
# windows' rows (B,) if they have any -> losses (B, W)
LossFunction = Callable[..., Tensor]


def batch_size(
    batch: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device, world: World = SINGLE
) -> BatchSize:
    """Return the windows per batch: `batch`, or what fits a CPU's cache or half of a GPU's free memory.

    The latter are powers of two, and rank 0's on every rank, so that batches are the same everywhere.
    """
    if batch is not None:
        return lambda length: batch
    tokens = CPU_TOKENS
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        # upper bound on the activations of a position: skips; x, x0, norms, q, context, ... some in float32
        streams = (config.num_skips + 12) * config.model_dim
        values = streams + 8 * config.kv_dim + 2 * config.mlp_up_rows + config.mlp_hidden
        tokens = int(world.same(min(GPU_TOKENS, free // 2 // (values * dtype.itemsize))))
    return lambda length: 2 ** max(0, (tokens // length).bit_length() - 1)


class Scorer:
    """Losses of windows, filled in part by part; with several ranks, each computes its share."""

    def __init__(
        self,
        stream: Stream,
        windows: Windows,
        seq_len: int,
        size: BatchSize,
        world: World = SINGLE,
        *,
        pad: bool | None = None,
    ):
        """With `pad` (default: on a GPU), last batches are filled up: compiled models see one shape."""
        device = stream.tokens.device
        self.stream, self.windows, self.seq_len, self.size, self.world = stream, windows, seq_len, size, world
        self.places = windows.places()
        self.losses = torch.zeros(int(self.places[-1]), dtype=torch.float32, device=device)
        """Losses of all scored targets in nats, in the order of the windows."""
        self.what: str | None = None  # title under which `score` shows its progress
        self._pad = device.type == "cuda" if pad is None else pad
        self._start = torch.from_numpy(windows.start).to(device)
        self._row = None if windows.row is None else torch.from_numpy(windows.row).to(device)
        self._bytes = np.concatenate(([0], np.cumsum(stream.target_bytes)))

    def score(self, losses_of: LossFunction, low: int, high: int) -> Score:
        """Fill in losses of windows low .. high-1, which must be finite; return their sums on every rank."""
        if low == high:
            return Score()
        mine = batches(self.windows, low, high, self.size)[self.world.rank :: self.world.world_size]
        done = _in_threads(lambda batch: self._fill(losses_of, batch), mine, self._start.device)
        shown = self.what is not None and self.world.is_main
        for _ in console.progress(done, self.what or "", total=len(mine), unit="batch") if shown else done:
            pass
        # losses of the other ranks are zero here
        losses = self.world.sum_(self.losses[self.places[low] : self.places[high]])
        if len(wrong := (~losses.isfinite()).nonzero()):
            target, loss = self.windows[low:high].targets()[int(wrong[0])], losses[wrong[0]].item()
            hint = "activations overflow, or test-time training diverges (lower ttt.lr)"
            raise PgolfError(f"the loss of target {target:,} is {loss}, one of {len(wrong):,}: {hint}")
        return self.sums(low, high)

    def sums(self, low: int, high: int) -> Score:
        """Return the sums over windows low .. high-1 whose losses are filled in."""
        losses = self.losses[self.places[low] : self.places[high]].cpu().numpy()
        part = self.windows[low:high]
        text_bytes = int((self._bytes[part.end] - self._bytes[part.first]).sum())
        return Score(float(losses.sum(dtype=np.float64)), len(losses), text_bytes)

    def _fill(self, losses_of: LossFunction, batch: Batch) -> None:
        start, *rows = (self._padded(t, batch) for t in (self._start, self._row) if t is not None)
        spans = self.stream.tokens.unfold(0, batch.length + 1, 1)[start]  # (B, length + 1)
        tokens, targets = spans[:, :-1].contiguous(), spans[:, 1 + batch.length - batch.scored :].contiguous()
        losses = losses_of(tokens, targets, self.seq_len, *rows)[: batch.high - batch.low]
        place = self.places[batch.low]
        self.losses[place : place + losses.numel()] = losses.flatten()

    def _padded(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the values of a batch's windows; to pad, the last is repeated."""
        own = values[batch.low : batch.high]
        missing = batch.full - len(own) if self._pad else 0
        return torch.cat((own, own[-1:].expand(missing))) if missing else own


def _in_threads(function: Callable[[Batch], None], items: list[Batch], device: torch.device) -> Iterator:
    """Apply `function` to each item, on a CPU one item per thread, and yield after each.

    Threads do not wait for each other within an item, and results are bit-identical for any thread count.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a matrix library may keep one number for all threads
