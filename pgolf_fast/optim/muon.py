"""Muon over weight banks (Jordan et al. 2024): momentum, orthogonalisation of every slot at once, decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum
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
    def step(
        self,
        *,
        lr: float | Tensor,
        momentum: float | Tensor,
        shadows: dict[str, Tensor] | None = None,
    ) -> None:
        """One update from the banks' gradients, which are read and left as they are.

        Each rank orthogonalises its share of the slots; every rank ends with the same weights. `lr` and
        `momentum` may be tensors of one element, which a CUDA graph reads anew at every replay. `shadows`,
        by bank name, receive the new weights in their own dtype.
        """
        for name, bank in self.banks.items():
            if bank.grad is None:
                raise RuntimeError(f"Muon: {name} has no gradient; call backward first")
            update = muon_momentum(bank.grad, self.momentum_buffers[name], momentum)
            update = self.sharding.map_slots(update, lambda part: ops.newton_schulz(part, self.ns_steps))
            rows, cols = bank.shape[-2:]
            muon_apply(
                bank,
                update,
                lr,
                weight_decay=self.weight_decay,
                scale=math.sqrt(max(1.0, rows / cols)),
                shadow=None if shadows is None else shadows.get(name),
            )

    def state(self) -> dict[str, Tensor]:
        return {f"muon.{name}": buffer for name, buffer in self.momentum_buffers.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, buffer in self.state().items():
            buffer.copy_(state[name])
