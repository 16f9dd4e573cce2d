"""Translation of run scripts: the environment variables of PR 1501 and related programs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from pgolf_fast.config.fields import flatten, set_fields
from pgolf_fast.config.meta import MetaConfig
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError

Value = int | float | str | bool | None | tuple[int, ...] | MetaConfig


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(text)


def _off_at_zero(convert: Callable[[str], float]) -> Callable[[str], float | None]:
    return lambda text: convert(text) or None


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _method(split: str) -> str:
    return "cross_chunk" if split == "batch" else "fomaml"


def _meta(text: str) -> MetaConfig | None:
    return MetaConfig() if _flag(text) else None


FIELDS: dict[str, tuple[str, Callable[[str], Value]]] = {
    "SEED": ("train.seed", int),
    "ITERATIONS": ("train.steps", int),
    "MAX_WALLCLOCK_SECONDS": ("train.max_seconds", _off_at_zero(float)),
    "WARMUP_STEPS": ("train.warmup_steps", int),
    "WARMDOWN_ITERS": ("train.warmdown_steps", int),
    "TRAIN_BATCH_TOKENS": ("train.batch_tokens", int),
    "GRAD_ACCUM_TOTAL": ("accumulation", int),
    "TRAIN_SEQ_LEN": ("train.seq_len", int),
    "VAL_LOSS_EVERY": ("train.val_every", _off_at_zero(int)),
    "TRAIN_LOG_EVERY": ("train.log_every", int),
    "ADAPTIVE_WARMDOWN": ("train.adaptive_warmdown", _flag),
    "ADAPTIVE_WARMDOWN_EMA": ("train.adaptive_ema", float),
    "ADAPTIVE_WARMDOWN_THRESHOLD": ("train.adaptive_threshold", float),
    "ADAPTIVE_WARMDOWN_MIN_STEP": ("train.adaptive_min_step", int),
    "META_TTT_ENABLED": ("train.meta", _meta),
    "META_TTT_INNER_LR": ("train.meta.inner_lr", float),
    "META_TTT_EVERY": ("train.meta.every", int),
    "META_TTT_LOSS_WEIGHT": ("train.meta.weight", float),
    "META_TTT_FREEZE_BLOCKS": ("train.meta.freeze_blocks", int),
    "META_TTT_SPLIT": ("train.meta.method", _method),
    "META_TTT_DELTA_WEIGHT": ("train.meta.delta_weight", float),
    "META_TTT_SAM_ENABLED": ("sam", _flag),
    "META_TTT_SAM_RHO": ("train.meta.sam_radius", float),
    "META_SGD_ENABLED": ("train.meta.slot_rates", _flag),
    "LATE_QAT_THRESHOLD": ("train.qat.below", float),
    "DATA_PATH": ("data.path", str),
    "TOKENIZER_PATH": ("data.tokenizer", str),
    "VOCAB_SIZE": ("model.vocab_size", int),
    "NUM_LAYERS": ("model.num_layers", int),
    "MODEL_DIM": ("model.model_dim", int),
    "NUM_HEADS": ("model.num_heads", int),
    "NUM_KV_HEADS": ("model.num_kv_heads", int),
    "MLP_MULT": ("model.mlp_mult", float),
    "TIE_EMBEDDINGS": ("model.tie_embeddings", _flag),
    "TIED_EMBED_INIT_STD": ("model.tied_embed_init_std", float),
    "LOGIT_SOFTCAP": ("model.logit_softcap", float),
    "ROPE_BASE": ("model.rope_base", float),
    "ROPE_DIMS": ("model.rope_dims", int),
    "QK_GAIN_INIT": ("model.qk_gain_init", float),
    "BIGRAM_VOCAB_SIZE": ("model.bigram_vocab_size", int),
    "BIGRAM_DIM": ("model.bigram_dim", int),
    "TRIGRAM": ("model.trigram", _flag),
    "POS_CONDITIONAL_BIGRAM": ("model.pos_conditional", _flag),
    "XSA_LAST_N": ("model.xsa_last_n", int),
    "LN_SCALE": ("model.ln_scale", _flag),
    "VE_ENABLED": ("model.ve_enabled", _flag),
    "VE_DIM": ("model.ve_dim", int),
    "VE_LAYERS": ("model.ve_layers", _layers),
    "MATRIX_LR": ("optim.matrix_lr", float),
    "SCALAR_LR": ("optim.scalar_lr", float),
    "TIED_EMBED_LR": ("optim.embed_lr", float),
    "MUON_MOMENTUM": ("optim.muon_momentum", float),
    "MUON_MOMENTUM_WARMUP_START": ("optim.muon_momentum_start", float),
    "MUON_MOMENTUM_WARMUP_STEPS": ("optim.muon_momentum_warmup_steps", int),
    "MUON_BACKEND_STEPS": ("optim.muon_newton_schulz_steps", int),
    "MUON_WD": ("optim.weight_decay", float),
    "ADAM_WD": ("optim.weight_decay", float),
    "BETA1": ("optim.adam_beta1", float),
    "BETA2": ("optim.adam_beta2", float),
    "ADAM_EPS": ("optim.adam_eps", float),
    "GRAD_CLIP_NORM": ("optim.grad_clip", _off_at_zero(float)),
    "EMA_DECAY": ("average.ema_decay", float),
    "EMA_EVERY": ("average.ema_every", int),
    "SWA_EVERY": ("average.swa_every", _off_at_zero(int)),
    "EVAL_SEQ_LEN": ("eval.seq_len", int),
    "EVAL_STRIDE": ("eval.stride", int),
    "EVAL_BATCH_SEQS": ("eval.batch_seqs", int),
    "TTT_LR": ("ttt.lr", float),
    "TTT_EPOCHS": ("ttt.epochs", int),
    "TTT_CHUNK_TOKENS": ("ttt.chunk_tokens", int),
    "TTT_FREEZE_BLOCKS": ("ttt.freeze_blocks", int),
    "TTT_MOMENTUM": ("ttt.momentum", float),
    "TTT_BATCH_SEQS": ("ttt.batch_seqs", int),
    "TTT_GRAD_CLIP": ("ttt.grad_clip", float),
}

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
        except ValueError:  # an unbalanced quote: no assignment of ours spans lines
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

    Raises PgolfError for a value of the wrong type, or two variables that contradict each other.
    """
    used: dict[str, str] = {}
    unknown: dict[str, str] = {}
    values: dict[str, Value] = {}
    for name, text in assignments(script).items():
        if name not in FIELDS:
            unknown[name] = text
            continue
        field, convert = FIELDS[name]
        try:
            value = convert(text)
        except ValueError:
            raise PgolfError(f"{name}={text!r} does not fit {field}: give a value of its type") from None
        if values.get(field, value) != value:
            raise PgolfError(
                f"{name}={text} contradicts an earlier variable for {field}, which is one setting here"
            )
        values[field] = value
        used[name] = field
    return Translation(_with_values(base, values), used, unknown)


def _with_values(base: RunConfig, values: dict[str, Value]) -> RunConfig:
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
