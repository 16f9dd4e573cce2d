"""Translation of run scripts: the environment variables of PR 1501 and related programs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pgolf_fast.config.fields import field_type, flatten, with_fields, without_none
from pgolf_fast.config.schema import MetaConfig, RunConfig
from pgolf_fast.errors import PgolfError

# Groups and their variables, named like the field, with or without the group in front, or NAME=FIELD
_NAMES = """
data DATA_PATH TOKENIZER_PATH=tokenizer
model VOCAB_SIZE NUM_LAYERS NUM_HEADS NUM_KV_HEADS MLP_MULT TIE_EMBEDDINGS TIED_EMBED_INIT_STD LOGIT_SOFTCAP
model ROPE_BASE ROPE_DIMS QK_GAIN_INIT BIGRAM_VOCAB_SIZE BIGRAM_DIM TRIGRAM XSA_LAST_N LN_SCALE VE_ENABLED
model VE_DIM VE_LAYERS MODEL_DIM=model_dim POS_CONDITIONAL_BIGRAM=pos_conditional
train SEED MIN_LR WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN TRAIN_LOG_EVERY ADAPTIVE_WARMDOWN
train ITERATIONS=steps
train MAX_WALLCLOCK_SECONDS=max_seconds WARMDOWN_ITERS=warmdown_steps WARMDOWN_FRAC=warmdown_fraction
train GRAD_ACCUM_TOTAL=micro_batch_tokens VAL_LOSS_EVERY=val_every ADAPTIVE_WARMDOWN_EMA=adaptive_ema
train ADAPTIVE_WARMDOWN_THRESHOLD=adaptive_threshold ADAPTIVE_WARMDOWN_MIN_STEP=adaptive_min_step
train META_TTT_ENABLED=meta META_TTT_INNER_LR=meta.inner_lr META_TTT_EVERY=meta.every
train META_TTT_LOSS_WEIGHT=meta.weight META_TTT_FREEZE_BLOCKS=meta.freeze_blocks META_TTT_SPLIT=meta.method
train META_TTT_DELTA_WEIGHT=meta.delta_weight META_TTT_SAM_ENABLED=meta.method
train META_TTT_SAM_RHO=meta.sam_radius META_SGD_ENABLED=meta.slot_rates LATE_QAT_THRESHOLD=qat.below
optim MATRIX_LR SCALAR_LR MUON_MOMENTUM ADAM_EPS TIED_EMBED_LR=embed_lr
optim MUON_MOMENTUM_WARMUP_START=muon_momentum_start MUON_MOMENTUM_WARMUP_STEPS=muon_momentum_warmup_steps
optim EMBED_WD=embed_weight_decay MUON_ROW_NORMALIZE=muon_row_norm
optim MUON_BACKEND_STEPS=muon_newton_schulz_steps MUON_WD=weight_decay MUON_WEIGHT_DECAY=weight_decay
optim ADAM_WD=weight_decay BETA1=adam_beta1 BETA2=adam_beta2 GRAD_CLIP_NORM=grad_clip
average EMA_DECAY EMA_EVERY SWA_EVERY SWA_ENABLED=swa_every EMA_ENABLED=ema_decay
eval EVAL_SEQ_LEN EVAL_STRIDE EVAL_BATCH_SEQS
ttt TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS TTT_MOMENTUM TTT_BATCH_SEQS TTT_GRAD_CLIP
ttt TTT_WEIGHT_DECAY TTT_BETA2 TTT_ENABLED=epochs TTT_OPTIMIZER=adapter TTT_LORA_RANK=lora.rank
ttt TTT_LORA_LR=lora.lr
quant GPTQ_BLOCK_SIZE=block_size GPTQ_PERCDAMP=damping GPTQ_CALIBRATION_BATCHES=calibration_sequences
quant MATRIX_BITS=bits EMBED_BITS=table_bits MLP_CLIP_SIGMAS=mlp_sigmas ATTN_CLIP_SIGMAS=attention_sigmas
quant EMBED_CLIP_SIGMAS=table_sigmas LQER_ENABLED=lqer_tensors LQER_TOP_K=lqer_tensors LQER_RANK=rank
quant LQER_ASYM_GROUP=lqer_group AWQ_LITE_ENABLED=protect_group
"""
FIELDS: dict[str, str] = {}
for _group, *_words in map(str.split, _NAMES.strip().splitlines()):
    for _name, _, _field in (word.partition("=") for word in _words):
        FIELDS[_name] = f"{_group}.{_field or _name.lower().removeprefix(f'{_group}_')}"
_OFF: dict[str, dict[str, object]] = {
    "SWA_ENABLED": {"average.swa_every": None},
    "EMA_ENABLED": {"average.ema_decay": 0.0, "average.ema_every": 1},
    "TTT_ENABLED": {"ttt.epochs": 0},
    "LQER_ENABLED": {"quant.lqer_tensors": 0},
}
# variables with their own code to set a field
_SWITCHES = {"GRAD_ACCUM_TOTAL": int, **dict.fromkeys(("META_TTT_SAM_ENABLED", *_OFF), bool)}
_OFF_AT_ZERO = (
    *("train.max_seconds", "train.val_every", "optim.grad_clip", "average.swa_every"),
    *("ttt.grad_clip", "eval.seq_len", "eval.batch_seqs"),
)


_BATCH_WINDOWS = 48  # of 2,048 tokens, in a rank's part of a batch of 786,432


@dataclass(frozen=True)
class Translation:
    """A configuration and the variables it was made from."""

    config: RunConfig
    used: dict[str, str]  # variable -> field
    refused: dict[str, str]  # variable -> reason
    adjusted: list[str]  # lines about derived fields


def translate(variables: Mapping[str, str], base: RunConfig) -> Translation:
    """Return `base` with fields set from environment variables; invalid or contradicting ones are refused."""
    given: dict[str, object] = {}
    refused: dict[str, str] = {}
    for name in (name for name in FIELDS if name in variables):  # in this order: MUON_WD before ADAM_WD
        field, text = FIELDS[name], variables[name]
        if field.startswith("train.meta.") and given.get("META_TTT_ENABLED", base.train.meta) is None:
            refused[name] = "train.meta is off"
            continue
        try:
            given[name] = _value(name, text)
        except ValueError:
            refused[name] = f"this is not a value of {field}"
            continue
        before = next((n for n in given if FIELDS[n] == field and n not in _SWITCHES), name)
        if name not in _SWITCHES and given[before] != given[name]:
            del given[name]
            refused[name] = f"{field} is one setting here, which {before}={variables[before]} sets"
    while True:
        try:
            config, adjusted = _with_values(base, given)
            used = {name: FIELDS[name] for name in variables if name in given}
            return Translation(config, used, refused, adjusted)
        except PgolfError as error:
            name = _culprit(base, given, str(error))
            refused[name] = str(error)
            del given[name]


def _culprit(base: RunConfig, given: dict[str, object], error: str) -> str:
    """Return the variable whose removal changes the error, trying those that it names first."""
    names = sorted(given, key=lambda name: error.rfind(FIELDS[name]), reverse=True)
    for name in names:
        try:
            _with_values(base, {n: value for n, value in given.items() if n != name})
        except PgolfError as other:
            if str(other) == error:
                continue
        return name
    return names[0]


def _value(name: str, text: str) -> object:
    """Return the text of a variable as a value of its field. Raises ValueError if it is of another type."""
    field = FIELDS[name]
    if field == "train.meta.method" and name not in _SWITCHES:
        return "cross_chunk" if text == "batch" else "fomaml"
    kind = _SWITCHES.get(name) or without_none(field_type(RunConfig, field))
    if kind in (bool, MetaConfig):
        words = {"true": 1, "yes": 1, "on": 1, "false": 0, "no": 0, "off": 0, "": 0}
        on = bool(words[text.lower()] if text.lower() in words else int(text))
        return on if kind is bool else MetaConfig() if on else None
    if field == "model.ve_layers":
        return tuple(int(part) for part in text.split(",") if part.strip())
    value = kind(text) if kind in (int, float) else text
    if name == "GPTQ_CALIBRATION_BATCHES":
        return _BATCH_WINDOWS * int(text)
    if value == "" or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(text)
    off = isinstance(value, (int, float)) and value <= 0 and field in _OFF_AT_ZERO
    return None if off else value


def _with_values(base: RunConfig, given: dict[str, object]) -> tuple[RunConfig, list[str]]:
    """Return `base` with the fields of these variables, and a line for every field derived from them."""
    values = {FIELDS[name]: value for name, value in given.items() if name not in _SWITCHES}
    if values.get("train.qat.below", 1) == 0:
        del values["train.qat.below"]
        values["train.qat"] = None
    if "train.meta" in values and base.train.meta and values["train.meta"]:
        del values["train.meta"]
    if given.get("META_TTT_SAM_ENABLED"):
        values["train.meta.method"] = "sam"
    defaults, before = dict(flatten(RunConfig())), dict(flatten(base))
    for switch, fields in _OFF.items():
        if given.get(switch) is False:
            values |= fields
        elif switch in given:
            values = {n: defaults[n] for n, off in fields.items() if before[n] == off} | values
    if "train.batch_tokens" in values or "GRAD_ACCUM_TOTAL" in given:
        batch: Any = values.get("train.batch_tokens", base.train.batch_tokens)
        count: Any = given.get("GRAD_ACCUM_TOTAL", 8)
        values["train.micro_batch_tokens"] = max(1, batch // max(1, count))
    new: dict[str, Any] = before | values
    adjusted = []
    for field, value, reason in _following(new, values):
        if value != new.get(field):
            adjusted.append(f"{field} is {value} instead of {new[field]}: {reason}")
            values[field] = new[field] = value
    return with_fields(base, values), adjusted


def _following(new: dict[str, Any], values: dict[str, object]) -> Iterator[tuple[str, object, str]]:
    """Yield the fields derived from others as (field, value, reason); `values` are the given ones."""
    layers, seq_len = max(1, new["model.num_layers"]), max(1, new["train.seq_len"])
    if new["model.ve_enabled"]:
        there = tuple(i for i in new["model.ve_layers"] if i < layers)
        yield "model.ve_layers", there, f"the model has blocks 0 to {layers - 1}"
    yield "model.frozen_skips", min(new["model.frozen_skips"], layers // 2), f"{layers} layers have no more"
    if "train.meta.freeze_blocks" in new and new.get("train.meta", 1):
        frozen = min(new["train.meta.freeze_blocks"], layers)
        yield "train.meta.freeze_blocks", frozen, f"the model has {layers} layers"
    head = new["model.model_dim"] // max(1, new["model.num_heads"])
    if new["model.rope_dims"] > head > 0:
        yield "model.rope_dims", head - head % 2, f"a head has {head} channels"
    if not new["model.bigram_vocab_size"]:
        yield "model.trigram", False, "there is no hash table"
    if new["train.max_seconds"] is None:
        yield "train.schedule", "steps", "there is no time limit"
    if "train.warmdown_fraction" in values:
        yield "train.warmdown_steps", None, "train.warmdown_fraction replaces it"
    elif "train.warmdown_steps" in values:
        yield "train.warmdown_fraction", None, "train.warmdown_steps replaces it"
    if "quant.calibration_sequences" in values:
        yield "quant.calibration", "shards", "its batches are training text"
    if not {"quant.mlp_sigmas", "quant.attention_sigmas", "quant.table_sigmas"}.isdisjoint(values):
        yield "quant.grid", "sdclip", "the other grids clip at no multiple of the standard deviation"
    if "train.qat.below" in values:
        yield "train.qat.from_share", None, "train.qat.below replaces it"
    micro, batch = new["train.micro_batch_tokens"], new["train.batch_tokens"]
    if batch % seq_len == 0 and (batch % micro or micro % seq_len):
        fit = seq_len * math.gcd(batch // seq_len, max(1, micro // seq_len))
        yield "train.micro_batch_tokens", fit, "a part of the batch in whole sequences"
    yield "train.log_every", new["train.log_every"] or new["train.steps"], "0 is no progress lines"
    window = new["eval.seq_len"] or seq_len
    if not 0 < new["eval.stride"] <= window:
        yield "eval.stride", window, f"windows of {window} tokens that do not overlap"
