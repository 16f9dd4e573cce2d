"""What an evaluation will do and how long it will take here, before it starts.

Windows, targets, updates and multiplications are counted as the evaluator will cut them. Time is that of a
sample of the same shapes, run by the evaluator's own code, for each multiplication of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.evaluation.adapt import Adapter, DocumentAdapter, Frozen, Scored, borrowed
from pgolf_fast.evaluation.adapters import make_adapter
from pgolf_fast.evaluation.protocol import Chunk, Segment
from pgolf_fast.evaluation.score import Scorer, Stream
from pgolf_fast.evaluation.scores import compiles, shared_size, window_batches
from pgolf_fast.evaluation.ttt import adapting_chunks
from pgolf_fast.evaluation.windows import Windows, plain_windows, sliding_windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import make_fake

SAMPLE_SECONDS = 1.0  # a sample is doubled until it takes this long
LONG_SECONDS = 5.0  # and is not repeated where its first run takes this long
# Of a forward: gradients of activations and weights, or of activations alone, are as much again each
ALL_GRADIENTS, INPUT_GRADIENTS = 3, 2


@dataclass(frozen=True)
class Estimate:
    """One of the three scores: what is done for it, and the seconds that should take."""

    name: str
    windows: int
    tokens: int
    """Targets scored."""
    updates: int
    """Gradient steps of test-time training."""
    flops: float
    """As of `forward_flops`; an update is its forward and as much again for each gradient it needs."""
    seconds: float


def forward_flops(model: ModelConfig, length: int, scored: int) -> float:
    """Multiply-adds, twice, of the losses of the last `scored` positions of one window of `length` tokens.

    Products with weights and attention (each query with the keys it sees); the rest is not counted. All but
    queries, output projection, attention and MLP of the last block, and the head, need every position.
    """
    d, kv = model.model_dim, model.kv_dim
    by_query = 2 * d * d + d * (model.mlp_up_rows + model.mlp_hidden)
    keys_seen = length * (length + 1) / 2
    before = length - scored
    keys_seen_last = keys_seen - before * (before + 1) / 2
    full = (model.num_layers - 1) * (length * (by_query + 2 * d * kv) + 2 * d * keys_seen)
    last = scored * by_query + length * 2 * d * kv + 2 * d * keys_seen_last
    ends = scored * d * model.vocab_size
    ends += length * model.bigram_dim * d if model.bigram_vocab_size else 0
    ends += length * model.ve_dim * kv if model.ve_enabled else 0
    return 2.0 * (full + last + ends)


def windows_flops(model: ModelConfig, windows: Windows) -> float:
    """The `forward_flops` of all windows."""
    shapes = np.stack((windows.end - windows.start, windows.end - windows.first))
    found, counts = np.unique(shapes, axis=1, return_counts=True)
    by_shape = zip(found.T.tolist(), counts.tolist(), strict=True)
    return sum(count * forward_flops(model, *shape) for shape, count in by_shape)


@dataclass(frozen=True)
class Learning:
    """Test-time training's updates, and the operations of those on chunks and on segments of documents.

    The low-rank changes themselves, a few in a hundred, are not counted.
    """

    updates: int = 0
    chunks: float = 0.0
    segments: float = 0.0


def learning(
    chunks: Sequence[Chunk | Segment], config: TTTConfig, model: ModelConfig, seq_len: int
) -> Learning:
    """What is learned from these chunks, as `score_and_adapt` goes through them."""
    if config.adapter == "error_guided":
        assert isinstance(chunks[-1], Chunk)
        windows = -(-chunks[-1].end // config.guided.window_tokens)
        updates = config.guided.epochs * config.guided.hard_windows(windows)
        whole = forward_flops(model, config.guided.window_tokens, config.guided.window_tokens)
        return Learning(updates, (windows + INPUT_GRADIENTS * updates) * whole)
    updates, on_chunks, on_segments, held = 0, 0.0, 0.0, 0
    whole = forward_flops(model, seq_len, seq_len)
    for chunk in chunks[:-1]:
        if isinstance(chunk, Chunk):
            sequences = (chunk.end - chunk.begin) // seq_len
            updates += config.epochs * -(-sequences // config.batch_seqs)
            on_chunks += ALL_GRADIENTS * config.epochs * sequences * whole
        elif len(chunk.begin):
            held = min((0 if chunk.opens else held) + chunk.length, max(seq_len, chunk.length))
            updates += config.lora.epochs
            work = INPUT_GRADIENTS * forward_flops(model, held, chunk.length)
            on_segments += config.lora.epochs * len(chunk.begin) * work
    return Learning(updates, on_chunks, on_segments)


def estimate(model: GPT, stream: Stream, config: RunConfig, grid: Transform = None) -> list[Estimate]:
    """The three scores as `three_scores` with the same arguments computes them, by this process alone.

    On a GPU, the seconds are those after compiling.
    """
    length, size = config.eval_seq_len, window_batches(model, config)
    compile_, cuda_graph = compiles(model, config)
    plain = plain_windows(stream.num_targets, length)
    sliding = sliding_windows(
        stream.num_targets, length, config.eval.stride, repeat_tail=config.eval.repeat_tail
    )
    frozen, found = Frozen(model, compile=compile_), []
    for name, windows in (("non-overlapping", plain), ("sliding", sliding)):
        flops = windows_flops(model.config, windows)
        seconds = flops * _scoring(model.config, frozen, Scorer(stream, windows, length, size))
        found.append(Estimate(name, len(windows), int(windows.places()[-1]), 0, flops, seconds))
    windows, chunks = adapting_chunks(sliding, stream, config.ttt)
    learned = learning(chunks, config.ttt, model.config, length)
    scored = windows_flops(model.config, windows)
    alone = config.ttt.adapter == "error_guided"  # it learns from one window at a time
    sample = replace(config.ttt, epochs=1, lora=replace(config.ttt.lora, epochs=1))
    sample = replace(sample, batch_seqs=1 if alone else sample.batch_seqs)
    grid = grid or make_fake(config.quant.bits, config.quant.scale_floor)
    with borrowed(model):
        adapter = make_adapter(model, sample, length, grid, compile=compile_, cuda_graph=cuda_graph)
        if sample.by_document:
            cast(DocumentAdapter, adapter).begin(sample.lora.documents)
        scorer = Scorer(stream, windows, length, shared_size(size, config))
        seconds = scored * _scoring(model.config, adapter, scorer)
        if learned.chunks:
            seconds += learned.chunks * _by_chunk(model.config, adapter, stream, sample, length)
        if learned.segments:
            seconds += learned.segments * _by_segment(model.config, adapter, stream, sample)
    tokens, flops = int(windows.places()[-1]), scored + learned.chunks + learned.segments
    return [*found, Estimate("sliding + TTT", len(windows), tokens, learned.updates, flops, seconds)]


def _scoring(model: ModelConfig, adapter: Adapter, scorer: Scorer) -> float:
    """Seconds per operation of scoring windows from the middle of the stream."""
    windows, device = scorer.windows, scorer.losses.device

    def work(count: int) -> float:
        low = (len(windows) - count) // 2
        scorer.score(adapter.score, low, low + count)
        return windows_flops(model, windows[low : low + count])

    batch = scorer.size(int((windows.end - windows.start).max()))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return _seconds_per_flop(work, batch * threads, len(windows), device)


def _by_chunk(model: ModelConfig, adapter: Adapter, stream: Stream, config: TTTConfig, seq_len: int) -> float:
    """Seconds per operation of one step on sequences of a chunk."""

    def work(count: int) -> float:
        adapter.adapt(Scored(stream.tokens[: count * seq_len + 1].clone(), 0, 2))
        return count * ALL_GRADIENTS * forward_flops(model, seq_len, seq_len)

    most = min(config.batch_seqs, stream.num_targets // seq_len)
    device = stream.tokens.device
    return _seconds_per_flop(work, 1 if device.type == "cpu" else most, most, device)


def _by_segment(model: ModelConfig, adapter: Adapter, stream: Stream, config: TTTConfig) -> float:
    """Seconds per operation of one step on segments of documents."""
    length = config.lora.segment_tokens

    def work(count: int) -> float:
        cast(DocumentAdapter, adapter).begin(count)
        adapter.adapt(Scored(stream.tokens.unfold(0, length + 1, length)[:count].clone(), 0, 2))
        return count * INPUT_GRADIENTS * forward_flops(model, length, length)

    most = min(config.lora.documents, stream.num_targets // length)
    device = stream.tokens.device
    return _seconds_per_flop(work, 1 if device.type == "cpu" else most, most, device)


def _seconds_per_flop(work: Callable[[int], float], count: int, most: int, device: torch.device) -> float:
    """Of `work`, which does so many of its `most` pieces and returns the operations in them.

    From `count` up, it is given twice as much until it takes SAMPLE_SECONDS. Its first call, in which
    libraries prepare themselves and GPUs compile, counts only if that is a small part of it, on a CPU.
    """

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        flops = work(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin, flops

    count = min(count, most)
    seconds, flops = timed()
    if device.type == "cpu" and seconds > LONG_SECONDS:
        return seconds / flops
    while True:
        seconds, flops = timed()
        if seconds >= SAMPLE_SECONDS or count == most:
            return seconds / flops
        count = min(2 * count, most)
