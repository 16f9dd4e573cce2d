"""Windows, updates, operations and time of an evaluation: counts of its chunks, times of a sample."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.evaluation.adapters.registry import adapting_chunks
from pgolf_fast.evaluation.protocol import Chunk
from pgolf_fast.evaluation.score import Scorer, Stream
from pgolf_fast.evaluation.scores import PLAIN, SLIDING, TTT, Evaluator
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT

SAMPLE_SECONDS = 1.0  # a sample is doubled until it takes this long
LONG_SECONDS = 5.0  # and is not repeated if its first run takes this long
# Multiples of a forward: gradients of activations cost one more, gradients of weights another
ALL_GRADIENTS, INPUT_GRADIENTS = 3, 2


class Estimate(NamedTuple):
    """Work and expected seconds of one of the three scores."""

    name: str
    windows: int
    tokens: int  # targets scored
    updates: int  # gradient steps of test-time training
    flops: float  # of `forward_flops`; an update is its forward and as much again for each kind of gradient
    seconds: float


def forward_flops(model: ModelConfig, length: int, scored: int) -> float:
    """Return twice the multiply-adds of the losses of the last `scored` positions of a window.

    Counts products with weights and attention (each query with the keys it sees). Queries, output projection,
    attention and MLP of the last visit, and the head, are needed at the scored positions only.
    """
    d, kv = model.model_dim, model.kv_dim
    by_query = 2 * d * d + d * (model.mlp_up_rows + model.mlp_hidden)
    by_query += model.num_heads * model.head_gate_width
    keys_seen = length * (length + 1) / 2
    before = length - scored
    keys_seen_last = keys_seen - before * (before + 1) / 2
    full = (model.num_visits - 1) * (length * (by_query + 2 * d * kv) + 2 * d * keys_seen)
    last = scored * by_query + length * 2 * d * kv + 2 * d * keys_seen_last
    ends = scored * d * model.vocab_size
    ends += length * model.bigram_dim * d if model.bigram_vocab_size else 0
    ends += length * model.ve_dim * kv if model.ve_enabled else 0
    return 2.0 * (full + last + ends)


def windows_flops(model: ModelConfig, windows: Windows) -> float:
    """Return the `forward_flops` of all windows."""
    shapes = np.stack((windows.end - windows.start, windows.end - windows.first))
    unique, counts = np.unique(shapes, axis=1, return_counts=True)
    by_shape = zip(unique.T.tolist(), counts.tolist(), strict=True)
    return sum(count * forward_flops(model, *shape) for shape, count in by_shape)


class Learning(NamedTuple):
    """Updates of test-time training and their operations, without a few percent for low-rank changes."""

    updates: int = 0
    chunks: float = 0.0  # operations on chunks of the stream
    segments: float = 0.0  # operations on segments of documents


def learning(chunks: Sequence[Chunk], config: TTTConfig, model: ModelConfig, seq_len: int) -> Learning:
    """Return what is learned from these chunks, in the order of `score_and_adapt`."""
    if config.adapter == "error_guided":
        windows = -(-chunks[-1].length // config.guided.window_tokens)
        updates = config.guided.epochs * config.guided.hard_windows(windows)
        whole = forward_flops(model, config.guided.window_tokens, config.guided.window_tokens)
        return Learning(updates, (windows + INPUT_GRADIENTS * updates) * whole)
    updates, on_chunks, on_segments, held = 0, 0.0, 0.0, 0
    whole = forward_flops(model, seq_len, seq_len)
    for chunk in chunks[:-1]:
        if not chunk.by_document:
            sequences = chunk.length // seq_len
            updates += config.epochs * -(-sequences // config.batch_seqs)
            on_chunks += ALL_GRADIENTS * config.epochs * sequences * whole
        elif chunk.starts:
            held = min((0 if chunk.new_documents else held) + chunk.length, max(seq_len, chunk.length))
            updates += config.lora.epochs
            work = INPUT_GRADIENTS * forward_flops(model, held, chunk.length)
            on_segments += config.lora.epochs * len(chunk.starts) * work
    return Learning(updates, on_chunks, on_segments)


def estimate(model: GPT, stream: Stream, config: RunConfig, grid: Transform = None) -> list[Estimate]:
    """Estimate the `three_scores` of these arguments on one rank; on a GPU, seconds exclude compilation."""
    evaluator, ttt = Evaluator(model, stream, config, grid), config.ttt
    sliding, frozen = evaluator.sliding_windows(), evaluator.frozen_adapter()
    estimates = []
    for name, windows in ((PLAIN, evaluator.plain_windows()), (SLIDING, sliding)):
        flops = windows_flops(model.config, windows)
        seconds = flops * _scoring(model.config, frozen, evaluator.scorer(windows))
        estimates.append(Estimate(name, len(windows), int(windows.places()[-1]), 0, flops, seconds))
    windows, chunks = adapting_chunks(sliding, stream, ttt)
    updates, on_chunks, on_segments = learning(chunks, ttt, model.config, config.eval_seq_len)
    scored = windows_flops(model.config, windows)
    # error_guided learns from one window at a time
    sequences = 1 if ttt.adapter == "error_guided" else ttt.batch_seqs
    sample = replace(ttt, epochs=1, lora=replace(ttt.lora, epochs=1), batch_seqs=sequences)
    with evaluator.adapter(sample) as adapter:
        adapter.begin(sample.lora.documents)
        scorer = evaluator.scorer(windows, evaluator.adapting_size(ttt))
        seconds = scored * _scoring(model.config, adapter, scorer)
        for flops, by_document in ((on_chunks, False), (on_segments, True)):
            if flops:
                seconds += flops * _adapting(adapter, evaluator, sample, by_document)
    tokens, flops = int(windows.places()[-1]), scored + on_chunks + on_segments
    return [*estimates, Estimate(TTT, len(windows), tokens, updates, flops, seconds)]


def _scoring(model: ModelConfig, adapter: Adapter, scorer: Scorer) -> float:
    """Return seconds per operation of scoring windows from the middle of the stream."""
    windows, device = scorer.windows, scorer.losses.device

    def work(count: int) -> float:
        low = (len(windows) - count) // 2
        scorer.score(adapter.score, low, low + count)
        return windows_flops(model, windows[low : low + count])

    batch = scorer.size(int((windows.end - windows.start).max()))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return _seconds_per_flop(work, batch * threads, len(windows), device)


def _adapting(adapter: Adapter, evaluator: Evaluator, ttt: TTTConfig, by_document: bool) -> float:
    """Return seconds per operation of one step on segments of documents, or on sequences of a chunk."""
    stream, model = evaluator.stream, evaluator.model.config
    length = ttt.lora.segment_tokens if by_document else evaluator.config.eval_seq_len
    gradients = INPUT_GRADIENTS if by_document else ALL_GRADIENTS
    most = min(ttt.lora.documents if by_document else ttt.batch_seqs, stream.num_targets // length)

    def work(count: int) -> float:
        tokens = stream.tokens[None, : count * length + 1]
        if by_document:
            adapter.begin(count)
            tokens = tokens[0].unfold(0, length + 1, length)
        adapter.adapt(Scored(tokens.clone(), 0, 2, by_document))
        return count * gradients * forward_flops(model, length, length)

    device = stream.tokens.device
    return _seconds_per_flop(work, 1 if device.type == "cpu" else most, most, device)


def _seconds_per_flop(work: Callable[[int], float], count: int, most: int, device: torch.device) -> float:
    """Return seconds per operation of `work(count)`, which does `count` of `most` pieces and returns flops.

    `count` is doubled until a call takes SAMPLE_SECONDS. The first call initializes libraries and compiles;
    it counts only on a CPU and only if it takes LONG_SECONDS.
    """

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        flops = work(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        return seconds, seconds / flops

    count = min(count, most)
    seconds, ratio = timed()
    if device.type == "cpu" and seconds > LONG_SECONDS:
        return ratio
    while True:
        seconds, ratio = timed()
        if seconds >= SAMPLE_SECONDS or count == most:
            return ratio
        count = min(2 * count, most)
