"""The rules of the challenge, C1 to C17, and the check of each."""

from collections.abc import Callable
from functools import partial

from pgolf_fast.lab.audit import causal, scoring, submission
from pgolf_fast.lab.audit.check import AuditCheck, AuditFinding, fails, undecided
from pgolf_fast.lab.audit.target import Audit, AuditTarget
from pgolf_fast.model.weights import not_finite


def _training_ignores_validation(audit: Audit) -> AuditFinding:
    t = audit.target
    return submission.training_ignores_validation(t.train, t.config, t.tokens, t.tokenizer.path)


def _calibration_ignores_data(audit: Audit) -> AuditFinding:
    folder = audit.target.folder if audit.target.artifact else None
    return submission.calibration_ignores_data(folder, audit.target.requantize)


def _within_bytes(audit: Audit) -> AuditFinding:
    return submission.within_bytes(audit.target.artifact, audit.target.limit_bytes)


def _self_contained(audit: Audit) -> AuditFinding:
    tokens = audit.tokens[: 2 * audit.seq_len + 1]
    return submission.self_contained(audit.target.artifact, audit.target.tokenizer.path, tokens)


def _within_time(audit: Audit) -> AuditFinding:
    t = audit.target
    return submission.within_time(t.folder, t.train_limit, t.eval_limit)


def _byte_counts(audit: Audit) -> AuditFinding:
    target, tokens = audit.target, audit.target.validation
    counts, exact = target.stream(tokens).target_bytes, target.side_bytes is None
    return scoring.byte_counts(tokens, target.table, target.tokenizer, counts, exact=exact)


# The title and the check of each rule
RULES: dict[str, tuple[str, Callable[[Audit], AuditFinding]]] = {
    "C1": ("no score reads its target or a later token", causal.causality),
    "C2": ("no update reads a token before it is scored", scoring.state_causality),
    "C3": ("chunks are scored before updates", scoring.score_before_train),
    "C4": ("no update after the last score", scoring.nothing_after_last_score),
    "C5": ("each target scored once", scoring.once_each),
    "C6": ("no target in a lookup key", causal.no_target_in_keys),
    "C7": ("probabilities sum to 1", scoring.normalized),
    "C8": ("training without validation data", _training_ignores_validation),
    "C9": ("calibration without data", _calibration_ignores_data),
    "C10": ("artifact and script fit the byte limit", _within_bytes),
    "C11": ("script is self-contained", _self_contained),
    "C12": ("within the time limits", _within_time),
    "C13": ("byte counts are those of the text", _byte_counts),
    "C14": ("word starts are those of the inputs", causal.word_starts_of_inputs),
    "C15": ("scoring is deterministic", scoring.deterministic),
    "C16": ("no update while scoring", scoring.no_update_while_scoring),
    "C17": ("the same for any number of ranks", scoring.same_for_any_ranks),
}


# What rules of losses say of a model with NaN: order and number of scores and updates cannot be seen then
_NAN = dict.fromkeys(("C1", "C7", "C15"), fails) | dict.fromkeys(
    ("C2", "C3", "C4", "C5", "C16", "C17"), undecided
)


def checks(target: AuditTarget) -> list[AuditCheck]:
    """Return the checks of C1 to C17 for a target, in this order."""
    audit, rules = Audit(target), dict(RULES)
    named = target.model.state_dict().items()
    if wrong := next((f"{name}: {problem}" for name, t in named if (problem := not_finite(t))), None):
        rules |= {id: (rules[id][0], partial(lambda v, _: v, verdict(wrong))) for id, verdict in _NAN.items()}
    return [AuditCheck(id, title, partial(check, audit)) for id, (title, check) in rules.items()]
