"""Settings of test-time training, which adapts the model to tokens it has scored."""

from dataclasses import dataclass, field, replace
from typing import Literal

from pgolf_fast.config import checks


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of every matrix (Hu et al. 2021), reset at each document, trained by AdamW."""

    rank: int = 8
    """Rank of the update of each Q, K, V, output, MLP and head matrix."""
    lr: float = 0.005
    """AdamW learning rate, constant."""
    segment_tokens: int = 256
    """Tokens of a document that are scored before each update."""
    epochs: int = 2
    """AdamW steps on each scored segment."""
    documents: int = 16
    """Documents in a batch; documents of similar length are batched together."""

    def __post_init__(self) -> None:
        checks.need_positive("ttt.lora", self, "rank", "segment_tokens", "documents")
        checks.need_not_negative("ttt.lora", self, "epochs", "lr")


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Low-rank updates of the last blocks' MLPs, trained on the hardest windows (PR 296).

    A first pass finds these windows and a second one scores them again: that breaks the rules.
    """

    share: float = 0.02
    """Share of all windows, those with the highest mean loss, that are trained on (at least one window)."""
    window_tokens: int = 1024
    """Tokens in a window of the first pass; windows do not overlap."""
    rank: int = 4
    """Rank of the update of each matrix."""
    block_share: float = 0.28
    """Share of the blocks, counted from the last, whose MLPs are trained (at least one block; 3 of 11)."""
    lr: float = 0.001
    """Adam learning rate, constant."""
    epochs: int = 3
    """Passes over the hardest windows, one window per step."""

    def __post_init__(self) -> None:
        checks.need_share("ttt.guided", self, "share", "block_share")
        checks.need_positive("ttt.guided", self, "window_tokens", "rank", "epochs")
        checks.need_not_negative("ttt.guided", self, "lr")

    def blocks(self, layers: int) -> int:
        """Return the number of trained blocks of a model with that many layers."""
        return checks.share_of(self.block_share, layers)

    def hard_windows(self, windows: int) -> int:
        """Return how many of `windows` windows are trained on."""
        return checks.share_of(self.share, windows)


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """Test-time training: score a chunk, then train on it (PR 1501). Legal, except for error_guided."""

    adapter: Literal["sgd", "adamw", "lora", "phased", "error_guided"] = "sgd"
    """sgd and adamw train the model's parameters; lora trains a low-rank update per document; phased does
    both, lora within chunks of whole documents and AdamW after each. error_guided trains before it scores:
    it breaks the rules and needs --allow-illegal."""
    chunk_tokens: int = 65_536
    """Tokens scored before each update; phased rounds up to whole documents."""
    epochs: int = 4
    """Passes over the scored chunk; 0 scores without adapting."""
    lr: float = 0.004
    """Learning rate of the first chunk."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate of later chunks: cosine falls to zero at the last chunk."""
    momentum: float = 0.9
    """SGD momentum, kept across chunks, or AdamW's beta1."""
    beta2: float = 0.99
    """AdamW's beta2."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    batch_seqs: int = 16
    """Sequences in one optimizer step."""
    grad_clip: float | None = 1.0
    """Limit on the global gradient norm, for lora per document; None disables clipping."""
    parameters: Literal["all", "banks", "blocks", "mlps"] = "banks"
    """Adapted parameters. banks: only the banks. all: everything but the scalars of the first freeze_blocks
    blocks (as PR 1501 ran). blocks: matrices and scalars of the later blocks, and skips (PR 301). mlps: only
    the MLP matrices of the later blocks (PR 296)."""
    freeze_blocks: int = 2
    """Number of leading blocks left unadapted; `parameters` says which part of them. No effect with banks."""
    quantize_forward: Literal["none", "banks", "projections"] = "banks"
    """What to fake-quantize. banks: when scoring and adapting; projections: only when adapting (as PR 1501
    ran)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank updates for lora and phased."""
    guided: GuidedConfig = field(default_factory=GuidedConfig)
    """Low-rank updates for error_guided."""

    def __post_init__(self) -> None:
        checks.need_positive("ttt", self, "chunk_tokens", "batch_seqs", "grad_clip")
        checks.need_not_negative("ttt", self, "epochs", "lr", "weight_decay", "freeze_blocks")
        checks.need_decay("ttt", self, "momentum", "beta2")

    @property
    def frozen_slots(self) -> int:
        """Number of leading blocks whose matrices are not adapted either."""
        return self.freeze_blocks if self.parameters in ("blocks", "mlps") else 0

    @property
    def illegal(self) -> str | None:
        """Why the resulting score breaks the challenge's rules, or None if it does not."""
        reason = "it learns from targets before it scores them (score before train, C3)"
        return reason if self.adapter == "error_guided" else None

    @property
    def by_document(self) -> bool:
        """True if documents are scored as a batch, each with its own update."""
        return self.adapter in ("lora", "phased")


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
