"""Settings of meta-learning: training for weights that adapt well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgolf_fast.config.model import need


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """A step of meta-learning beside the ordinary one, on the last micro-batch (first order)."""

    method: Literal["fomaml", "cross_chunk", "sam"] = "fomaml"
    """fomaml: first halves of the sequences adapt, second halves judge (PR 1501); cross_chunk: the first half
    of the batch adapts, the rest judges (PR 1502); sam: fomaml whose inner gradient is taken at the sharpest
    nearby banks (PR 1601)."""
    every: int = 4
    """Optimiser steps between meta steps."""
    inner_lr: float = 0.002
    """Learning rate of the inner SGD step on the banks."""
    weight: float = 0.5
    """Weight of the outer loss."""
    dilute: bool = True
    """Divide the outer loss by the number of micro-batches, as the original did."""
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
        need(self.freeze_blocks >= 0, "train.meta.freeze_blocks must not be negative")
        need(self.delta_weight >= 0, "train.meta.delta_weight must not be negative")
        need(self.sam_radius > 0, f"train.meta.sam_radius is {self.sam_radius}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class ReptileConfig:
    """A last phase of training that moves chosen weights to where inner SGD leads (PR 296; Nichol 2018)."""

    share: float = 0.2
    """Share of the run, at its end, that the phase takes."""
    inner_steps: int = 3
    """SGD steps from the current weights, each on another segment."""
    inner_lr: float = 0.1
    """Their learning rate."""
    outer_lr: float = 0.01
    """How far the weights then go towards where the inner steps led."""
    batch_seqs: int = 1
    """Sequences of one inner step."""
    block_share: float = 0.25
    """The MLP matrices of this share of the blocks, the last ones, are what moves (at least one block)."""

    def __post_init__(self) -> None:
        need(0 < self.share < 1, f"train.reptile.share is {self.share}; it must be between 0 and 1")
        for name in ("inner_steps", "batch_seqs"):
            value = getattr(self, name)
            need(value > 0, f"train.reptile.{name} is {value}; it must be positive")
        for name in ("inner_lr", "outer_lr"):
            need(getattr(self, name) >= 0, f"train.reptile.{name} must not be negative")
        need(
            0 < self.block_share <= 1,
            f"train.reptile.block_share is {self.block_share}; it must be above 0 and at most 1",
        )
