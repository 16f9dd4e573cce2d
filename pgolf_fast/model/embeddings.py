"""Additions to token embeddings: hash n-grams, SmearGate, value embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast import ops


class NgramHash(nn.Module):
    """Hash n-gram embedding: table rows by bigram (and trigram), projected to the model width."""

    def __init__(self, num_rows: int, dim: int, model_dim: int, *, pos_conditional: bool, trigram: bool):
        super().__init__()
        self.embed = nn.Embedding(num_rows, dim)
        self.proj = nn.Linear(dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.pos_conditional, self.trigram = pos_conditional, trigram

    def forward(self, tokens: Tensor, has_leading_space: Tensor, boost: Tensor, projection: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, D) in the projection's dtype.

        Scale and word-start gate act on the table rows: the projection is linear, so this equals scaling its
        result, and rows are narrower.
        """
        rows = ops.ngram_hash_embed(
            tokens,
            self.embed.weight,
            has_leading_space,
            self.scale,
            boost,
            pos_conditional=self.pos_conditional,
            trigram=self.trigram,
            out_dtype=projection.dtype,
        )
        return F.linear(rows, projection)


class SmearGate(nn.Module):
    """Mix of each position with the one before it, by a learned gate per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.smear_gate(x, self.gate)


class ValueEmbedding(nn.Module):
    """A token table projected to the width of the attention values."""

    def __init__(self, vocab_size: int, dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.proj = nn.Linear(dim, kv_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: Tensor, projection: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, KV*hd) in the projection's dtype."""
        rows = F.embedding(tokens, self.embed.weight).to(projection.dtype)
        return F.linear(rows, projection) * self.scale.to(projection.dtype)
