"""Settings of meta-learning, which trains for weights that adapt well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgolf_fast.config.checks import blocks_of, need, need_not_negative, need_positive, need_share


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """An extra first-order meta-learning step on the last micro-batch (docs/meta.md)."""

    method: Literal["fomaml", "cross_chunk", "sam"] = "fomaml"
    """Split into inner and outer half: fomaml splits each sequence in time (PR 1501), cross_chunk the batch
    (PR 1502); sam is cross_chunk with the inner gradient of sharpness-aware minimization (PR 1601)."""
    every: int = 4
    """Optimizer steps between meta steps."""
    inner_lr: float = 0.002
    """Learning rate of the inner SGD step on the banks."""
    weight: float = 0.5
    """Weight of the loss after the inner step in the objective."""
    dilute: bool = True
    """Divide the objective by the number of micro-batches, as the originals did."""
    freeze_blocks: int = 2
    """Number of first blocks that the inner step does not change."""
    above: float = 0.5
    """Learning-rate multiplier at or below which meta steps stop."""
    delta_weight: float = 0.0
    """Weight of (loss after the inner step - loss before it) in the objective (PR 1502)."""
    slot_rates: bool = False
    """Learn a factor on inner_lr for every bank slot (MetaSGD, PR 1502)."""
    sam_radius: float = 0.05
    """Norm of SAM's ascent step over all banks."""

    def __post_init__(self) -> None:
        need_positive("train.meta", self, "every", "sam_radius")
        need_not_negative("train.meta", self, "inner_lr", "weight", "freeze_blocks", "delta_weight")
        need(
            self.weight + self.delta_weight > 0,
            "train.meta.weight and train.meta.delta_weight are both 0, so a meta step would change nothing: "
            "raise one, or pass --train.meta none",
        )
        for name in ("delta_weight", "slot_rates"):
            need(
                self.inner_lr > 0 or not getattr(self, name),
                f"train.meta.inner_lr is 0, so nothing adapts: train.meta.{name} needs it positive",
            )


@dataclass(frozen=True, kw_only=True)
class ReptileConfig:
    """A last phase of training that interpolates MLP weights towards inner SGD (PR 296; Nichol 2018)."""

    share: float = 0.2
    """Share of the run, at its end, that the phase takes, in steps or time as train.schedule. The
    learning-rate decay ends where it begins."""
    inner_steps: int = 3
    """Inner SGD steps of an outer step, each on its own segment."""
    inner_lr: float = 0.1
    """Learning rate of the inner steps."""
    outer_lr: float = 0.01
    """Interpolation factor towards the result of the inner steps."""
    batch_seqs: int = 1
    """Sequences of train.seq_len tokens in one inner step."""
    block_share: float = 0.25
    """Share of the blocks, the last ones, whose MLP is trained (at least one block)."""

    def __post_init__(self) -> None:
        need(0 < self.share < 1, f"train.reptile.share is {self.share}; it must be between 0 and 1")
        need_positive("train.reptile", self, "inner_steps", "batch_seqs")
        need_not_negative("train.reptile", self, "inner_lr", "outer_lr")
        need_share("train.reptile", self, "block_share")

    def blocks(self, layers: int) -> int:
        """Return the number of trained blocks of a model with that many layers."""
        return blocks_of(self.block_share, layers)

    def steps(self, steps: int) -> int:
        """Return the number of steps that the phase takes of a run of `steps`."""
        return round(self.share * steps)
