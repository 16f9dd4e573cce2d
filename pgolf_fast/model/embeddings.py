"""Embeddings beside the token table: hash n-grams, values, and the mix with the position before."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.config.schema import ModelConfig


class NgramHash(nn.Module):
    """Hash n-gram embedding: table rows by bigram (and trigram), projected to the model width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.bigram_vocab_size, config.bigram_dim)
        self.proj = nn.Linear(config.bigram_dim, config.model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.pos_conditional, self.trigram = config.pos_conditional, config.trigram

    def forward(self, tokens: Tensor, has_leading_space: Tensor, boost: Tensor, projection: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, D) in the projection's dtype.

        Scale and word-start gate act on the table rows, which are narrower: the projection is linear.
        """
        given = (tokens, self.embed.weight, has_leading_space, self.scale, boost)
        kind: dict[str, Any] = {"pos_conditional": self.pos_conditional, "trigram": self.trigram}
        return F.linear(ops.ngram_hash_embed(*given, **kind, out_dtype=projection.dtype), projection)


class SmearGate(nn.Module):
    """Mix of each position with the one before it, by a learned gate per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.smear_gate(x, self.gate)


def gated_smear(x: Tensor, weight: Tensor, strength: Tensor, starts: Tensor) -> Tensor:
    """Add to each row of x (B, T, D) `strength` (1,) times its gate times the row before it (PR 1855).

    The gate reads the row's first W channels by weight (1, W); where `starts` (B, T) is true, it is 0.
    """
    gate = torch.sigmoid(F.linear(x[..., : weight.shape[1]], weight.to(x.dtype)))
    gate = strength.to(x.dtype) * gate.masked_fill(starts[..., None], 0)
    return torch.addcmul(x, gate, F.pad(x[:, :-1], (0, 0, 1, 0)))


class ValueEmbedding(nn.Module):
    """A token table projected to the width of the attention values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.ve_dim)
        self.proj = nn.Linear(config.ve_dim, config.kv_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: Tensor, projection: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, KV*hd) in the projection's dtype."""
        rows = F.embedding(tokens, self.embed.weight).to(projection.dtype)
        return F.linear(rows, projection) * self.scale.to(projection.dtype)
