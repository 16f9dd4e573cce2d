"""Settings of meta-learning: training for weights that adapt well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgolf_fast.config.model import blocks_of, need


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """A first-order step of meta-learning beside the ordinary one, on the last micro-batch (docs/meta.md)."""

    method: Literal["fomaml", "cross_chunk", "sam"] = "fomaml"
    """fomaml: first halves of the sequences adapt, second halves judge (PR 1501); cross_chunk: the first half
    of the batch adapts, the rest judges (PR 1502); sam: the same, and the inner gradient is taken at the
    sharpest nearby banks (PR 1601). A batch of one sequence is always split as by fomaml."""
    every: int = 4
    """Optimiser steps between meta steps."""
    inner_lr: float = 0.002
    """Learning rate of the inner SGD step on the banks."""
    weight: float = 0.5
    """Weight of the loss after the inner step."""
    dilute: bool = True
    """Divide the objective by the number of micro-batches, as the originals did; False gives it the stated
    weight."""
    freeze_blocks: int = 2
    """First blocks whose banks the inner step leaves alone."""
    above: float = 0.5
    """Only while the learning-rate multiplier is above this."""
    delta_weight: float = 0.0
    """Also reward what the inner step gains: adds this times (loss after it - loss before it) (PR 1502)."""
    slot_rates: bool = False
    """Learn a factor on inner_lr for every bank slot (MetaSGD, PR 1502); not part of the artifact."""
    sam_radius: float = 0.05
    """Length of sam's way uphill, over all banks."""

    def __post_init__(self) -> None:
        need(self.every > 0, f"train.meta.every is {self.every}; it must be positive")
        for name in ("inner_lr", "weight", "freeze_blocks", "delta_weight"):
            value = getattr(self, name)
            need(value >= 0, f"train.meta.{name} is {value}; it must not be negative")
        need(self.sam_radius > 0, f"train.meta.sam_radius is {self.sam_radius}; it must be positive")
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
    """A last phase of training that moves chosen weights to where inner SGD leads (PR 296; Nichol 2018)."""

    share: float = 0.2
    """Share of the run, at its end, that the phase takes, in what train.schedule is measured in. The
    learning-rate schedule ends where it begins."""
    inner_steps: int = 3
    """SGD steps from the current weights, each on another segment."""
    inner_lr: float = 0.1
    """Their learning rate."""
    outer_lr: float = 0.01
    """How far the weights then go towards where the inner steps led."""
    batch_seqs: int = 1
    """Sequences of one inner step, of train.seq_len tokens."""
    block_share: float = 0.25
    """The MLP matrices of this share of the blocks, the last ones, are what moves (at least one block)."""

    def __post_init__(self) -> None:
        need(0 < self.share < 1, f"train.reptile.share is {self.share}; it must be between 0 and 1")
        for name in ("inner_steps", "batch_seqs"):
            value = getattr(self, name)
            need(value > 0, f"train.reptile.{name} is {value}; it must be positive")
        for name in ("inner_lr", "outer_lr"):
            value = getattr(self, name)
            need(value >= 0, f"train.reptile.{name} is {value}; it must not be negative")
        need(
            0 < self.block_share <= 1,
            f"train.reptile.block_share is {self.block_share}; it must be above 0 and at most 1",
        )

    def blocks(self, layers: int) -> int:
        """How many of that many blocks move."""
        return blocks_of(self.block_share, layers)

    def steps(self, steps: int) -> int:
        """How many of that many steps are the phase's, in a schedule measured in steps."""
        return round(self.share * steps)
