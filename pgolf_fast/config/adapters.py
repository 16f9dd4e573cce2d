"""Named settings of test-time training, which `pgolf ttt-sweep` compares."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

from pgolf_fast.config.ttt import LoraConfig, TTTConfig


def adapters(seq_len: int) -> dict[str, TTTConfig]:
    """Return settings by name, for windows of `seq_len` tokens and a few hundred thousand tokens in all."""
    sgd = TTTConfig(chunk_tokens=32 * seq_len, epochs=1)
    # many small steps: chunks of four windows, with two passes over each in one batch
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
        "adamw-quantized": replace(adamw, parameters="banks", quantize_forward="banks"),
        "lora": lora,
        "phased": replace(adamw, adapter="phased", chunk_tokens=32 * seq_len, epochs=1, lora=lora.lora),
    }


def unknown_adapter(name: str, known: Iterable[str]) -> str:
    """Return a line naming an unknown adapter and the known ones, nearest first if one is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown adapter {name!r}: {hint}adapters are {', '.join(names)}"
