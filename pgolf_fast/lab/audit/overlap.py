"""Overlap of validation and training text: documents that are in both, and the share of common 13-grams."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast import console
from pgolf_fast.data.shards import BOS_ID, Shard, find_shards

_NGRAM, _NEAR, _FEW = 13, 0.8, 8  # tokens; minimum share and number of n-grams of a near copy
_BLOCK = 1_000_000  # tokens at a time; a document of more than 16 blocks is cut
_SAMPLE = 1 << 20  # n-grams to compare; if there are more, a sample chosen by hash
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(40)  # for hashes; leaves 24 bits for the filter
_CODES = np.random.default_rng(_NGRAM).integers(0, 1 << 64, 1 << 16, dtype=np.uint64)


@dataclass(frozen=True)
class Overlap:
    """Validation documents, and those of them that are in the training shards."""

    documents: int
    copies: int  # with the same tokens
    near: int  # others that share most of their n-grams
    complete: bool  # all training tokens were read
    text: str

    @property
    def by_chance(self) -> bool:
        """Whether a correct split may have this much: crawls contain duplicate and similar pages."""
        return self.copies <= self.documents // 1000 and self.near <= self.documents // 20


def find_overlap(folder: Path | str, *, ngrams: bool = True, seconds: float = math.inf) -> Overlap:
    """Compare the validation documents of `folder` with its training shards, for about `seconds` at most.

    Neither documents nor n-grams include BOS. Raises `PgolfError` if a split has no shard or a bad one.
    """
    val, train = find_shards(folder, "val"), find_shards(folder, "train")
    end, total = time.monotonic() + seconds, sum(shard.num_tokens for shard in train)
    surplus = sum(shard.num_tokens for shard in val) / _SAMPLE
    every = np.uint64(1 << max(0, math.ceil(math.log2(surplus))))
    begins: list[int] = []  # position of each document
    numbers: dict[bytes, list[int]] = {}  # documents by digest
    hashes = [_CODES[:0]]
    for at, block in _blocks(val):
        for begin, stop, digest in _documents(block):
            numbers.setdefault(digest, []).append(len(begins))
            begins.append(at + begin)
            hashed = _hash(block[begin:stop]) if ngrams else _CODES[:0]
            hashes.append(hashed[hashed % every == 0])
    keys, which = np.unique(np.concatenate(hashes), return_inverse=True)
    seen, known = np.zeros(len(keys), np.bool_), np.zeros(1 << 24, np.bool_)
    known[keys >> _SHIFT] = True  # a filter: searching for every n-gram takes twice as long
    found, first, compared, steps = set(), "", 0, sum(-(-shard.num_tokens // _BLOCK) for shard in train) + 1
    for at, block in console.progress(_blocks(train), "comparing", total=steps, unit="M tokens"):
        for begin, _, digest in _documents(block):
            for number in numbers.pop(digest, ()):
                found.add(number)
                first = first or f"{_place(val, begins[number])}, in {_place(train, at + begin)}"
        if len(keys):
            hashed = _hash(block)
            hashed = hashed[known[hashed >> _SHIFT]]
            nearest = np.minimum(np.searchsorted(keys, hashed), len(keys) - 1)
            seen[nearest[keys[nearest] == hashed]] = True
        compared = at + len(block)
        if time.monotonic() > end:
            break
    sizes = np.array([len(hashed) for hashed in hashes[1:]], np.int64)
    common = np.bincount(np.repeat(np.arange(len(sizes)), sizes), seen[which], len(sizes))
    near = set(np.flatnonzero((sizes >= _FEW) & (common >= _NEAR * sizes)).tolist()) - found
    first = first or "".join(f"{_place(val, begins[number])}, nearly" for number in sorted(near)[:1])
    text = f"{len(found):,} of {len(begins):,} validation documents"
    if ngrams:
        share = common.sum() / max(len(which), 1)
        text += f", {len(near):,} more nearly, and {share:.1%} of the {_NGRAM}-grams of tokens"
    text += f" are in {'' if compared == total else f'the first {compared:,} of '}{total:,} training tokens"
    text += f"; first the document at {first}" if first else ""
    return Overlap(len(begins), len(found), len(near), compared == total, text)


def _blocks(shards: Sequence[Shard]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of whole documents, across shard boundaries, each with its position."""
    rest, at = np.zeros(0, np.uint16), 0
    for shard in shards:
        for low in range(0, shard.num_tokens, _BLOCK):
            block = np.concatenate([rest, shard.tokens[low : low + _BLOCK]])
            last = int(np.argmax(block[::-1] == BOS_ID)) + 1
            cut = len(block) - last if block[-last] == BOS_ID else 0
            cut = cut or (len(block) if len(block) > 16 * _BLOCK else 0)
            yield at, block[:cut]
            rest, at = block[cut:], at + cut
    yield at, rest


def _documents(block: np.ndarray) -> Iterator[tuple[int, int, bytes]]:
    """Yield begin, end and digest of the documents of a block, without BOS; none is empty."""
    starts = np.flatnonzero(block == BOS_ID).tolist()
    for begin, end in zip([0, *(start + 1 for start in starts)], [*starts, len(block)], strict=True):
        if begin < end:
            yield begin, end, hashlib.sha1(block[begin:end].data).digest()


def _hash(block: np.ndarray) -> np.ndarray:
    """Return a hash of each n-gram, uint64 (N - 12,): a polynomial of random codes, modulo 2^64."""
    codes = _CODES[block]
    hashed = np.zeros(max(0, len(codes) - _NGRAM + 1), np.uint64)
    for place in range(_NGRAM):
        hashed *= _FACTOR
        hashed += codes[place : place + len(hashed)]
    return hashed


def _place(shards: Sequence[Shard], position: int) -> str:
    for shard in shards:
        if position < shard.num_tokens:
            break
        position -= shard.num_tokens
    return f"{shard.path.name}, token {position:,}"
