"""RoPE tables with an NTK-scaled base beyond the training length (PR 1501; bloc97 2023)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pgolf_fast.config.schema import ModelConfig


def rope_base(config: ModelConfig, context: int) -> float:
    """Return the base for `context` tokens: base * (context / trained)^(r / (r - 2)) beyond `trained`."""
    dims = config.rotary_dims
    if context <= config.rope_train_seq_len or dims <= 2:
        return config.rope_base
    return config.rope_base * (context / config.rope_train_seq_len) ** (dims / (dims - 2))


def _tables(config: ModelConfig, length: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    dims = config.rotary_dims
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
        frequencies = rope_base(config, context) ** -exponents
        positions = torch.arange(length, dtype=torch.float32, device=device)
        if config.rope_bf16_tables and context <= config.rope_train_seq_len:
            frequencies, positions = frequencies.bfloat16(), positions.bfloat16()
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if config.rope_bf16_tables:
            cos, sin = cos.bfloat16(), sin.bfloat16()
        return cos.float(), sin.float()


# never evicted: captured CUDA graphs keep reading them
_cached_tables = functools.cache(_tables)


def rope_tables(
    config: ModelConfig, length: int, device: torch.device, context: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, r/2) float32, for positions 0 .. length-1.

    `context` (default: length) sets the base only, so that a text written token by token can use the base of
    its final length.
    """
    if torch.compiler.is_compiling():  # the graph keeps the tables; a cached function would only warn
        return _tables(config, length, context or length, device)
    return _cached_tables(config, length, context or length, device)
