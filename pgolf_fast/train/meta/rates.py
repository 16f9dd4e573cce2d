"""How far each slot of the banks goes in the inner step, learned (MetaSGD: Li et al. 2017, PR 1502)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT


class SlotRates(nn.Module):
    """A factor on the inner learning rate for every slot: four vectors named like the banks, 1 at first.

    The trainer owns them. They are in checkpoints and in metrics.jsonl, and no part of the model: neither its
    saved weights nor the artifact know them.
    """

    def __init__(self, model: GPT):
        super().__init__()
        for name, bank in zip(BANK_NAMES, model.bank_parameters(), strict=True):
            self.register_parameter(name, nn.Parameter(bank.new_ones(len(bank))))

    def scale(self, steps: list[Tensor]) -> list[Tensor]:
        """Each slot of these four (slots, rows, cols) times its rate."""
        return [step * rate[:, None, None] for step, rate in zip(steps, self.parameters(), strict=True)]

    @torch.no_grad()
    def receive(self, outer: list[Tensor], steps: list[Tensor], inner_lr: float) -> None:
        """Add the rates' gradient, from that of the banks `bank - inner_lr * rate * step`."""
        for rate, gradient, step in zip(self.parameters(), outer, steps, strict=True):
            slope = -inner_lr * (gradient * step).sum(dim=(1, 2))
            rate.grad = slope if rate.grad is None else rate.grad + slope

    def values(self) -> dict[str, list[float]]:
        """The rates by bank, one for each slot."""
        return {name: rate.tolist() for name, rate in self.named_parameters()}

    def summary(self) -> str:
        """One line: the range of each bank's rates, and their mean."""
        return "; ".join(
            f"{name} {min(rates):.3f} to {max(rates):.3f}, mean {sum(rates) / len(rates):.3f}"
            for name, rates in self.values().items()
        )
