"""C2 to C5, C7, C13, C15 to C17: the order of scoring and updates, and the sums that are reported."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.data.shards import BOS_ID
from pgolf_fast.data.source import SIDE_SHARE, returning
from pgolf_fast.data.tokenizer import SPACE, ByteTable, Tokenizer, counting_fault, plain_text, target_bytes
from pgolf_fast.distributed import World
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.lab.audit.check import AuditFinding, fails, holds, undecided
from pgolf_fast.lab.audit.target import Audit
from pgolf_fast.lab.audit.watch import evaluate

NORMALIZED = 1e-5  # allowed deviation of the sum of all probabilities from 1
# Documents are batched by length, so other borders change the batches and with them the rounding. A score
# that depended on a later token would differ by more.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}

_ROWS = 32  # per batch: LoRA weights are copied for each row, so a larger batch costs memory
_POSITIONS, _DOCUMENTS = 16, 32  # at most, checked by C7 and by C13


def state_causality(audit: Audit) -> AuditFinding:
    """C2: check that streams which differ from token k on have the same losses before it, updates included.

    Done twice: with the same document borders, and without borders, where losses may differ by rounding.
    """
    rounding = ROUNDING[audit.model.compute_dtype] if audit.by_document else 0.0
    tokens, before, evidence = audit.tokens, audit.losses(audit.tokens), []
    rng = np.random.default_rng(2)
    for near, borders in ((len(tokens) * 5 // 8, True), (len(tokens) // 2, False)):
        # In the middle of a window's targets: a window that ends at k reads nothing after it.
        k = near // 8 * 8 + 3
        other = tokens.copy()
        shift = rng.integers(1, audit.vocab_size, len(tokens) - k)
        other[k:] = (other[k:] + shift) % audit.vocab_size
        if borders:
            other[k:][other[k:] == BOS_ID] = BOS_ID + 1
            other[k:][tokens[k:] == BOS_ID] = BOS_ID
        after = audit.losses(other)
        past, future = (np.abs(after - before)[part] for part in (slice(k - 1), slice(k, None)))
        kept = past <= (0.0 if borders else rounding)
        if not kept.all():
            at = int(np.argmin(kept))
            return fails(f"the loss of token {at + 1:,} changes with tokens from {k:,} on, by {past[at]:.2g}")
        if not future.any():
            return fails(f"no loss after token {k:,} changes with the tokens: the losses are not scores")
        same = f"{(past == 0).sum():,} of {len(past):,} bit-identical"
        evidence.append(f"other tokens from {k:,} on{'' if borders else ', borders too'}: {same}")
    return holds("; ".join(evidence))


def score_before_train(audit: Audit) -> AuditFinding:
    """C3: check that every update uses scored targets only, and nothing changes while a chunk is scored."""
    seen = audit.watched
    if seen.early_updates:
        return fails(seen.early_updates[0])
    if not seen.updates:
        return holds(f"no updates; {seen.checksums:,} equal checksums")
    updates = f"{seen.updates} updates on scored targets, {seen.steps} steps"
    return holds(f"{updates}; {seen.checksums:,} checksums")


def nothing_after_last_score(audit: Audit) -> AuditFinding:
    """C4: check that there is no update after the last score."""
    seen = audit.watched
    if seen.late_updates:
        return fails("; ".join(seen.late_updates))
    return holds(f"0 of {seen.steps} steps after the last score, and the same weights")


def once_each(audit: Audit) -> AuditFinding:
    """C5: check that each target is scored once, and that the reported figure is the sum of these scores."""
    seen, target, count = audit.watched, audit.target, len(audit.target.validation) - 1
    whole = {"sliding": target.windows(count), "non-overlapping": plain_windows(count, audit.seq_len)}
    of_whole = {name: np.bincount(cut.targets(), minlength=count) for name, cut in whole.items()}
    streams = {"watched": seen.times, **of_whole}
    for name, times in streams.items():
        missing, several = int((times == 0).sum()), int((times > 1).sum())
        if missing or several:
            what = f"{missing:,} have no score, {several:,} have several"
            return fails(f"{name}: of {len(times):,} targets {what}")
    score, nats = seen.score, float(seen.losses.sum(dtype=np.float64))
    if (score.tokens, score.text_bytes) != (len(seen.losses), int(audit.stream.target_bytes.sum())):
        return fails(f"the score is over {score.tokens:,} tokens and {score.text_bytes:,} bytes")
    if not abs(score.nats - nats) <= 1e-9 * abs(nats):
        return fails(f"{score.nats:.6f} nats are reported, the first scores sum to {nats:.6f}")
    counts = ", ".join(f"{name} {len(times):,}" for name, times in streams.items())
    return holds(f"{counts}, each once")


@torch.no_grad()
def normalized(audit: Audit) -> AuditFinding:
    """C7: check that exp(-loss) over all ids as targets sums to 1 at every position.

    Row v has id v + j as its target at position j, so the rows together cover every id at every position.
    """
    tokens, vocab_size = audit.stream.tokens, audit.vocab_size
    length = min(_POSITIONS, len(tokens) - 1)
    rows, columns = torch.arange(vocab_size)[:, None], torch.arange(length)[None]
    targets = ((rows + columns) % vocab_size).to(tokens.device)
    total = torch.zeros(length, dtype=torch.float64, device=tokens.device)
    with audit.fresh_losses() as losses_of:
        for part in targets.split(_ROWS):
            inputs = tokens[None, :length].expand(len(part), -1).contiguous()
            total += losses_of(inputs, part, length).double().neg().exp().sum(0)
    off = float((total - 1).abs().max())  # NaN if any sum is
    text = f"sum of {vocab_size:,} probabilities deviates from 1 by at most {off:.1e}, {length} positions"
    return AuditFinding(off <= NORMALIZED, text)


def byte_counts(
    tokens: np.ndarray,
    table: ByteTable,
    tokenizer: Tokenizer,
    counts: np.ndarray | None = None,
    *,
    exact: bool = True,
) -> AuditFinding:
    """C13: check that byte counts match the text, for known text and for documents across the split.

    counts: bytes of the targets tokens[1:] as they are scored, by default from `table`. They are compared
    with the UTF-8 length of each document's text, and most documents must give the same tokens when encoded
    again. A leading space of a document is not counted. Side files count text before it is normalized, so
    unless `exact`, the total may differ by SIDE_SHARE.
    """
    if fault := counting_fault(tokenizer, table):
        return fails(f"known text: {fault}")
    pieces = target_bytes(table, tokens[:-1], tokens[1:])
    counts = pieces if counts is None else counts
    if exact and not np.array_equal(counts, pieces):
        return fails(f"{counts.sum():,} bytes are scored, the pieces have {pieces.sum():,}")
    whole = list(pairwise(np.flatnonzero(tokens == BOS_ID)))
    if not whole:
        return undecided(f"no whole document in {len(tokens):,} tokens")
    same, tried = returning(tokens, tokenizer)
    if 2 * same < tried:
        return fails(f"{tried - same} of {tried} documents are other tokens when decoded and encoded again")
    chosen = [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, _DOCUMENTS).astype(int))]
    size = length = count = 0
    for begin, end in chosen:
        ids, counted = tokens[begin + 1 : end].tolist(), int(counts[begin : end - 1].sum())
        text = plain_text(tokenizer, ids)
        opens = bool(ids) and tokenizer.piece(ids[0]).startswith(SPACE) and text.startswith(" ")
        if counted != (real := len(text.encode()) - opens) and exact:
            return fails(f"document at token {begin:,}: {counted:,} bytes counted, the text has {real:,}")
        size, length, count = size + counted, length + real, count + len(ids)
    if abs(size - length) > SIDE_SHARE * length:
        return fails(f"{len(chosen)} documents: {size:,} bytes counted, the text has {length:,}")
    again = f"{same} of {tried} documents are the same when encoded again"
    decoded = f"{len(chosen)} of {len(whole):,} documents: {size:,} bytes of {count:,} tokens as decoded"
    split = f"whole split: {int(counts.sum()):,} bytes of {len(tokens) - 1:,} targets"
    return holds(f"known text; {again}; {decoded}; {split}")


def deterministic(audit: Audit) -> AuditFinding:
    """C15: check that every loss is bit-identical when scored again, with another number of threads."""
    again, seed = audit.losses(audit.tokens), audit.target.config.train.seed
    if different := int((again != audit.watched.losses).sum()):
        return fails(f"{different:,} of {len(again):,} losses differ when scored again")
    return holds(f"{len(again):,} losses bit-identical; one run, seed {seed}: a record needs three seeds")


def no_update_while_scoring(audit: Audit) -> AuditFinding:
    """C16: check that no gradient is computed and no optimizer state changes while a batch is scored."""
    seen = audit.watched
    if seen.touched:
        return fails(seen.touched[0])
    return holds(f"{seen.batches:,} batches: no gradients; weights and optimizer state unchanged")


@dataclass(frozen=True)
class OneOf(World):
    """A rank that computes its share and communicates with no other."""

    def sum_(self, values: Tensor) -> Tensor:
        return values

    def same(self, value: float) -> float:
        return value


def same_for_any_ranks(audit: Audit) -> AuditFinding:
    """C17: check that several ranks together compute the losses of one rank alone.

    This process plays each rank in turn and sums their losses. Ranks need not communicate anything else:
    updates depend on tokens only, and every rank has all of them.
    """
    methods = {"frozen": audit.target.frozen, "adapting": audit.target.method}
    for name, method in methods.items():
        # One window per batch, so that every rank gets some windows of each chunk.
        method = replace(method, size=lambda _: 1)
        alone = evaluate(method, audit.stream)
        for world_size in (2, 3):
            ranks = [OneOf(rank, world_size) for rank in range(world_size)]
            shares = np.stack([evaluate(method, audit.stream, rank) for rank in ranks])
            if different := int((shares.sum(0) != alone).sum()):
                return fails(f"{name}: {different:,} of {len(alone):,} losses differ by {world_size} ranks")
            if not (shares == 0).any(1).all():
                return fails(f"{name}: one of {world_size} ranks scored everything")
    return holds(f"2 and 3 ranks, {' and '.join(methods)}: bit-identical")
