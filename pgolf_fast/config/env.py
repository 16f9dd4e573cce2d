"""Translation of run scripts: the environment variables of PR 1501 and related programs."""

import re
import shlex
from dataclasses import dataclass

from pgolf_fast.config.fields import field_type, flatten, set_fields, without_none
from pgolf_fast.config.schema import MetaConfig, RunConfig
from pgolf_fast.errors import PgolfError

_SAME_NAME = {  # variables named like a field, with or without its group in front
    "data": "DATA_PATH",
    "model": "VOCAB_SIZE NUM_LAYERS NUM_HEADS NUM_KV_HEADS MLP_MULT TIE_EMBEDDINGS "
    "TIED_EMBED_INIT_STD LOGIT_SOFTCAP ROPE_BASE ROPE_DIMS QK_GAIN_INIT BIGRAM_VOCAB_SIZE BIGRAM_DIM TRIGRAM "
    "XSA_LAST_N LN_SCALE VE_ENABLED VE_DIM VE_LAYERS",
    "train": "SEED WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN TRAIN_LOG_EVERY ADAPTIVE_WARMDOWN",
    "optim": "MATRIX_LR SCALAR_LR MUON_MOMENTUM ADAM_EPS",
    "average": "EMA_DECAY EMA_EVERY SWA_EVERY",
    "eval": "EVAL_SEQ_LEN EVAL_STRIDE EVAL_BATCH_SEQS",
    "ttt": "TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS TTT_MOMENTUM TTT_BATCH_SEQS TTT_GRAD_CLIP",
}
FIELDS = {
    name: f"{group}.{name.lower().removeprefix(f'{group}_')}"
    for group, names in _SAME_NAME.items()
    for name in names.split()
} | {
    "ITERATIONS": "train.steps",
    "MAX_WALLCLOCK_SECONDS": "train.max_seconds",
    "WARMDOWN_ITERS": "train.warmdown_steps",
    "GRAD_ACCUM_TOTAL": "accumulation",
    "VAL_LOSS_EVERY": "train.val_every",
    "ADAPTIVE_WARMDOWN_EMA": "train.adaptive_ema",
    "ADAPTIVE_WARMDOWN_THRESHOLD": "train.adaptive_threshold",
    "ADAPTIVE_WARMDOWN_MIN_STEP": "train.adaptive_min_step",
    "META_TTT_ENABLED": "train.meta",
    "META_TTT_INNER_LR": "train.meta.inner_lr",
    "META_TTT_EVERY": "train.meta.every",
    "META_TTT_LOSS_WEIGHT": "train.meta.weight",
    "META_TTT_FREEZE_BLOCKS": "train.meta.freeze_blocks",
    "META_TTT_SPLIT": "train.meta.method",
    "META_TTT_DELTA_WEIGHT": "train.meta.delta_weight",
    "META_TTT_SAM_ENABLED": "sam",
    "META_TTT_SAM_RHO": "train.meta.sam_radius",
    "META_SGD_ENABLED": "train.meta.slot_rates",
    "LATE_QAT_THRESHOLD": "train.qat.below",
    "TOKENIZER_PATH": "data.tokenizer",
    "MODEL_DIM": "model.model_dim",
    "POS_CONDITIONAL_BIGRAM": "model.pos_conditional",
    "TIED_EMBED_LR": "optim.embed_lr",
    "MUON_MOMENTUM_WARMUP_START": "optim.muon_momentum_start",
    "MUON_MOMENTUM_WARMUP_STEPS": "optim.muon_momentum_warmup_steps",
    "MUON_BACKEND_STEPS": "optim.muon_newton_schulz_steps",
    "MUON_WD": "optim.weight_decay",
    "ADAM_WD": "optim.weight_decay",
    "BETA1": "optim.adam_beta1",
    "BETA2": "optim.adam_beta2",
    "GRAD_CLIP_NORM": "optim.grad_clip",
}
_PSEUDO_FIELDS = {"accumulation": int, "sam": bool}  # translated by `_with_values`
_OFF_AT_ZERO = ("train.max_seconds", "train.val_every", "optim.grad_clip", "average.swa_every")

_ASSIGNMENT = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=(.*)$", re.DOTALL)
_DEFAULT = re.compile(r"^\$\{[A-Za-z_][A-Za-z0-9_]*:?[-=]([^}]*)\}$")


@dataclass(frozen=True)
class Translation:
    """A configuration, the variables it was made from (name -> field), and unknown variables."""

    config: RunConfig
    used: dict[str, str]
    unknown: dict[str, str]


def assignments(script: str) -> dict[str, str]:
    """Return the NAME=value pairs of a shell script: exports, assignments, and those before a command.

    `${NAME:-default}` counts as its default; the last assignment of a name wins.
    """
    values: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an unbalanced quote; known variables are set on one line
            continue
        for word in words[1:] if words[:1] in (["export"], ["env"]) else words:
            match = _ASSIGNMENT.match(word)
            if match is None:
                break
            default = _DEFAULT.match(match[2])
            values[match[1]] = default[1] if default else match[2]
    return values


def translate(script: str, base: RunConfig) -> Translation:
    """Return `base` with the variables that a run script sets.

    Raises PgolfError for a value of the wrong type, or for two variables that contradict each other.
    """
    used: dict[str, str] = {}
    unknown: dict[str, str] = {}
    values: dict[str, object] = {}
    for name, text in assignments(script).items():
        if name not in FIELDS:
            unknown[name] = text
            continue
        field = FIELDS[name]
        try:
            value = _value(field, text)
        except ValueError:
            raise PgolfError(f"{name}={text!r} does not fit {field}: give a value of its type") from None
        if values.get(field, value) != value:
            raise PgolfError(
                f"{name}={text} contradicts an earlier variable for {field}, which is one setting here"
            )
        values[field] = value
        used[name] = field
    return Translation(_with_values(base, values), used, unknown)


def _value(field: str, text: str) -> object:
    """Return the text of a variable as a value of its field. Raises ValueError if it is of another type."""
    if field == "train.meta.method":
        return "cross_chunk" if text == "batch" else "fomaml"
    kind = _PSEUDO_FIELDS.get(field) or without_none(field_type(RunConfig, field))
    if kind in (bool, MetaConfig):
        on = text.lower() in ("1", "true", "yes", "on")
        if not on and text.lower() not in ("0", "false", "no", "off", ""):
            raise ValueError(text)
        return on if kind is bool else MetaConfig() if on else None
    if field == "model.ve_layers":
        return tuple(int(part) for part in text.split(",") if part.strip())
    value = kind(text)
    return None if value == 0 and field in _OFF_AT_ZERO else value


def _with_values(base: RunConfig, values: dict[str, object]) -> RunConfig:
    """Return `base` with these fields set, and the pseudo-fields `sam` and `accumulation` translated.

    A batch without an accumulation count is split into eight micro-batches, as in the original.
    """
    if values.pop("sam", False):
        values["train.meta.method"] = "sam"
    accumulation = values.pop("accumulation", 8)
    if "train.batch_tokens" in values or accumulation != 8:
        batch = values.get("train.batch_tokens", base.train.batch_tokens)
        assert isinstance(batch, int)
        assert isinstance(accumulation, int)
        values["train.micro_batch_tokens"] = max(1, batch // max(1, accumulation))
    # scripts also set fields of groups that are off; set_fields would turn these groups on
    off = {name for name, value in {**dict(flatten(base)), **values}.items() if value is None}
    return set_fields(base, {n: v for n, v in values.items() if n.rpartition(".")[0] not in off})
