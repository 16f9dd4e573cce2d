"""Settings of test-time training: what is learned from scored tokens, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pgolf_fast.config.model import blocks_of, need


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank changes of every matrix, for each document anew (Hu et al. 2021), learned by AdamW."""

    rank: int = 8
    """Rank of the change of each Q, K, V, output, MLP and head matrix."""
    lr: float = 0.005
    """AdamW learning rate, constant."""
    segment_tokens: int = 256
    """Tokens of a document that are scored before each adaptation on them."""
    epochs: int = 2
    """AdamW steps on each scored segment."""
    documents: int = 16
    """Documents adapted side by side, in step, those of similar length together."""

    def __post_init__(self) -> None:
        for name in ("rank", "segment_tokens", "documents"):
            need(getattr(self, name) > 0, f"ttt.lora.{name} is {getattr(self, name)}; it must be positive")
        need(self.epochs >= 0 and self.lr >= 0, "ttt.lora.epochs and ttt.lora.lr must not be negative")


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Low-rank changes of the last blocks' MLPs, learned from the hardest windows (PR 296).

    A first pass finds these windows, and a second one scores them: that breaks the rules.
    """

    share: float = 0.02
    """Share of all windows that is learned from, those of the highest mean loss (at least one window)."""
    window_tokens: int = 1024
    """Tokens of a window of the first pass; windows do not overlap."""
    rank: int = 4
    """Rank of the change of each matrix."""
    block_share: float = 0.28
    """The MLPs of this share of the blocks, the last ones, change (at least one): of 11 blocks, 3."""
    lr: float = 0.001
    """Adam learning rate, constant."""
    epochs: int = 3
    """Passes over the hardest windows, one window a step."""

    def __post_init__(self) -> None:
        for name in ("share", "block_share"):
            value = getattr(self, name)
            need(0 < value <= 1, f"ttt.guided.{name} is {value}; it must be above 0 and at most 1")
        for name in ("window_tokens", "rank", "epochs"):
            value = getattr(self, name)
            need(value > 0, f"ttt.guided.{name} is {value}; it must be positive")
        need(self.lr >= 0, f"ttt.guided.lr is {self.lr}; it must not be negative")

    def blocks(self, layers: int) -> int:
        """How many of that many blocks change."""
        return blocks_of(self.block_share, layers)

    def lessons(self, windows: int) -> int:
        """How many of that many windows are learned from."""
        return max(1, int(self.share * windows + 1e-9))


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """Test-time training: score a chunk, then learn from it (PR 1501). Legal, with one exception."""

    adapter: Literal["sgd", "adamw", "lora", "phased", "error_guided"] = "sgd"
    """sgd and adamw learn the model's own parameters; lora a low-rank change for each document alone; phased
    does both: lora within chunks of whole documents, AdamW after each. error_guided learns before it scores:
    it breaks the rules, and runs with --allow-illegal only."""
    chunk_tokens: int = 65_536
    """Tokens scored before each adaptation; for phased, the next whole number of documents."""
    epochs: int = 4
    """Passes over the scored chunk; 0 scores without adapting."""
    lr: float = 0.004
    """Learning rate of the first chunk."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate of later chunks: a half cosine to zero at the last, or the same."""
    momentum: float = 0.9
    """SGD momentum, kept across chunks; AdamW's first moment decay."""
    beta2: float = 0.99
    """AdamW's second moment decay."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    batch_seqs: int = 16
    """Sequences of one step."""
    grad_clip: float | None = 1.0
    """Global gradient-norm limit over the adapted parameters; for lora, over each document's. None is off."""
    parameters: Literal["all", "banks", "blocks", "mlps"] = "banks"
    """What is adapted: the banks; all, but for the first freeze_blocks blocks' own scalars (as PR 1501 ran);
    matrices and scalars of the blocks after those, and the skips (PR 301); only those blocks' MLP matrices
    (PR 296)."""
    freeze_blocks: int = 2
    """First blocks that are left alone; by all only their scalars, by banks nothing."""
    quantize_forward: Literal["none", "banks", "projections"] = "banks"
    """Fake-quantise the banks in scoring and adapting; or, adapting only, the projections (as run)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The low-rank changes of lora and phased."""
    guided: GuidedConfig = field(default_factory=GuidedConfig)
    """Those of error_guided."""

    def __post_init__(self) -> None:
        need(
            self.chunk_tokens > 0 and self.batch_seqs > 0,
            "ttt.chunk_tokens and ttt.batch_seqs must be positive",
        )
        need(self.epochs >= 0, "ttt.epochs must not be negative")
        need(self.lr >= 0 and self.weight_decay >= 0, "ttt.lr and ttt.weight_decay must not be negative")
        for name in ("momentum", "beta2"):
            value = getattr(self, name)
            need(0 <= value < 1, f"ttt.{name} is {value}; it must be in [0, 1)")
        need(self.grad_clip is None or self.grad_clip > 0, "ttt.grad_clip must be positive, or None for off")
        need(self.freeze_blocks >= 0, f"ttt.freeze_blocks is {self.freeze_blocks}; it must not be negative")

    @property
    def frozen_slots(self) -> int:
        """First blocks whose matrices, too, are left alone."""
        return self.freeze_blocks if self.parameters in ("blocks", "mlps") else 0

    @property
    def illegal(self) -> str | None:
        """Why the score that comes of it breaks the challenge's rules; None if it does not."""
        if self.adapter != "error_guided":
            return None
        return "it learns from targets before it scores them (score before train, C3)"

    @property
    def by_document(self) -> bool:
        """Whether documents are scored in step, each with a change of its own."""
        return self.adapter in ("lora", "phased")
