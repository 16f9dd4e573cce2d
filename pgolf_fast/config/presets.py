"""Presets: functions that return a complete configuration, and `shrink`, which fits one to a CPU."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from pgolf_fast.config.fields import with_fields
from pgolf_fast.config.schema import AverageConfig, ModelConfig, RunConfig, TrainConfig
from pgolf_fast.config.systems import baseline, pr296_error_guided, pr296_reptile, pr301, pr1250
from pgolf_fast.config.ttt import TTTConfig, adapters
from pgolf_fast.errors import PgolfError


def exp101() -> RunConfig:
    """PR 1501 as its authors describe it, with every part in effect (27 M parameters)."""
    # train.meta.dilute divides the meta objective by the number of micro-batches, as in the original: the
    # described weight of 0.5 acts as 0.0625 with eight of them
    return RunConfig(name="exp101")


def exp101_as_run() -> RunConfig:
    """PR 1501 as its program ran, for parity with the published numbers."""
    return with_fields(
        exp101(),
        {
            "name": "exp101_as_run",
            "model.trigram": False,
            "model.rope_bf16_tables": True,
            "train.qat.banks": False,
            "average.swa_apply": False,
            "eval.repeat_tail": True,
            "ttt.parameters": "all",
            "ttt.quantize_forward": "projections",
        },
    )


def exp105a() -> RunConfig:
    """exp101 without the meta-learning step: the ablation."""
    return with_fields(exp101(), {"name": "exp105a", "train.meta": None})


def exp106() -> RunConfig:
    """PR 1502: exp101 with meta-learning across the batch, a delta loss and slot rates."""
    meta = {"train.meta.method": "cross_chunk", "train.meta.delta_weight": 0.3, "train.meta.slot_rates": True}
    return with_fields(exp101(), {"name": "exp106", **meta})


def exp101_swiglu() -> RunConfig:
    """exp101 with a gated MLP of the same size: 2 x 1024 up rows and 1024 hidden channels."""
    gated = {"model.mlp_activation": "swiglu", "model.mlp_mult": 2.0}
    return with_fields(exp101(), {"name": "exp101_swiglu", **gated})


def small() -> RunConfig:
    """exp101 with about 3 M parameters: ten minutes on two CPU cores."""
    return shrink(exp101(), "small")


def tiny() -> RunConfig:
    """exp101 with about 1 M parameters, for the demo: two minutes on two CPU cores."""
    return shrink(exp101(), "tiny")


_OWN = (exp101, exp101_as_run, exp105a, exp106, exp101_swiglu)
_SYSTEMS = (baseline, pr296_reptile, pr296_error_guided, pr301, pr1250)
PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function for function in (*_OWN, *_SYSTEMS, small, tiny)
}


def is_preset(name: str) -> bool:
    """Return True if `preset` knows the name."""
    parent, _, size = name.rpartition("_")
    return name in PRESETS or (parent in PRESETS and size in SIZES)


def preset(name: str, **fields: object) -> RunConfig:
    """Return the preset of that name, or `<preset>_<size>` for a shrunken one (exp105a_tiny).

    fields: changes, with `__` between groups: preset("tiny", train__steps=10, data__path="shards").
    Raises PgolfError for an unknown name, suggesting the nearest, or an unknown field.
    """
    if not is_preset(name):
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PgolfError(f"unknown preset {name!r}: {hint}presets are {', '.join(PRESETS)}")
    parent, _, size = name.rpartition("_")
    return with_fields(PRESETS[name]() if name in PRESETS else shrink(PRESETS[parent](), size), fields)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Targets of `shrink`. A model dimension of a preset that is already smaller stays as it is."""

    num_layers: int = 4
    model_dim: int
    head_dim: int
    bigram_rows: int = 4096
    table_dim: int
    seq_len: int = 256
    batch_tokens: int
    steps: int
    seconds: float | None


SIZES = {
    "small": Size(model_dim=256, head_dim=64, table_dim=64, batch_tokens=4096, steps=100_000, seconds=600.0),
    "tiny": Size(model_dim=128, head_dim=32, table_dim=48, batch_tokens=2048, steps=300, seconds=None),
}


def shrink(base: RunConfig, size: str) -> RunConfig:
    """Return `base` at one of SIZES, named like the size if `base` is exp101, else `<base>_<size>`."""
    if size not in SIZES:
        raise PgolfError(f"unknown size {size!r}: sizes are {', '.join(SIZES)}")
    to = SIZES[size]
    model, train = _shrink_model(base.model, to), _shrink_train(base.train, to)
    return replace(
        base,
        name=size if base.name == "exp101" else f"{base.name}_{size}",
        model=model,
        train=train,
        optim=replace(
            base.optim,
            matrix_lr=0.035,
            embed_lr=0.016,
            scalar_lr=0.011,
            muon_momentum=0.95,
            muon_momentum_start=0.85,
            muon_momentum_warmup_steps=200,
        ),
        average=_shrink_average(base),
        quant=replace(
            base.quant,
            calibration_sequences=16,
            calibration_length=train.seq_len,
            calibration_batch=16,
            grid="percentile",  # weights of a small model are small compared to the fixed step of 1/31
        ),
        eval=replace(base.eval, seq_len=None, batch_seqs=None),
        # a preset with an adapter of its own keeps it, with smaller chunks
        ttt=adapters(train.seq_len)["lora"] if base.ttt == TTTConfig() else _shrink_ttt(base, model, train),
    )


def _shrink_train(train: TrainConfig, to: Size) -> TrainConfig:
    qat = train.qat
    if train.warmdown_shape == "cosine":
        # the whole run is the decay: the original threshold would spend a third of it in fake quantization
        qat = qat and replace(qat, below=qat.below and 0.05)
    return replace(
        train,
        steps=to.steps,
        max_seconds=to.seconds,
        schedule="steps" if to.seconds is None else "time",
        batch_tokens=to.batch_tokens,
        micro_batch_tokens=to.batch_tokens,
        seq_len=min(to.seq_len, train.seq_len),
        # small batches make small updates, which bfloat16 tables would round away
        table_dtype="float32",
        # the loss of one small batch is too noisy to trigger the decay; exp101's own began after a third
        adaptive_warmdown=False,
        warmdown_steps=None,
        warmdown_fraction=1.0,
        lr_hold_steps=10,
        val_every=None,
        log_every=100,
        checkpoint_minutes=2.0,
        # a micro-batch is the whole batch here: rarer meta steps keep their share of the work
        meta=train.meta and replace(train.meta, every=32, freeze_blocks=1),
        qat=qat,
    )


def _shrink_average(base: RunConfig) -> AverageConfig:
    """Average over fewer steps; what is off stays off."""
    average = replace(base.average, swa_every=base.average.swa_every and 10)
    if base.train.warmdown_shape == "cosine":
        average = replace(average, swa_below=0.02)
    return replace(average, ema_decay=0.95, ema_every=2) if average.ema_decay else average


def _shrink_ttt(base: RunConfig, model: ModelConfig, train: TrainConfig) -> TTTConfig:
    """Keep the adapter: chunks of at most 32 sequences, one epoch, the same share of the blocks."""
    ttt = base.ttt
    sequences = min(32, max(1, ttt.chunk_tokens // base.eval_seq_len))
    frozen = ttt.freeze_blocks
    if ttt.frozen_slots:
        frozen = min(model.num_layers - 1, round(frozen * model.num_layers / base.model.num_layers))
    return replace(
        ttt,
        chunk_tokens=sequences * train.seq_len,
        batch_seqs=min(16, ttt.batch_seqs),
        epochs=min(1, ttt.epochs),
        freeze_blocks=frozen,
        guided=replace(ttt.guided, window_tokens=min(train.seq_len, ttt.guided.window_tokens)),
    )


def _shrink_model(model: ModelConfig, to: Size) -> ModelConfig:
    layers, dim = min(model.num_layers, to.num_layers), min(model.model_dim, to.model_dim)
    heads = max(1, dim // to.head_dim)
    group = model.num_heads // model.num_kv_heads
    kv_heads = max(1, heads // group)
    while heads % kv_heads:
        kv_heads -= 1
    with_ve = -(-len(model.ve_layers) * layers // model.num_layers)
    return replace(
        model,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        rope_dims=min(model.rope_dims, to.head_dim // 2),
        bigram_vocab_size=min(model.bigram_vocab_size, to.bigram_rows),
        bigram_dim=min(model.bigram_dim, to.table_dim),
        xsa_last_n=min(model.xsa_last_n, layers),
        ve_dim=min(model.ve_dim, to.table_dim),
        ve_layers=tuple(range(layers - with_ve, layers)) if model.ve_enabled else (),
        frozen_skips=min(model.frozen_skips, max(0, layers // 2 - 1)),
    )
