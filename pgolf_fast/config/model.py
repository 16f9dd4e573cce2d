"""The network's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgolf_fast.errors import PgolfError

Activation = Literal["leaky_relu_squared", "relu_squared", "swiglu"]


def need(condition: bool, message: str) -> None:
    """Raise PgolfError with that message unless the condition holds."""
    if not condition:
        raise PgolfError(message)


def blocks_of(share: float, layers: int) -> int:
    """How many of `layers` blocks a share of them is: rounded down, at least one."""
    return max(1, int(share * layers + 1e-9))  # a share like 0.29 of 100 is a little below 29


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network (PR 1501). Field names are those of the golden vectors."""

    vocab_size: int = 1024
    """Number of token ids; the tokenizer must have exactly as many."""
    num_layers: int = 11
    """Transformer blocks; the first half are U-Net encoders."""
    model_dim: int = 512
    """Width of the residual stream."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 4
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    mlp_mult: float = 3.0
    """MLP hidden width over model_dim. A gated MLP has two up rows per hidden channel."""
    mlp_activation: Activation = "leaky_relu_squared"
    """leaky_relu_squared (slope 0.5), relu_squared, or swiglu (gated)."""
    tie_embeddings: bool = True
    """The output head is the token embedding. The only supported setting."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the initial token embedding."""
    logit_softcap: float = 30.0
    """logits = softcap * tanh(raw / softcap)."""
    rope_base: float = 10000.0
    """RoPE base at lengths up to rope_train_seq_len; beyond it the base grows (NTK scaling)."""
    rope_dims: int = 16
    """Leading channels of each head that are rotated; 0 means all of them."""
    rope_train_seq_len: int = 1024
    """Length up to which RoPE keeps its base."""
    rope_bf16_tables: bool = False
    """Round the RoPE tables to bfloat16, as the original did (its frequencies too at short lengths)."""
    qk_gain_init: float = 1.5
    """Initial per-head gain on normalised queries."""
    bigram_vocab_size: int = 4096
    """Rows of the hash n-gram table; 0 removes it."""
    bigram_dim: int = 64
    """Width of the hash n-gram table."""
    trigram: bool = True
    """Add a trigram row from the same table."""
    pos_conditional: bool = True
    """Word starts and other tokens use separate halves of the hash table."""
    word_start_boost: bool = True
    """Learn a factor on the hash row where a word starts."""
    smear: bool = True
    """Mix each position's embedding with the one before it (SmearGate)."""
    xsa_last_n: int = 11
    """Exclusive self-attention in this many last blocks; 0 removes it."""
    ln_scale: bool = True
    """Scale the normalised input of block i by 1/sqrt(i+1)."""
    ve_enabled: bool = True
    """Add a value embedding of the token to the attention values of ve_layers."""
    ve_dim: int = 128
    """Width of the value-embedding table."""
    ve_layers: tuple[int, ...] = (7, 8, 9, 10)
    """Blocks that receive the value embedding."""
    frozen_skips: int = 2
    """The outermost U-Net skips that start at zero and get no gradient in training."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "model_dim",
            "num_heads",
            "num_kv_heads",
            "rope_train_seq_len",
        ):
            need(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        need(
            self.model_dim % self.num_heads == 0,
            f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads}",
        )
        need(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
        )
        need(
            0 <= self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0,
            f"model.rope_dims {self.rope_dims} must be even and between 0 and the head dim {self.head_dim}",
        )
        need(self.rope_dims > 0 or self.head_dim % 2 == 0, f"head dim {self.head_dim} must be even for RoPE")
        need(
            self.tie_embeddings,
            "model.tie_embeddings=False is not supported: the head is the token embedding",
        )
        need(
            self.mlp_hidden > 0,
            f"model.mlp_mult {self.mlp_mult} gives an empty MLP at width {self.model_dim}",
        )
        for name in ("bigram_vocab_size", "xsa_last_n", "frozen_skips"):
            need(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must not be negative")
        need(not self.bigram_vocab_size or self.bigram_dim > 0, "model.bigram_dim must be positive")
        need(not self.ve_enabled or self.ve_dim > 0, "model.ve_dim must be positive")
        need(
            len(set(self.ve_layers)) == len(self.ve_layers),
            f"model.ve_layers {self.ve_layers} repeats a block",
        )
        need(self.logit_softcap > 0, f"model.logit_softcap is {self.logit_softcap}; it must be positive")
        need(
            self.bigram_vocab_size == 0 or self.bigram_vocab_size >= 4,
            f"model.bigram_vocab_size is {self.bigram_vocab_size}; use 0 (off) or at least 4",
        )
        need(
            not (self.bigram_vocab_size == 0 and self.trigram),
            "model.trigram needs a hash table: set model.bigram_vocab_size above 0 or model.trigram to False",
        )
        bad = [i for i in self.ve_layers if not 0 <= i < self.num_layers] if self.ve_enabled else []
        need(not bad, f"model.ve_layers {bad} do not exist: the model has blocks 0 to {self.num_layers - 1}")
        need(
            0 <= self.frozen_skips <= self.num_skips,
            f"model.frozen_skips is {self.frozen_skips}; "
            f"a model of {self.num_layers} layers has {self.num_skips} skips",
        )

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_hidden(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def mlp_up_rows(self) -> int:
        return self.mlp_hidden * (2 if self.mlp_activation == "swiglu" else 1)

    @property
    def rotary_dims(self) -> int:
        return self.rope_dims or self.head_dim

    @property
    def num_skips(self) -> int:
        """U-Net joins: one per encoder block, as far as there are decoder blocks to take them."""
        return self.num_layers // 2

    def num_parameters(self) -> int:
        """Parameters of the network, counted without building it."""
        d, n = self.model_dim, self.num_layers
        banks = 2 * n * d * d + 2 * n * self.kv_dim * d + n * self.mlp_up_rows * d + n * d * self.mlp_hidden
        per_block = self.num_heads + 2 * d + 2 * d
        total = banks + self.vocab_size * d + d * self.smear + self.num_skips * d + n * per_block
        if self.bigram_vocab_size:
            total += self.bigram_vocab_size * self.bigram_dim + d * self.bigram_dim + 1
            total += self.word_start_boost
        if self.ve_enabled:
            total += self.vocab_size * self.ve_dim + self.kv_dim * self.ve_dim + 1 + len(self.ve_layers)
        return total
