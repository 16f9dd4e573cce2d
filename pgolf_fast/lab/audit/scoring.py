"""C2 to C5, C7, C13 and C15 to C17: the order of scoring and learning, and what is summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.data.shards import BOS_ID
from pgolf_fast.data.tokenizer import SPACE, ByteTable, Tokenizer, scored_bytes, target_bytes
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.score import LossFunction
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.lab.audit.check import Finding
from pgolf_fast.lab.audit.watch import Watched, scored_targets

NORMALISED = 1e-5  # what the probabilities of all ids may miss 1 by
# Batches of documents are put together by their lengths, so with other borders other numbers are rounded side
# by side. A score that knew a later token would differ by more.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}

_ROWS = 32  # side by side: low-rank changes are copied for each

# The losses of a stream of tokens (N + 1,), as (N,)
Losses = Callable[[np.ndarray], np.ndarray]


def state_causality(losses_of: Losses, tokens: np.ndarray, vocab_size: int, rounding: float = 0.0) -> Finding:
    """C2: streams that differ from token k on have the same losses before it, through all that is learned.

    Once with document borders where they were, and once with all other tokens, and the borders gone, where
    losses may differ by `rounding`.
    """
    before, told = losses_of(tokens), []
    rng = np.random.default_rng(2)
    for near, borders in ((len(tokens) * 5 // 8, True), (len(tokens) // 2, False)):
        k = (
            near // 8 * 8 + 3
        )  # in the middle of what a window scores: one that ends at k reads nothing after it
        other = tokens.copy()
        shift = rng.integers(1, vocab_size, len(tokens) - k)
        other[k:] = (other[k:] + shift) % vocab_size
        if borders:
            other[k:][other[k:] == BOS_ID] = BOS_ID + 1
            other[k:][tokens[k:] == BOS_ID] = BOS_ID
        after = losses_of(other)
        past, future = (np.abs(after - before)[part] for part in (slice(k - 1), slice(k, None)))
        worst = float(past.max())
        limit = 0.0 if borders else rounding
        if not worst <= limit:
            where = int(np.argmax(~(past <= limit))) + 1
            return Finding(
                False,
                f"the loss of token {where:,} changes with tokens from {k:,} on, by {past[where - 1]:.2g}",
            )
        if not future.any():
            return Finding(False, f"no loss after token {k:,} changes with the tokens: this is no score")
        same = f"{(past == 0).sum():,} of {len(past):,} the same bits"
        told.append(f"other tokens from {k:,} on{'' if borders else ', borders too'}: {same}")
    return Finding(True, "; ".join(told))


def score_before_train(seen: Watched) -> Finding:
    """C3: every lesson holds scored targets only, and nothing changes while a chunk is scored."""
    if seen.premature:
        return Finding(False, seen.premature[0])
    if not seen.lessons:
        return Finding(True, f"nothing is learned; {seen.checksums:,} equal checksums")
    return Finding(
        True, f"{seen.lessons} lessons of scored targets, {seen.updates} steps; {seen.checksums:,} checksums"
    )


def nothing_after_last_score(seen: Watched) -> Finding:
    """C4: nothing is learned from the last chunk."""
    if seen.late:
        return Finding(False, "; ".join(seen.late))
    return Finding(True, f"0 of {seen.updates} steps after the last score, and the same weights")


def once_each(seen: Watched, target_bytes: np.ndarray, whole: Mapping[str, Windows], count: int) -> Finding:
    """C5: each target is scored once, and the figure that is reported is of these scores.

    whole: by name, windows over the `count` targets of the whole split.
    """
    streams = {"watched": seen.times}
    for name, windows in whole.items():
        streams[name] = np.bincount(scored_targets(windows), minlength=count)
    for name, times in streams.items():
        missing, several = int((times == 0).sum()), int((times > 1).sum())
        if missing or several:
            what = f"{missing:,} have no score, {several:,} have several"
            return Finding(False, f"{name}: of {len(times):,} targets {what}")
    score, nats = seen.score, float(seen.losses.sum(dtype=np.float64))
    if (score.tokens, score.text_bytes) != (len(seen.losses), int(target_bytes.sum())):
        return Finding(False, f"the score is over {score.tokens:,} tokens and {score.text_bytes:,} bytes")
    if not abs(score.nats - nats) <= 1e-9 * abs(nats):
        return Finding(False, f"{score.nats:.6f} nats are reported, the first scores sum up to {nats:.6f}")
    told = ", ".join(f"{name} {len(times):,}" for name, times in streams.items())
    return Finding(True, f"{told}, each once")


@torch.no_grad()
def normalised(losses_of: LossFunction, tokens: Tensor, vocab_size: int, length: int = 16) -> Finding:
    """C7: at every position, exp(-loss) of all ids as targets sums up to 1.

    Row v has id v + j as target at position j, so the rows together have every id everywhere.
    """
    length = min(length, len(tokens) - 1)
    rows, columns = torch.arange(vocab_size)[:, None], torch.arange(length)[None]
    targets = ((rows + columns) % vocab_size).to(tokens.device)
    total = torch.zeros(length, dtype=torch.float64, device=tokens.device)
    for part in targets.split(_ROWS):
        inputs = tokens[None, :length].expand(len(part), -1).contiguous()
        total += losses_of(inputs, part, length).double().neg().exp().sum(0)
    off = (total - 1).abs()
    worst = float(off.max())
    evidence = f"sum of {vocab_size:,} probabilities misses 1 by {worst:.1e} at most, {length} positions"
    return Finding(bool((off <= NORMALISED).all()), evidence)


def byte_counts(tokens: np.ndarray, table: ByteTable, tokenizer: Tokenizer, documents: int = 32) -> Finding:
    """C13: counted bytes are those of the decoded text, for whole documents spread over the split.

    A space that opens a document is no byte of it.
    """
    begins = np.flatnonzero(tokens == BOS_ID)
    whole = list(pairwise(begins))
    if not whole:
        return Finding(None, f"no whole document in {len(tokens):,} tokens")
    chosen = [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, documents).astype(int))]
    size = count = 0
    for begin, end in chosen:
        counted = int(target_bytes(table, tokens[begin : end - 1], tokens[begin + 1 : end]).sum())
        ids = tokens[begin + 1 : end].tolist()
        text = tokenizer.decode(ids)
        opens = bool(ids) and tokenizer.piece(ids[0]).startswith(SPACE) and text.startswith(" ")
        if counted != len(text.encode()) - opens:
            told = f"{counted:,} bytes counted, the text has {len(text.encode()) - opens:,}"
            return Finding(False, f"document at token {begin:,}: {told}")
        size, count = size + counted, count + len(ids)
    decoded = f"{len(chosen)} of {len(whole):,} documents: {size:,} bytes of {count:,} tokens as decoded"
    split = f"whole split: {scored_bytes(table, tokens):,} bytes of {len(tokens) - 1:,} targets"
    return Finding(True, f"{decoded}; {split}")


def deterministic(losses_of: Losses, tokens: np.ndarray, seen: Watched, seed: int) -> Finding:
    """C15: scored again, and by any number of threads, every loss has the same bits."""
    again = losses_of(tokens)
    different = int((again != seen.losses).sum())
    if different:
        return Finding(False, f"{different:,} of {len(again):,} losses differ when scored again")
    text = f"{len(again):,} losses the same bits"
    return Finding(True, f"{text}; one run, seed {seed}: a record needs three seeds")


def nothing_learned_while_scoring(seen: Watched) -> Finding:
    """C16: between a window's input and its score no gradient is taken and no optimiser state changes."""
    if seen.touched:
        return Finding(False, seen.touched[0])
    return Finding(True, f"{seen.batches:,} batches: no gradient taken, weights and optimiser state the same")


@dataclass(frozen=True)
class OneOf(World):
    """A rank that does its share and hears of no other."""

    def sum_(self, values: Tensor) -> Tensor:
        return values

    def same(self, value: float) -> float:
        return value


def shared_out(ways: Mapping[str, Callable[[World], np.ndarray]]) -> Finding:
    """C17: what several processes score together is what one scores alone.

    Each process in turn is played by this one, and their losses are put together. Nothing else has to be
    passed between them: what is learned comes from tokens, and of these each has all.
    """
    told = []
    for name, losses_of in ways.items():
        alone = losses_of(SINGLE)
        for world_size in (2, 3):
            shares = np.stack([losses_of(OneOf(rank, world_size)) for rank in range(world_size)])
            different = int((shares.sum(0) != alone).sum())
            if different:
                what = f"{different:,} of {len(alone):,} losses differ by {world_size} ranks"
                return Finding(False, f"{name}: {what}")
            if not (shares == 0).any(1).all():
                return Finding(False, f"{name}: one of {world_size} ranks scored everything")
        told.append(name)
    return Finding(True, f"2 and 3 ranks, {' and '.join(told)}: the same bits")
