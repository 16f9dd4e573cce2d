"""Presets of other public systems, as their authors describe them (docs/systems.md).

Each is another configuration with fields changed, written as on the command line. Most start from `baseline`,
the challenge's network and loop.
"""

from dataclasses import replace

from pgolf_fast.config.fields import flip
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.ttt import TTTConfig


def _changed(base: RunConfig, name: str, **groups: str) -> RunConfig:
    """Return `base` under another name, with the FIELD=VALUE words of each group set."""
    words = [f"{group}.{word}" for group, text in groups.items() for word in text.split()]
    return replace(flip(base, words), name=name)


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
