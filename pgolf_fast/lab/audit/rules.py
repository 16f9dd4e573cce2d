"""The rules of the challenge, C1 to C18, and the check of each."""

from collections.abc import Callable
from functools import partial

from pgolf_fast.data.source import open_source
from pgolf_fast.lab.audit import causal, scoring, submission
from pgolf_fast.lab.audit.check import AuditCheck, AuditFinding, fails, undecided
from pgolf_fast.lab.audit.target import Audit, AuditTarget
from pgolf_fast.model.weights import not_finite

# Checks of parts of the target
_PARTS: dict[str, Callable[[AuditTarget], AuditFinding]] = {
    "C8": lambda t: submission.training_ignores_validation(t.train, t.config, t.tokens, t.tokenizer.path),
    "C9": lambda t: submission.calibration_ignores_data(t.folder if t.artifact else None, t.requantize),
    "C10": lambda t: submission.within_bytes(t.artifact, t.limit_bytes),
    "C11": lambda t: submission.self_contained(
        t.artifact, t.tokenizer.path, t.tokens[: 2 * t.config.eval_seq_len + 1]
    ),
    "C12": lambda t: submission.within_time(t.folder, t.train_limit, t.eval_limit),
    "C13": lambda t: scoring.byte_counts(
        t.validation, t.table, t.tokenizer, t.stream(t.validation).target_bytes, exact=t.side_bytes is None
    ),
    "C18": lambda t: submission.validation_is_unseen(
        open_source(t.config.data, t.config.model.vocab_size).folder
    ),
}


def _part(id: str, audit: Audit) -> AuditFinding:
    return _PARTS[id](audit.target)


# The title and the check of each rule
RULES: dict[str, tuple[str, Callable[[Audit], AuditFinding]]] = {
    "C1": ("no score reads its target or a later token", causal.causality),
    "C2": ("no update reads a token before it is scored", scoring.state_causality),
    "C3": ("chunks are scored before updates", scoring.score_before_train),
    "C4": ("no update after the last score", scoring.nothing_after_last_score),
    "C5": ("each target scored once", scoring.once_each),
    "C6": ("no target in a lookup key", causal.no_target_in_keys),
    "C7": ("probabilities sum to 1", scoring.normalized),
    "C8": ("training without validation data", partial(_part, "C8")),
    "C9": ("calibration without data", partial(_part, "C9")),
    "C10": ("artifact and script fit the byte limit", partial(_part, "C10")),
    "C11": ("script is self-contained", partial(_part, "C11")),
    "C12": ("within the time limits", partial(_part, "C12")),
    "C13": ("byte counts are those of the text", partial(_part, "C13")),
    "C14": ("word starts are those of the inputs", causal.word_starts_of_inputs),
    "C15": ("scoring is deterministic", scoring.deterministic),
    "C16": ("no update while scoring", scoring.no_update_while_scoring),
    "C17": ("the same for any number of ranks", scoring.same_for_any_ranks),
    "C18": ("validation documents not in training data", partial(_part, "C18")),
}


# Verdicts for a model with NaN: without losses, order and number of scores and updates are unknown
_NAN = dict.fromkeys(("C1", "C7", "C15"), fails)
_NAN |= dict.fromkeys(("C2", "C3", "C4", "C5", "C16", "C17"), undecided)


def checks(target: AuditTarget) -> list[AuditCheck]:
    """Return the checks of C1 to C18 for a target, in this order."""
    audit, rules = Audit(target), dict(RULES)
    named = target.model.state_dict().items()
    if wrong := next((f"{name}: {problem}" for name, t in named if (problem := not_finite(t))), None):
        rules |= {id: (rules[id][0], partial(lambda v, _: v, verdict(wrong))) for id, verdict in _NAN.items()}
    return [AuditCheck(id, title, partial(check, audit)) for id, (title, check) in rules.items()]
