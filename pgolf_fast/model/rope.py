"""Tables of rotary position embeddings (Su et al. 2021)."""

from functools import cache

import torch
from torch import Tensor

from pgolf_fast.config.schema import ModelConfig


def rope_base(config: ModelConfig, context: int) -> float:
    """Return the base for `context` tokens: base * (context / trained)^(r / (r - 2)) beyond `trained`."""
    dims = config.rotary_dims
    if context <= config.rope_train_seq_len or dims <= 2:
        return config.rope_base
    return config.rope_base * (context / config.rope_train_seq_len) ** (dims / (dims - 2))


@cache  # never evicted: captured CUDA graphs keep reading them
def _tables(config: ModelConfig, length: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    dims = config.rotary_dims
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
        frequencies = rope_base(config, context) ** -exponents
        if config.rope_bf16_frequencies:
            frequencies = frequencies.bfloat16().float()
        positions = torch.arange(length, dtype=torch.float32, device=device)
        if config.rope_bf16_tables and context <= config.rope_train_seq_len:
            frequencies, positions = frequencies.bfloat16(), positions.bfloat16()
        angles = torch.outer(positions, frequencies)
        stored = torch.bfloat16 if config.rope_bf16_tables else angles.dtype
        return angles.cos().to(stored).float(), angles.sin().to(stored).float()


def rope_tables(
    config: ModelConfig, length: int, device: torch.device, context: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, r/2) float32, for positions 0 .. length-1.

    `context` (default: length) sets only the base: text that grows token by token uses its final length.
    """
    # a compiled graph keeps the tables; a cached function would only warn
    tables = _tables.__wrapped__ if torch.compiler.is_compiling() else _tables
    return tables(config, length, context or length, device)
