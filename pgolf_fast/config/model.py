"""Settings of the network."""

from dataclasses import dataclass
from typing import Literal

from pgolf_fast.config.checks import need, need_multiple, need_not_negative, need_positive

Activation = Literal["leaky_relu_squared", "relu_squared", "swiglu"]
HeadGate = Literal["sparse", "dense", "output", "output_q"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network (PR 1501). Field names are those of the golden vectors."""

    vocab_size: int = 1024
    """Number of token ids, equal to the tokenizer's."""
    num_layers: int = 11
    """Number of transformer blocks; the first half of their visits are U-Net encoders."""
    num_loops: int = 0
    """Extra passes over blocks loop_start to loop_end, with the same weights (PR 1394)."""
    loop_start: int = 3
    """First block of the loop."""
    loop_end: int = 5
    """Last block of the loop."""
    lanes_from: int | None = None
    """First block with two residual lanes, of attention and of the MLP (PR 1529); None is off."""
    lanes_end: Literal["mean", "attention", "mlp"] = "mean"
    """What leaves the last block with two lanes: their mean, or one of them."""
    model_dim: int = 512
    """Width of the residual stream."""
    num_heads: int = 8
    """Number of query heads."""
    num_kv_heads: int = 4
    """Number of key/value heads; each serves num_heads / num_kv_heads query heads."""
    mlp_mult: float = 3.0
    """MLP hidden width as a multiple of model_dim. A gated MLP has two up rows per hidden channel."""
    mlp_activation: Activation = "leaky_relu_squared"
    """Activation of the MLP: leaky_relu_squared has slope 0.5, swiglu is gated."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head. True is the only supported setting."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the initial token embedding."""
    logit_softcap: float = 30.0
    """Bound on the logits: softcap * tanh(raw / softcap)."""
    rope_base: float = 10000.0
    """RoPE base for sequences of up to rope_train_seq_len tokens; it grows for longer ones (NTK scaling)."""
    rope_dims: int = 16
    """Number of leading channels of each head that RoPE rotates; 0 rotates all."""
    rope_train_seq_len: int = 1024
    """Sequence length in tokens up to which RoPE keeps its base."""
    rope_bf16_frequencies: bool = False
    """Round only the RoPE frequencies to bfloat16, as PR 1855 did at every length."""
    rope_bf16_tables: bool = False
    """Round RoPE tables to bfloat16 as the original did (at short lengths, the frequencies too)."""
    qk_gain_init: float = 1.5
    """Initial per-head gain on normalized queries."""
    first_attn_scale: float = 0.1
    """Initial scale of the attention output of block 0; that of the others is 1."""
    head_gate: HeadGate | None = None
    """Learned gate on each head's output: sparse (PR 1855) and output (PR 1667) read gate_window channels of
    the block's input, output_q of the query projection, dense (PR 1736) reads all; None is off."""
    gate_window: int = 12
    """Leading channels that gates of heads and the gated SmearGate read."""
    gate_scale: float = 0.5
    """Factor inside the sigmoid of the sparse head gate."""
    bigram_vocab_size: int = 4096
    """Number of rows of the hash n-gram table; 0 removes it."""
    bigram_dim: int = 64
    """Number of columns of the hash n-gram table."""
    trigram: bool = True
    """Also look up a trigram in the hash table."""
    pos_conditional: bool = True
    """Use separate halves of the hash table for word starts and other tokens."""
    word_start_boost: bool = True
    """Learn a multiplier for the hash embedding of word starts."""
    smear: bool = True
    """Mix each position's embedding with the one before it (SmearGate)."""
    smear_form: Literal["convex", "gated"] = "convex"
    """SmearGate: convex mixes by channel (PR 1501); gated adds a share that the token decides, and nothing at
    the start of a document (PR 1855)."""
    bos_id: int = 1
    """Token that begins a document, for the gated SmearGate and train.max_document."""
    xsa_last_n: int = 11
    """Number of trailing blocks with exclusive self-attention; 0 removes it."""
    ln_scale: bool = True
    """Scale the normalized input of block i by 1/sqrt(i+1)."""
    ve_enabled: bool = True
    """Add a value embedding of the token to the attention values in ve_layers."""
    ve_dim: int = 128
    """Number of columns of the value-embedding table."""
    ve_layers: tuple[int, ...] = (7, 8, 9, 10)
    """Blocks that receive the value embedding."""
    frozen_skips: int = 2
    """Number of outermost U-Net skips that start at zero and are not trained."""
    skip_gates: bool = False
    """Learn how much of a decoder's input each U-Net skip replaces, by channel, instead of adding it."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "rope_train_seq_len")
        need_positive("model", self, *sizes, "logit_softcap")
        need_not_negative("model", self, "bigram_vocab_size", "xsa_last_n", "frozen_skips", "num_loops")
        if self.bigram_vocab_size:
            need_positive("model", self, "bigram_dim")
        if self.ve_enabled:
            need_positive("model", self, "ve_dim")
        need_multiple("model", self, "model_dim", "num_heads")
        need_multiple("model", self, "num_heads", "num_kv_heads")
        fits = 0 <= self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0
        range_ = f"must be even and between 0 and the head dim {self.head_dim}"
        need(fits, f"model.rope_dims {self.rope_dims} {range_}")
        need(self.rope_dims > 0 or self.head_dim % 2 == 0, f"head dim {self.head_dim} must be even for RoPE")
        untied = "model.tie_embeddings=False is not supported: the head is the token embedding"
        need(self.tie_embeddings, untied)
        empty = f"model.mlp_mult {self.mlp_mult} makes the MLP empty at width {self.model_dim}"
        need(self.mlp_hidden > 0, empty)
        repeats = len({*self.ve_layers}) < len(self.ve_layers)
        need(not repeats, f"model.ve_layers {self.ve_layers} repeats a block")
        rows = self.bigram_vocab_size
        need(rows == 0 or rows >= 4, f"model.bigram_vocab_size is {rows}; use 0 (off) or at least 4")
        hint = "set model.bigram_vocab_size above 0 or model.trigram to False"
        need(rows > 0 or not self.trigram, f"model.trigram needs a hash table: {hint}")
        bad = [i for i in self.ve_layers if not 0 <= i < self.num_layers] if self.ve_enabled else []
        need(not bad, f"model.ve_layers {bad} do not exist: the model has blocks 0 to {self.num_layers - 1}")
        skips = f"a model of {self.num_layers} layers has {self.num_skips} skips"
        need(self.frozen_skips <= self.num_skips, f"model.frozen_skips is {self.frozen_skips}; {skips}")
        self._check_plan()
        window = f"model.gate_window is {self.gate_window}; it must be 1 to model.model_dim {self.model_dim}"
        need(1 <= self.gate_window <= self.model_dim or not self.reads_gate_window, window)
        bos = f"model.bos_id {self.bos_id} is not a token: model.vocab_size is {self.vocab_size}"
        need(0 <= self.bos_id < self.vocab_size, bos)

    def _check_plan(self) -> None:
        """Raise PgolfError for loops and lanes that no visit plan has."""
        n, first, last = self.num_layers, self.loop_start, self.loop_end
        loop = f"model.loop_start {first} to model.loop_end {last} is no range of blocks 0 to {n - 1}"
        need(not self.num_loops or 0 <= first <= last < n, f"{loop}: change them or model.num_loops")
        if self.lanes_from is None:
            return
        lanes = f"model.lanes_from is {self.lanes_from}; lanes begin"
        need(n // 2 <= self.lanes_from < n, f"{lanes} in the second half, at block {n // 2} to {n - 1}")
        after = f"{lanes} after the loop, which ends at block {last}"
        need(not self.num_loops or self.lanes_from > last, f"{after}: raise it or lower model.loop_end")

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
        """U-Net skips: one per encoder visit, which has a decoder visit to join."""
        return self.num_visits // 2

    @property
    def num_visits(self) -> int:
        """Blocks that a forward runs, with those of the loop counted at each pass."""
        return self.num_layers + self.num_loops * (self.loop_end - self.loop_start + 1)

    @property
    def smear_gated(self) -> bool:
        return self.smear and self.smear_form == "gated"

    @property
    def reads_gate_window(self) -> bool:
        return self.smear_gated or self.head_gate not in (None, "dense")

    @property
    def head_gate_width(self) -> int:
        """Channels that a head's gate reads; 0 without gates."""
        return (
            0 if self.head_gate is None else self.model_dim if self.head_gate == "dense" else self.gate_window
        )

    def num_parameters(self) -> int:
        """Return the number of parameters, without building the network."""
        d, n = self.model_dim, self.num_layers
        banks = 2 * n * d * d + 2 * n * self.kv_dim * d + n * self.mlp_up_rows * d + n * d * self.mlp_hidden
        # QK gains and gates of heads; attention and MLP scales; residual mix
        per_block = self.num_heads * (1 + self.head_gate_width) + 2 * d + 2 * d
        total = banks + self.vocab_size * d + self.num_skips * d * (1 + self.skip_gates) + n * per_block
        total += self.gate_window + 1 if self.smear_gated else d * self.smear
        total += 6 * n if self.lanes_from is not None else 0  # four post and two residual lambdas
        if self.bigram_vocab_size:  # table, projection, scale
            total += self.bigram_vocab_size * self.bigram_dim + d * self.bigram_dim + 1
            total += self.word_start_boost
        if self.ve_enabled:  # table, projection, scale, a scale per layer
            total += self.vocab_size * self.ve_dim + self.kv_dim * self.ve_dim + 1 + len(self.ve_layers)
        return total
