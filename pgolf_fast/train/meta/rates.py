"""Learned inner learning rates, one for each bank slot (MetaSGD: Li et al. 2017, PR 1502)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT


class SlotRates(nn.Module):
    """A factor on the inner learning rate for every slot: four vectors named like the banks, initially 1.

    They belong to the trainer: checkpoints and metrics.jsonl have them, saved weights and artifact do not.
    """

    def __init__(self, model: GPT):
        super().__init__()
        for name, bank in zip(BANK_NAMES, model.bank_parameters(), strict=True):
            self.register_parameter(name, nn.Parameter(bank.new_ones(len(bank))))

    def scale(self, steps: list[Tensor]) -> list[Tensor]:
        """Multiply each slot of these four (slots, rows, cols) by its rate."""
        return [step * rate[:, None, None] for step, rate in zip(steps, self.parameters(), strict=True)]

    @torch.no_grad()
    def receive(self, outer: list[Tensor], steps: list[Tensor], inner_lr: float) -> None:
        """Add the rates' gradient, given `outer`, that of the banks `bank - inner_lr * rate * step`."""
        for rate, gradient, step in zip(self.parameters(), outer, steps, strict=True):
            added = -inner_lr * (gradient * step).sum(dim=(1, 2))  # the chain rule
            rate.grad = added if rate.grad is None else rate.grad + added

    def values(self) -> dict[str, list[float]]:
        """Return the rates by bank, one for each slot."""
        return {name: rate.tolist() for name, rate in self.named_parameters()}

    def summary(self) -> str:
        """Return one line with the range and mean of each bank's rates."""
        return "; ".join(
            f"{name} {min(rates):.3f} to {max(rates):.3f}, mean {sum(rates) / len(rates):.3f}"
            for name, rates in self.values().items()
        )
