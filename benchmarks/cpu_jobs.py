"""Training, scoring and test-time training of a configuration as endless jobs, on synthetic tokens."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

import pgolf_fast  # noqa: F401 - before torch, which reads what this sets

# isort: split
import numpy as np
import torch
from gpu_session.step import Pool, make_model, markov_tokens

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.shards import BOS_ID
from pgolf_fast.data.tokenizer import ByteTable
from pgolf_fast.distributed import this_process
from pgolf_fast.evaluation.adapters.registry import adapting_chunks
from pgolf_fast.evaluation.protocol import Chunk, Ledger
from pgolf_fast.evaluation.score import CPU_TOKENS, Stream
from pgolf_fast.evaluation.scores import Evaluator
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.train.trainer import Trainer

Pieces = Iterator[int]  # yields after each piece of work how many tokens it had
MICRO_BATCHES = 4  # different ones, which are repeated
DOCUMENT_SEGMENTS = 4  # of test-time training, in each document
SCORED_BATCHES = 8  # in a piece of scoring


def steady(config: RunConfig) -> RunConfig:
    """Return a configuration whose steps are all alike: no meta steps, rounding or adaptive schedule."""
    train = replace(config.train, meta=None, qat=None, schedule="steps", steps=10**6, max_seconds=None)
    return replace(config, train=replace(train, adaptive_warmdown=False))


def token_pool(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of MICRO_BATCHES micro-batches, each (sequences, seq_len) int64."""
    length = config.train.seq_len
    sequences = MICRO_BATCHES * config.train.micro_batch_tokens // length
    tokens = torch.from_numpy(markov_tokens(config.model.vocab_size, sequences, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(config: RunConfig) -> Pieces:
    """Make optimizer steps."""
    world = this_process()
    pool = Pool(*token_pool(config), config.train.micro_batch_tokens // config.train.seq_len)
    trainer = Trainer(make_model(config, world.device), steady(config), pool, world)
    while True:
        trainer.advance()
        yield trainer.tokens_per_step


def _evaluator(config: RunConfig, documents: int, length: int) -> Evaluator:
    device, vocab = this_process().device, config.model.vocab_size
    tokens = markov_tokens(vocab, documents, length)
    tokens[tokens == BOS_ID], tokens[:, 0] = BOS_ID + 1, BOS_ID
    ones = np.ones(vocab, np.int16)
    stream = Stream(np.append(tokens, BOS_ID), ByteTable(ones, ones > 1, ones > 1), device)
    return Evaluator(make_model(config, device), stream, config)


def score(config: RunConfig) -> Pieces:
    """Score windows that do not overlap."""
    length = config.eval_seq_len
    count = SCORED_BATCHES * max(1, CPU_TOKENS // length)  # windows in a piece
    evaluator = _evaluator(config, 2 * count, length)
    adapter, scorer = evaluator.frozen_adapter(), evaluator.scorer(evaluator.plain_windows())
    while True:
        for low in range(0, len(scorer.windows), count):
            yield scorer.score(adapter.score, low, min(low + count, len(scorer.windows))).tokens


def adapting(config: RunConfig) -> tuple[Evaluator, Windows, list[Chunk]]:
    """Return an evaluator of some documents, and the windows and chunks of its test-time training."""
    options, length = config.ttt, config.eval_seq_len
    if options.by_document:
        evaluator = _evaluator(
            config, options.lora.documents, DOCUMENT_SEGMENTS * options.lora.segment_tokens
        )
    else:
        evaluator = _evaluator(config, max(1, 2 * options.chunk_tokens // length), length)
    return evaluator, *adapting_chunks(evaluator.sliding_windows(), evaluator.stream, options)


def ttt(config: RunConfig) -> Pieces:
    """Score sliding windows with the configured adapter, which learns from each chunk once it is scored."""
    evaluator, windows, chunks = adapting(config)
    scorer = evaluator.scorer(windows, evaluator.adapting_size(config.ttt))
    ledger = Ledger(evaluator.stream)
    with evaluator.adapter(config.ttt) as adapter:
        while True:
            for chunk in chunks:
                if chunk.new_documents:
                    adapter.begin(chunk.new_documents)
                done = scorer.score(adapter.score, chunk.low, chunk.high).tokens
                ledger.note(windows[chunk.low : chunk.high])
                if chunk.starts and chunk is not chunks[-1]:
                    adapter.adapt(ledger.hand_over(chunk))
                yield done


JOBS: dict[str, Callable[[RunConfig], Pieces]] = {"train": train, "eval": score, "ttt": ttt}


def run_for(job: Pieces, seconds: float) -> dict[str, float]:
    """Run whole pieces, at least one, for about that long; return tokens, seconds and CPU seconds."""
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    while tokens == 0 or time.perf_counter() - start < seconds:
        tokens += next(job)
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
