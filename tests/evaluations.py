"""Streams, a tiny model and single ranks for tests of scoring."""

import functools

import numpy as np
import torch
from helpers import randomize_, tiny_config

from pgolf_fast.config.schema import EvalConfig, RunConfig
from pgolf_fast.data.tokenizer import ByteTable
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.score import Scorer, Stream
from pgolf_fast.evaluation.scores import Evaluator
from pgolf_fast.model.gpt import GPT

CPU = torch.device("cpu")
SEQ, STRIDE = 16, 4


def tiny_model(seed=3, **changes):
    return randomize_(GPT(tiny_config(**changes), torch.arange(96) % 3 == 0), seed)


def byte_table():
    rng = np.random.default_rng(0)
    return ByteTable(rng.integers(0, 6, 96).astype(np.int16), np.arange(96) % 3 == 0, np.arange(96) < 4)


def stream_of(tokens):
    return Stream(np.asarray(tokens, dtype=np.uint16), byte_table(), CPU)


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 96, count).astype(np.uint16)


@functools.cache
def text(count=331, seed=0):
    """Return documents of 9 to 80 tokens that begin with 1 and repeat eight words of their own."""
    rng, parts = np.random.default_rng(seed), [np.array([7, 7, 7])]
    while sum(map(len, parts)) < count:
        parts.append(np.append(1, rng.integers(2, 96, 8)[rng.integers(0, 8, rng.integers(8, 80))]))
    return np.concatenate(parts)[:count]


class OneOf(World):
    """A rank that runs alone: its share of the losses is filled in, the others stay zero."""

    def sum_(self, values):
        return values

    def same(self, value):
        return value


def filled(losses_of, stream, windows, seq_len=SEQ, batch=4, **options):
    """Return a scorer with the losses of all windows."""
    scorer = Scorer(stream, windows, seq_len, lambda length: batch, **options)
    scorer.score(losses_of, 0, len(windows))
    return scorer


def adapted(
    model,
    stream,
    windows,
    ttt,
    *,
    seq_len=SEQ,
    batch=4,
    world=SINGLE,
    compile=False,
    cuda_graph=False,
    **options,
):
    """Return the pass of `Evaluator.adapted` over `windows`, in batches of `batch`."""
    settings = EvalConfig(seq_len=seq_len, stride=1, batch_seqs=batch, compile=compile, cuda_graph=cuda_graph)
    evaluator = Evaluator(model, stream, RunConfig(model=model.config, eval=settings), world=world)
    return evaluator.adapted(windows, ttt, "test", **options)
