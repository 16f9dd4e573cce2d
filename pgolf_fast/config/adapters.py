"""Settings of test-time training by name, each like a diff of another; `pgolf ttt-sweep` compares them."""

from __future__ import annotations

from dataclasses import replace

from pgolf_fast.config.ttt import LoraConfig, TTTConfig


def adapters(seq_len: int) -> dict[str, TTTConfig]:
    """By name, for windows of that many tokens and validation data of some hundred thousand."""
    sgd = TTTConfig(chunk_tokens=32 * seq_len, epochs=1)
    # many small steps: chunks of four windows, each passed over twice in one batch
    adamw = replace(
        sgd,
        adapter="adamw",
        chunk_tokens=4 * seq_len,
        batch_seqs=4,
        epochs=2,
        lr=1.5e-4,
        decay="constant",
        parameters="all",
        freeze_blocks=0,
        quantize_forward="none",
    )
    lora = replace(sgd, adapter="lora", lora=LoraConfig(segment_tokens=seq_len))
    return {
        "sgd": sgd,
        "sgd-as-run": replace(sgd, parameters="all", quantize_forward="projections"),
        "adamw": adamw,
        "adamw-banks": replace(adamw, parameters="banks"),
        "adamw-quantised": replace(adamw, parameters="banks", quantize_forward="banks"),
        "lora": lora,
        "phased": replace(adamw, adapter="phased", chunk_tokens=32 * seq_len, epochs=1, lora=lora.lora),
    }
