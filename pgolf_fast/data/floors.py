"""Scores of n-gram models, the baselines that a trained model must beat."""

from __future__ import annotations

import math

import numpy as np

from pgolf_fast.data.tokenizer import ByteTable, scored_bytes
from pgolf_fast.errors import PgolfError

_DENSE = 1 << 24


def ngram_floors(
    train_tokens: np.ndarray, val_tokens: np.ndarray, table: ByteTable, vocab_size: int
) -> tuple[float, float]:
    """Score `val_tokens` by a unigram and an interpolated bigram model of `train_tokens`, in bits per byte.

    The unigram uses counts plus one, the bigram Witten-Bell smoothing over the unigram. Raises `PgolfError`
    for fewer than two tokens, ids outside the vocabulary, or validation tokens without any text.
    """
    for name, tokens in (("training", train_tokens), ("validation", val_tokens)):
        if len(tokens) < 2:
            raise PgolfError(f"{len(tokens)} {name} tokens are too few to count pairs of; give at least 2")
        if int(tokens.max()) >= vocab_size:
            raise PgolfError(f"{name} tokens hold id {int(tokens.max())}, but vocab_size is {vocab_size}")
    count_bytes = scored_bytes(table, val_tokens)
    if count_bytes == 0:
        raise PgolfError("the validation tokens have no text at all: give files with text in them")
    unigram = np.bincount(train_tokens, minlength=vocab_size).astype(np.float64) + 1.0
    unigram /= unigram.sum()
    previous, current = val_tokens[:-1].astype(np.int64), val_tokens[1:].astype(np.int64)
    pair_counts, context_counts, followers = _pair_counts(
        train_tokens, previous * vocab_size + current, vocab_size
    )
    context, kinds = context_counts[previous], followers[previous]
    below = unigram[current]
    mixed = (pair_counts + kinds * below) / np.maximum(context + kinds, 1.0)
    bigram = np.where(context + kinds > 0, mixed, below)
    per_bit = 1.0 / (math.log(2.0) * count_bytes)
    return -float(np.log(below).sum()) * per_bit, -float(np.log(bigram).sum()) * per_bit


def _pair_counts(
    tokens: np.ndarray, asked: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the asked pairs (prev * V + cur), each id as context, and its distinct followers."""
    keys = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    if vocab_size * vocab_size <= _DENSE:
        dense = np.bincount(keys, minlength=vocab_size * vocab_size)
        rows = dense.reshape(vocab_size, vocab_size)
        return dense[asked], rows.sum(axis=1), np.count_nonzero(rows, axis=1)
    pairs, counts = np.unique(keys, return_counts=True)
    at = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    asked_counts = np.where(pairs[at] == asked, counts[at], 0)
    context = np.bincount(tokens[:-1], minlength=vocab_size)
    return asked_counts, context, np.bincount(pairs // vocab_size, minlength=vocab_size)
