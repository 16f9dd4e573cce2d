"""Collisions in the hash table: counted over all pairs of tokens as published, and on real tokens.

A context is the key of a row: the current token and the one before it (bigram) or two before it (trigram).
Rows are those of `reference.ngram_rows`. A word start is a context whose current token has a leading space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pgolf_fast.config.model import ModelConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import reference

WORD_START, OTHER = "word start", "other"
ORDERS = ("bigram", "trigram")
DRAWS = 4  # samples of an ideal hash; on 16,384 tokens they differ by about 1 %


@dataclass(frozen=True)
class AllPairs:
    """Contexts per bucket if every context occurred equally often."""

    kind: str
    order: str
    contexts: int
    buckets: int

    @property
    def per_bucket(self) -> float:
        return self.contexts / self.buckets


def all_pairs(config: ModelConfig, has_leading_space: np.ndarray) -> list[AllPairs]:
    """Count as published: all n-grams that end in a class, over the buckets that the class can use.

    V tokens make V bigrams (V^2 trigrams) per current token. One row is reserved for "no n-gram here"; in a
    split table each class has half of the other rows, in a shared one both have all of them (PR 1501). For
    1,024 tokens, 325 of them word starts, and 4,096 rows: 256.07 shared; 162.58 and 349.67 split.
    """
    vocab, starts = len(has_leading_space), int(has_leading_space.sum())
    usable = config.bigram_vocab_size - 1
    last = {WORD_START: starts, OTHER: vocab - starts} if config.pos_conditional else {"all": vocab}
    buckets = usable // 2 if config.pos_conditional else usable
    return [
        AllPairs(kind, order, count * vocab**length, buckets)
        for length, order in enumerate(ORDERS[: 1 + config.trigram], start=1)
        for kind, count in last.items()
    ]


@dataclass(frozen=True)
class Contexts:
    """Distinct contexts of a text and their counts; all arrays are (contexts,)."""

    counts: np.ndarray
    buckets: np.ndarray
    starts: np.ndarray
    """bool: the context ends in a word start."""
    orders: np.ndarray
    """Index in `ORDERS`."""
    num_rows: int
    split: bool

    def __len__(self) -> int:
        return len(self.counts)

    def ideally_hashed(self, rng: np.random.Generator) -> Contexts:
        """Draw the bucket of each context uniformly from those that it can use."""
        usable = self.num_rows - 1
        if not self.split:
            drawn = rng.integers(usable, size=len(self))
        else:
            drawn = rng.integers(usable // 2, size=len(self)) + np.where(self.starts, 0, usable // 2)
        return Contexts(self.counts, drawn, self.starts, self.orders, self.num_rows, self.split)

    def occurrences_by_bucket(self) -> np.ndarray:
        return np.bincount(self.buckets, self.counts, minlength=self.num_rows)


def contexts_of(config: ModelConfig, tokens: np.ndarray, has_leading_space: np.ndarray) -> Contexts:
    """Count the contexts of tokens (n,). Raises PgolfError without a hash table, or under 3 tokens."""
    if not config.bigram_vocab_size:
        raise PgolfError("the model has no hash table: model.bigram_vocab_size is 0")
    if len(tokens) < 3:
        raise PgolfError(f"the hash table is analyzed on at least 3 tokens, not {len(tokens)}")
    ids, vocab = tokens.astype(np.int64), len(has_leading_space)
    leading = torch.from_numpy(has_leading_space) if config.pos_conditional else None
    rows = reference.ngram_rows(
        torch.from_numpy(ids)[None], config.bigram_vocab_size, leading, config.trigram
    )
    parts = []
    for order, row in enumerate(rows):
        if row is None:
            continue
        length = order + 1  # tokens before the current one
        keys = ids[length:]  # an n-gram is a number in base V
        for back in range(1, length + 1):
            keys = keys * vocab + ids[length - back : len(ids) - back]
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        ends = ids[length:][first]
        parts.append(
            (counts, row[0, length:].numpy()[first], has_leading_space[ends], np.full_like(ends, order))
        )
    counts, buckets, starts, orders = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Contexts(counts, buckets, starts, orders, config.bigram_vocab_size, config.pos_conditional)


@dataclass(frozen=True)
class Load:
    """Collisions of the contexts of one class and order, in the table shared with all other contexts."""

    occurrences: int
    contexts: int
    occupied: float
    """Buckets used by any of them."""
    contexts_in_bucket: float
    """Contexts in the bucket of an occurrence, including its own: the mean over occurrences."""
    foreign: float
    """Share of the occurrences in that bucket that belong to other contexts: the mean over occurrences."""


def load(contexts: Contexts, chosen: np.ndarray) -> Load:
    """Measure contexts[chosen]; `chosen` is bool (contexts,) with at least one True."""
    counts, buckets = contexts.counts[chosen], contexts.buckets[chosen]
    in_bucket = np.bincount(contexts.buckets, minlength=contexts.num_rows)
    total = contexts.occurrences_by_bucket()
    return Load(
        int(counts.sum()),
        len(counts),
        len(np.unique(buckets)),
        float(np.average(in_bucket[buckets], weights=counts)),
        float(np.average(1 - counts / total[buckets], weights=counts)),
    )


def ideal_load(contexts: Contexts, chosen: np.ndarray, *, seed: int = 0) -> Load:
    """Return the mean `load` of DRAWS ideal hashes, drawn with `seed`."""
    rng = np.random.default_rng(seed)
    drawn = [load(contexts.ideally_hashed(rng), chosen) for _ in range(DRAWS)]
    names = ("occupied", "contexts_in_bucket", "foreign")
    means = (float(np.mean([getattr(one, name) for one in drawn])) for name in names)
    return Load(drawn[0].occurrences, drawn[0].contexts, *means)


def groups(contexts: Contexts) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield class, order and mask of every nonempty part of the contexts."""
    for kind, own in ((WORD_START, contexts.starts), (OTHER, ~contexts.starts)):
        for index, order in enumerate(ORDERS):
            chosen = own & (contexts.orders == index)
            if chosen.any():
                yield kind, order, chosen
