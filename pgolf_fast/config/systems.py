"""Presets of other public systems, as their authors describe them (docs/systems.md).

`baseline` is the challenge's network and loop. Most others read like diffs of it.
"""

from __future__ import annotations

from dataclasses import replace

from pgolf_fast.config.meta import ReptileConfig
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.schema import (
    AverageConfig,
    OptimConfig,
    QATConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from pgolf_fast.config.ttt import TTTConfig

NO_AVERAGE = AverageConfig(ema_decay=0.0, ema_every=1, swa_every=None)


def baseline() -> RunConfig:
    """The challenge's baseline: 9 layers, relu^2, int8 (17 M parameters)."""
    return RunConfig(
        name="baseline",
        model=ModelConfig(
            num_layers=9,
            mlp_mult=2.0,
            mlp_activation="relu_squared",
            rope_dims=0,
            bigram_vocab_size=0,
            trigram=False,
            pos_conditional=False,
            word_start_boost=False,
            smear=False,
            xsa_last_n=0,
            ln_scale=False,
            ve_enabled=False,
            ve_layers=(),
            frozen_skips=0,
        ),
        train=TrainConfig(
            seed=1337,
            steps=20_000,
            max_seconds=600.0,
            batch_tokens=524_288,
            micro_batch_tokens=65_536,
            seq_len=1024,
            warmdown_steps=1200,
            warmdown_shape="linear",
            lr_hold_steps=0,
            adaptive_warmdown=False,
            val_every=1000,
            log_every=200,
            meta=None,
            qat=None,
        ),
        optim=OptimConfig(
            matrix_lr=0.04,
            embed_lr=0.05,
            scalar_lr=0.04,
            muon_momentum=0.95,
            muon_momentum_start=0.85,
            muon_momentum_warmup_steps=500,
            weight_decay=0.0,
            grad_clip=None,
        ),
        average=NO_AVERAGE,
        quant=QuantConfig(method="round", bits=8, percentiles=(0.9999984,), calibration_length=1024),
        ttt=TTTConfig(epochs=0, quantize_forward="none"),
    )


def pr296_reptile() -> RunConfig:
    """PR 296: 11 layers, SmearGate, hash bigrams, Reptile on the last MLPs for the last fifth of the run."""
    base = baseline()
    return replace(
        base,
        name="pr296_reptile",
        model=replace(
            base.model, num_layers=11, mlp_mult=3.0, bigram_vocab_size=2048, bigram_dim=128, smear=True
        ),
        train=replace(
            base.train,
            warmdown_steps=3000,
            # 3 of 11 blocks, as the text says; their program took 2
            reptile=ReptileConfig(share=0.2, inner_steps=3, inner_lr=0.1, outer_lr=0.01, block_share=0.28),
        ),
        optim=OptimConfig(matrix_lr=0.02, embed_lr=0.03, scalar_lr=0.02),
        average=replace(NO_AVERAGE, swa_every=50, swa_below=0.5),
        quant=replace(base.quant, bits=6),
        ttt=TTTConfig(
            chunk_tokens=1024,
            batch_seqs=1,
            epochs=1,
            lr=0.01,
            decay="constant",
            momentum=0.0,
            grad_clip=None,
            parameters="mlps",
            freeze_blocks=8,
            quantize_forward="none",
        ),
    )


def pr296_error_guided() -> RunConfig:
    """PR 296's model, adapted in a first pass over the text: it breaks the rules (--allow-illegal)."""
    base = pr296_reptile()
    return replace(
        base,
        name="pr296_error_guided",
        eval=replace(base.eval, seq_len=2048),
        ttt=TTTConfig(adapter="error_guided", quantize_forward="none"),
    )


def pr301() -> RunConfig:
    """PR 301: a wider baseline with z-loss, int6 QAT and float16 tables; its TTT in legal order."""
    base = baseline()
    return replace(
        base,
        name="pr301",
        model=replace(base.model, mlp_mult=2.875),  # 1472 hidden channels
        train=replace(
            base.train,
            warmdown_steps=20_000,
            z_loss=1e-4,
            qat=QATConfig(below=None, from_share=0.8),
        ),
        optim=replace(
            base.optim,
            matrix_lr=0.06,
            embed_lr=0.07,
            scalar_lr=0.06,
            muon_momentum_start=0.92,
            muon_momentum_warmup_steps=1500,
            grad_clip=0.3,
        ),
        quant=replace(base.quant, bits=6, tables="float16"),
        ttt=TTTConfig(
            chunk_tokens=32_768,
            batch_seqs=8,
            epochs=3,
            lr=0.002,
            decay="constant",
            grad_clip=None,
            parameters="blocks",
            quantize_forward="none",
        ),
    )


def pr1250() -> RunConfig:
    """PR 1250: as many KV as query heads, MLP 1792, a 3072 x 112 hash table, AdamW TTT (33 M)."""
    base = RunConfig()
    return replace(
        base,
        name="pr1250",
        model=replace(
            base.model,
            num_kv_heads=8,
            mlp_mult=3.5,
            bigram_vocab_size=3072,
            bigram_dim=112,
            trigram=False,
            pos_conditional=False,
            word_start_boost=False,
            ve_layers=(9, 10),
            frozen_skips=0,
        ),
        train=replace(
            base.train,
            seed=1337,
            steps=20_000,
            max_seconds=585.0,
            warmdown_steps=3500,
            warmdown_shape="linear",
            adaptive_warmdown=False,
            meta=None,
            qat=QATConfig(below=0.5),
        ),
        average=replace(base.average, ema_decay=0.997, ema_every=1),
        ttt=TTTConfig(
            adapter="adamw",
            chunk_tokens=131_072,
            epochs=3,
            lr=1e-4,
            beta2=0.999,
            parameters="blocks",
            quantize_forward="none",
        ),
    )
