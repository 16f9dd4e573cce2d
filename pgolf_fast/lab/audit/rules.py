"""The rules of the challenge, C1 to C17, and the check of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.distributed import World
from pgolf_fast.evaluation.adapters.base import Adapter
from pgolf_fast.evaluation.score import LossFunction
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.lab.audit import causal, provenance, scoring, submission
from pgolf_fast.lab.audit.check import AuditCheck, AuditFinding
from pgolf_fast.lab.audit.target import AuditTarget
from pgolf_fast.lab.audit.watch import Method, Watched, evaluate, watch

LENGTHS = (2, 17, 64)  # context lengths at which causality is checked, besides that of the windows


class _Audit:
    """One method per rule; the watched evaluation of C3 to C5, C15 and C16 runs once."""

    def __init__(self, target: AuditTarget):
        self.target, self.seq_len = target, target.config.eval_seq_len
        self.stream, self.vocab = target.stream(target.tokens), target.config.model.vocab_size
        self.lengths = sorted({*LENGTHS, self.seq_len})

    @cached_property
    def watched(self) -> Watched:
        return watch(self.target.method, self.stream, self.target.model)

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        return evaluate(self.target.method, self.target.stream(tokens))

    def with_fresh_adapter(self, check: Callable[[LossFunction], AuditFinding]) -> AuditFinding:
        """Check losses as the adapter computes them before its first update."""
        with self.target.method.adapter() as adapter:
            return check(_fresh_losses(adapter, self.target.config.ttt.by_document))

    def causality(self) -> AuditFinding:
        return self.with_fresh_adapter(
            lambda score: causal.causality(self.target.model, score, self.stream.tokens, self.lengths)
        )

    def state_causality(self) -> AuditFinding:
        # Adapters of documents group them by length, so other borders change the rounding of others.
        by_document = self.target.config.ttt.by_document
        rounding = scoring.ROUNDING[self.target.model.compute_dtype] if by_document else 0.0
        return scoring.state_causality(self.losses, self.target.tokens, self.vocab, rounding)

    def score_before_train(self) -> AuditFinding:
        return scoring.score_before_train(self.watched)

    def nothing_after_last_score(self) -> AuditFinding:
        return scoring.nothing_after_last_score(self.watched)

    def once_each(self) -> AuditFinding:
        count = len(self.target.validation) - 1
        plain = plain_windows(count, self.seq_len)
        whole = {"sliding": self.target.windows(count), "non-overlapping": plain}
        return scoring.once_each(self.watched, self.stream.target_bytes, whole, count)

    def no_target_in_keys(self) -> AuditFinding:
        return self.with_fresh_adapter(
            lambda score: causal.no_target_in_keys(self.target.model, score, self.stream.tokens, self.lengths)
        )

    def normalized(self) -> AuditFinding:
        return self.with_fresh_adapter(
            lambda score: scoring.normalized(score, self.stream.tokens, self.vocab)
        )

    def training_ignores_validation(self) -> AuditFinding:
        t = self.target
        return provenance.training_ignores_validation(t.train, t.config, t.tokens, t.tokenizer.path)

    def calibration_ignores_data(self) -> AuditFinding:
        if self.target.folder is None or self.target.artifact is None:
            return AuditFinding(None, "only a packed run has the weights from before quantization")
        return provenance.calibration_ignores_data(self.target.folder, self.target.requantize)

    def within_bytes(self) -> AuditFinding:
        if self.target.artifact is None:
            return AuditFinding(None, "the run is not packed")
        return submission.within_bytes(self.target.artifact, self.target.limit_bytes)

    def self_contained(self) -> AuditFinding:
        if self.target.artifact is None:
            return AuditFinding(None, "the run is not packed")
        tokens = self.target.tokens[: 2 * self.seq_len + 1]
        return submission.self_contained(self.target.artifact, self.target.tokenizer.path, tokens)

    def within_time(self) -> AuditFinding:
        if self.target.folder is None:
            return AuditFinding(None, "an artifact does not record how long it took")
        return submission.within_time(self.target.folder, self.target.train_limit, self.target.eval_limit)

    def byte_counts(self) -> AuditFinding:
        return scoring.byte_counts(self.target.validation, self.target.table, self.target.tokenizer)

    def word_starts_of_inputs(self) -> AuditFinding:
        return causal.word_starts_of_inputs(self.target.model, self.stream.tokens)

    def deterministic(self) -> AuditFinding:
        seed = self.target.config.train.seed
        return scoring.deterministic(self.losses, self.target.tokens, self.watched, seed)

    def no_update_while_scoring(self) -> AuditFinding:
        return scoring.no_update_while_scoring(self.watched)

    def same_for_any_ranks(self) -> AuditFinding:
        # One window per batch, so that every rank gets some windows of each chunk.
        methods = {"frozen": self.target.frozen, "adapting": self.target.method}
        return scoring.same_for_any_ranks(
            {
                name: partial(self._losses_of_rank, replace(method, size=lambda _: 1))
                for name, method in methods.items()
            }
        )

    def _losses_of_rank(self, method: Method, world: World) -> np.ndarray:
        return evaluate(method, self.stream, world)


def _fresh_losses(adapter: Adapter, by_document: bool) -> LossFunction:
    """Return the loss function of an adapter before its first update."""
    if not by_document:
        return adapter.score
    adapter.begin(1)

    def losses(tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        rows = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return adapter.score(tokens, targets, context, rows)

    return losses


@dataclass(frozen=True)
class Rule:
    """A rule of the challenge and its check."""

    id: str
    title: str
    check: Callable[[_Audit], AuditFinding]


RULES = (
    Rule("C1", "no score reads its target or a later token", _Audit.causality),
    Rule("C2", "no update reads a token before it is scored", _Audit.state_causality),
    Rule("C3", "chunks are scored before updates", _Audit.score_before_train),
    Rule("C4", "no update after the last score", _Audit.nothing_after_last_score),
    Rule("C5", "each target scored once", _Audit.once_each),
    Rule("C6", "no target in a lookup key", _Audit.no_target_in_keys),
    Rule("C7", "probabilities sum to 1", _Audit.normalized),
    Rule("C8", "training without validation data", _Audit.training_ignores_validation),
    Rule("C9", "calibration without data", _Audit.calibration_ignores_data),
    Rule("C10", "artifact and script fit the byte limit", _Audit.within_bytes),
    Rule("C11", "script is self-contained", _Audit.self_contained),
    Rule("C12", "within the time limits", _Audit.within_time),
    Rule("C13", "byte counts are those of the text", _Audit.byte_counts),
    Rule("C14", "word starts are those of the inputs", _Audit.word_starts_of_inputs),
    Rule("C15", "scoring is deterministic", _Audit.deterministic),
    Rule("C16", "no update while scoring", _Audit.no_update_while_scoring),
    Rule("C17", "the same for any number of ranks", _Audit.same_for_any_ranks),
)


def checks(target: AuditTarget) -> list[AuditCheck]:
    """Return the checks of C1 to C17 for a target, in this order."""
    audit = _Audit(target)
    return [AuditCheck(rule.id, rule.title, partial(rule.check, audit)) for rule in RULES]
