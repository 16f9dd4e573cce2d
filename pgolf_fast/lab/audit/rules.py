"""The rules of the challenge, C1 to C17, and the check of each."""

from collections.abc import Callable
from dataclasses import replace
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
    """A target with what several checks need: its stream, its losses, and one watched evaluation."""

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

    def of_network(self, check: Callable[..., AuditFinding]) -> AuditFinding:
        model, tokens = self.target.model, self.stream.tokens
        return self.with_fresh_adapter(lambda score: check(model, score, tokens, self.lengths))

    def state_causality(self) -> AuditFinding:
        # Adapters of documents batch them by length, so other borders change the rounding.
        by_document = self.target.config.ttt.by_document
        rounding = scoring.ROUNDING[self.target.model.compute_dtype] if by_document else 0.0
        return scoring.state_causality(self.losses, self.target.tokens, self.vocab, rounding)

    def once_each(self) -> AuditFinding:
        count = len(self.target.validation) - 1
        whole = {"sliding": self.target.windows(count), "non-overlapping": plain_windows(count, self.seq_len)}
        return scoring.once_each(self.watched, self.stream.target_bytes, whole, count)

    def normalized(self) -> AuditFinding:
        tokens = self.stream.tokens
        return self.with_fresh_adapter(lambda score: scoring.normalized(score, tokens, self.vocab))

    def training_ignores_validation(self) -> AuditFinding:
        t = self.target
        return provenance.training_ignores_validation(t.train, t.config, t.tokens, t.tokenizer.path)

    def calibration_ignores_data(self) -> AuditFinding:
        folder = self.target.folder if self.target.artifact else None
        return provenance.calibration_ignores_data(folder, self.target.requantize)

    def self_contained(self) -> AuditFinding:
        tokens = self.target.tokens[: 2 * self.seq_len + 1]
        return submission.self_contained(self.target.artifact, self.target.tokenizer.path, tokens)

    def within_time(self) -> AuditFinding:
        return submission.within_time(self.target.folder, self.target.train_limit, self.target.eval_limit)

    def byte_counts(self) -> AuditFinding:
        return scoring.byte_counts(self.target.validation, self.target.table, self.target.tokenizer)

    def deterministic(self) -> AuditFinding:
        seed = self.target.config.train.seed
        return scoring.deterministic(self.losses, self.target.tokens, self.watched, seed)

    def same_for_any_ranks(self) -> AuditFinding:
        # One window per batch, so that every rank gets some windows of each chunk.
        def losses_of(method: Method, world: World) -> np.ndarray:
            return evaluate(replace(method, size=lambda _: 1), self.stream, world)

        methods = {"frozen": self.target.frozen, "adapting": self.target.method}
        return scoring.same_for_any_ranks({name: partial(losses_of, m) for name, m in methods.items()})


def _fresh_losses(adapter: Adapter, by_document: bool) -> LossFunction:
    """Return the loss function of an adapter before its first update."""
    if not by_document:
        return adapter.score
    adapter.begin(1)

    def losses(tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        rows = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return adapter.score(tokens, targets, context, rows)

    return losses


# The title and the check of each rule
RULES: dict[str, tuple[str, Callable[[_Audit], AuditFinding]]] = {
    "C1": ("no score reads its target or a later token", lambda audit: audit.of_network(causal.causality)),
    "C2": ("no update reads a token before it is scored", _Audit.state_causality),
    "C3": ("chunks are scored before updates", lambda audit: scoring.score_before_train(audit.watched)),
    "C4": ("no update after the last score", lambda audit: scoring.nothing_after_last_score(audit.watched)),
    "C5": ("each target scored once", _Audit.once_each),
    "C6": ("no target in a lookup key", lambda audit: audit.of_network(causal.no_target_in_keys)),
    "C7": ("probabilities sum to 1", _Audit.normalized),
    "C8": ("training without validation data", _Audit.training_ignores_validation),
    "C9": ("calibration without data", _Audit.calibration_ignores_data),
    "C10": (
        "artifact and script fit the byte limit",
        lambda audit: submission.within_bytes(audit.target.artifact, audit.target.limit_bytes),
    ),
    "C11": ("script is self-contained", _Audit.self_contained),
    "C12": ("within the time limits", _Audit.within_time),
    "C13": ("byte counts are those of the text", _Audit.byte_counts),
    "C14": (
        "word starts are those of the inputs",
        lambda audit: causal.word_starts_of_inputs(audit.target.model, audit.stream.tokens),
    ),
    "C15": ("scoring is deterministic", _Audit.deterministic),
    "C16": ("no update while scoring", lambda audit: scoring.no_update_while_scoring(audit.watched)),
    "C17": ("the same for any number of ranks", _Audit.same_for_any_ranks),
}


def checks(target: AuditTarget) -> list[AuditCheck]:
    """Return the checks of C1 to C17 for a target, in this order."""
    audit = _Audit(target)
    return [AuditCheck(id, title, partial(check, audit)) for id, (title, check) in RULES.items()]
