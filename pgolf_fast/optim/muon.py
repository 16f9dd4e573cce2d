"""Muon over weight banks (Jordan et al. 2024): momentum, orthogonalisation of every slot at once, decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.optim.sharding import Sharding


class Muon:
    """Nesterov momentum and Newton-Schulz in bfloat16, decoupled weight decay, fp32 masters (PR 1501)."""

    def __init__(
        self,
        banks: dict[str, nn.Parameter],
        *,
        weight_decay: float,
        newton_schulz_steps: int,
        sharding: Sharding | None = None,
    ):
        self.banks, self.weight_decay, self.ns_steps = banks, weight_decay, newton_schulz_steps
        self.sharding = sharding or Sharding()
        self.momentum_buffers = {
            name: torch.zeros_like(bank, dtype=torch.bfloat16) for name, bank in banks.items()
        }

    @torch.no_grad()
    def step(self, *, lr: float, momentum: float) -> None:
        """One update from the banks' gradients, which are read and left as they are.

        Each rank orthogonalises its share of the slots; every rank ends with the same weights.
        """
        for name, bank in self.banks.items():
            if bank.grad is None:
                raise RuntimeError(f"Muon: {name} has no gradient; call backward first")
            grad = bank.grad.bfloat16()
            buffer = self.momentum_buffers[name]
            buffer.mul_(momentum).add_(grad)
            update = grad.add_(buffer, alpha=momentum)
            update = self.sharding.map_slots(update, lambda part: ops.newton_schulz(part, self.ns_steps))
            rows, cols = bank.shape[-2:]
            bank.mul_(1 - lr * self.weight_decay)
            bank.add_(update.to(bank.dtype), alpha=-lr * math.sqrt(max(1.0, rows / cols)))

    def state(self) -> dict[str, Tensor]:
        return {f"muon.{name}": buffer for name, buffer in self.momentum_buffers.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, buffer in self.state().items():
            buffer.copy_(state[name])
