"""Presets: functions that return a complete configuration, and `shrink`, which fits one to a CPU.

Each changes fields of another, written as on the command line. Presets of other public systems follow their
authors' descriptions (docs/systems.md); most start from `baseline`, the challenge's network and loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pgolf_fast.config.checks import need, unknown
from pgolf_fast.config.fields import flip, with_fields
from pgolf_fast.config.schema import AverageConfig, ModelConfig, RunConfig, TrainConfig
from pgolf_fast.config.ttt import TTTConfig, adapters


def _changed(base: RunConfig, name: str, **groups: str) -> RunConfig:
    """Return `base` under another name, with the FIELD=VALUE words of each group set."""
    words = [f"{group}.{word}" for group, text in groups.items() for word in text.split()]
    return replace(flip(base, words), name=name)


def exp101() -> RunConfig:
    """PR 1501 as its authors describe it, with every part in effect (27 M parameters)."""
    # train.meta.dilute divides the meta objective by the number of micro-batches, as in the original: the
    # described weight of 0.5 acts as 0.0625 with eight of them
    return RunConfig(name="exp101")


def exp101_as_run() -> RunConfig:
    """PR 1501 as its program ran, for parity with the published numbers."""
    return _changed(
        exp101(),
        "exp101_as_run",
        model="trigram=false rope_bf16_tables=true",
        train="qat.banks=false",
        average="swa_apply=false",
        eval="repeat_tail=true",
        ttt="parameters=all quantize_forward=projections",
    )


def exp105a() -> RunConfig:
    """exp101 without the meta-learning step: the ablation."""
    return _changed(exp101(), "exp105a", train="meta=none")


def exp106() -> RunConfig:
    """PR 1502: exp101 with meta-learning across the batch, a delta loss and slot rates."""
    meta = "meta.method=cross_chunk meta.delta_weight=0.3 meta.slot_rates=true"
    return _changed(exp101(), "exp106", train=meta)


def exp101_swiglu() -> RunConfig:
    """exp101 with a gated MLP of the same size: 2 x 1024 up rows and 1024 hidden channels."""
    return _changed(exp101(), "exp101_swiglu", model="mlp_activation=swiglu mlp_mult=2")


def baseline() -> RunConfig:
    """The challenge's baseline: 9 layers, relu^2, int8 (17 M parameters)."""
    return _changed(
        RunConfig(),
        "baseline",
        model="num_layers=9 mlp_mult=2 mlp_activation=relu_squared rope_dims=0 bigram_vocab_size=0 "
        "trigram=false pos_conditional=false word_start_boost=false smear=false xsa_last_n=0 ln_scale=false "
        "ve_enabled=false ve_layers= frozen_skips=0",
        train="seed=1337 steps=20_000 max_seconds=600 batch_tokens=524_288 micro_batch_tokens=65_536 "
        "seq_len=1024 warmdown_steps=1200 warmdown_shape=linear lr_hold_steps=0 adaptive_warmdown=false "
        "val_every=1000 log_every=200 meta=none qat=none",
        optim="matrix_lr=0.04 embed_lr=0.05 scalar_lr=0.04 muon_momentum=0.95 muon_momentum_start=0.85 "
        "muon_momentum_warmup_steps=500 weight_decay=0 grad_clip=none",
        average="ema_decay=0 ema_every=1 swa_every=none",
        quant="method=round bits=8 percentiles=0.9999984 calibration_length=1024",
        ttt="epochs=0 quantize_forward=none",
    )


def pr296_reptile() -> RunConfig:
    """PR 296: 11 layers, SmearGate, hash bigrams, Reptile on the last MLPs for the last fifth of the run."""
    return _changed(
        baseline(),
        "pr296_reptile",
        model="num_layers=11 mlp_mult=3 bigram_vocab_size=2048 bigram_dim=128 smear=true",
        # Reptile on 3 of 11 blocks, as the text says; their program took 2
        train="warmdown_steps=3000 reptile.share=0.2 reptile.inner_steps=3 reptile.inner_lr=0.1 "
        "reptile.outer_lr=0.01 reptile.block_share=0.28",
        optim="matrix_lr=0.02 embed_lr=0.03 scalar_lr=0.02 muon_momentum=0.99 muon_momentum_start=0.92 "
        "muon_momentum_warmup_steps=1500 weight_decay=0.04 grad_clip=0.3",
        average="swa_every=50 swa_below=0.5",
        quant="bits=6",
        ttt="chunk_tokens=1024 batch_seqs=1 epochs=1 lr=0.01 decay=constant momentum=0 grad_clip=none "
        "parameters=mlps freeze_blocks=8",
    )


def pr296_error_guided() -> RunConfig:
    """PR 296's model, adapted in a first pass over the text: it breaks the rules (--allow-illegal)."""
    ttt = TTTConfig(adapter="error_guided", quantize_forward="none")
    return _changed(replace(pr296_reptile(), ttt=ttt), "pr296_error_guided", eval="seq_len=2048")


def pr301() -> RunConfig:
    """PR 301: a wider baseline with z-loss, int6 QAT and float16 tables; its TTT in legal order."""
    return _changed(
        baseline(),
        "pr301",
        model="mlp_mult=2.875",  # 1472 hidden channels
        train="warmdown_steps=20_000 z_loss=1e-4 qat.below=none qat.from_share=0.8",
        optim="matrix_lr=0.06 embed_lr=0.07 scalar_lr=0.06 muon_momentum_start=0.92 "
        "muon_momentum_warmup_steps=1500 grad_clip=0.3",
        quant="bits=6 tables=float16",
        ttt="chunk_tokens=32_768 batch_seqs=8 epochs=3 lr=0.002 decay=constant grad_clip=none "
        "parameters=blocks",
    )


def pr1250() -> RunConfig:
    """PR 1250: as many KV as query heads, MLP 1792, a 3072 x 112 hash table, AdamW TTT (33 M)."""
    return _changed(
        RunConfig(),
        "pr1250",
        model="num_kv_heads=8 mlp_mult=3.5 bigram_vocab_size=3072 bigram_dim=112 trigram=false "
        "pos_conditional=false word_start_boost=false ve_layers=9,10 frozen_skips=0",
        train="seed=1337 steps=20_000 max_seconds=585 warmdown_steps=3500 warmdown_shape=linear "
        "adaptive_warmdown=false meta=none qat.below=0.5",
        average="ema_decay=0.997 ema_every=1",
        ttt="adapter=adamw chunk_tokens=131_072 epochs=3 lr=1e-4 beta2=0.999 parameters=blocks "
        "quantize_forward=none",
    )


def pr1855() -> RunConfig:
    """PR 1855, the record of April 2026: depth recurrence, two lanes, gates, packed documents (36 M)."""
    return _changed(
        RunConfig(),
        "pr1855",
        model="vocab_size=8192 mlp_mult=4 qk_gain_init=5 first_attn_scale=1 rope_bf16_frequencies=true "
        "bigram_vocab_size=0 trigram=false pos_conditional=false word_start_boost=false ve_enabled=false "
        "ve_layers= frozen_skips=0 rope_train_seq_len=131_072 num_loops=2 lanes_from=8 smear_form=gated "
        "skip_gates=true head_gate=sparse",
        train="steps=20_000 max_seconds=599.5 max_document=2048 loop_from=0.35 warmdown_steps=none "
        "warmdown_fraction=0.85 warmdown_shape=linear min_lr=0.1 lr_hold_steps=0 adaptive_warmdown=false "
        "val_every=none meta=none qat=none",
        optim="matrix_lr=0.026 embed_lr=0.03 scalar_lr=0.02 muon_momentum=0.97 muon_polar_express=true "
        "muon_row_norm=true adam_beta2=0.99 weight_decay=0.095 embed_weight_decay=0.085 "
        "scalar_weight_decay=0.02",
        average="ema_decay=0.9965 ema_every=1 swa_every=none",
        quant="grid=sdclip rank=4 calibration=shards calibration_sequences=768",
        ttt="adapter=lora quantize_forward=none lora.rank=80",
    )


def small() -> RunConfig:
    """exp101 with about 3 M parameters: ten minutes on two CPU cores."""
    return shrink(exp101(), "small")


def tiny() -> RunConfig:
    """exp101 with about 1 M parameters, for the demo: two minutes on two CPU cores."""
    return shrink(exp101(), "tiny")


_OWN = (exp101, exp101_as_run, exp105a, exp106, exp101_swiglu)
_SYSTEMS = (baseline, pr296_reptile, pr296_error_guided, pr301, pr1250, pr1855)
PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function for function in (*_OWN, *_SYSTEMS, small, tiny)
}


def is_preset(name: str) -> bool:
    """Return True if `preset` knows the name."""
    parent, _, size = name.rpartition("_")
    return name in PRESETS or (parent in PRESETS and size in SIZES)


def preset(name: str, /, **fields: object) -> RunConfig:
    """Return the preset of that name, or `<preset>_<size>` for a shrunken one (exp105a_tiny).

    fields: changes, with `__` between groups: preset("tiny", train__steps=10, data__path="shards").
    Raises PgolfError for an unknown name, suggesting the nearest, or an unknown field.
    """
    need(is_preset(name), unknown("preset", name, PRESETS))
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
    need(size in SIZES, unknown("size", size, SIZES))
    to, grid = SIZES[size], base.quant.grid
    model, train = _shrink_model(base.model, to), _shrink_train(base.train, to)
    small = _changed(
        base,
        size if base.name == "exp101" else f"{base.name}_{size}",
        optim="matrix_lr=0.035 embed_lr=0.016 scalar_lr=0.011 muon_momentum=0.95 muon_momentum_start=0.85 "
        "muon_momentum_warmup_steps=200",
        # weights of a small model are small compared to the fixed step of 1/31 of grid reference
        quant=f"grid={'percentile' if grid == 'reference' else grid} calibration_sequences=16 "
        f"calibration_batch=16 calibration_length={train.seq_len}",
        eval="seq_len=none batch_seqs=none",
    )
    # a preset with an adapter of its own keeps it, with smaller chunks
    ttt = adapters(train.seq_len)["lora"] if base.ttt == TTTConfig() else _shrink_ttt(base, model, train)
    return replace(small, model=model, train=train, average=_shrink_average(base), ttt=ttt)


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
        max_document=train.max_document and min(to.seq_len, train.max_document),
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
    """Average over fewer steps; averages that are off stay off."""
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
        lora=replace(ttt.lora, rank=min(8, ttt.lora.rank)),
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
    scale = layers / model.num_layers
    lanes = None if model.lanes_from is None else max(round(model.lanes_from * scale), layers // 2)
    end = min(round(model.loop_end * scale), (lanes or layers) - 1)
    return replace(
        model,
        num_layers=layers,
        loop_start=min(round(model.loop_start * scale), end) if model.num_loops else model.loop_start,
        loop_end=end if model.num_loops else model.loop_end,
        lanes_from=lanes,
        vocab_size=min(model.vocab_size, 1024),
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
