"""Muon over weight banks (Jordan et al. 2024): momentum, orthogonalization of all slots at once, decay."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.model.weights import Tensors
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum

Parameters = dict[str, nn.Parameter]
Number = float | Tensor


class Muon:
    """Nesterov momentum and Newton-Schulz in bfloat16, decoupled weight decay, float32 masters (PR 1501).

    `coefficients` are those of `ops.newton_schulz`. With `row_norm`, every row of the momentum is divided by
    its norm first (MuonEq-R, PR 1394). Gradients are averaged over ranks and every rank holds all momentum;
    only Newton-Schulz is split.
    """

    def __init__(
        self,
        banks: Parameters,
        *,
        weight_decay: float,
        newton_schulz_steps: int,
        coefficients: Sequence[float] | None = None,
        row_norm: bool = False,
        world: World = SINGLE,
    ):
        self.banks, self.world, self.row_norm = banks, world, row_norm
        self.weight_decay, self.ns_steps, self.coefficients = weight_decay, newton_schulz_steps, coefficients
        self.momentum_buffers = {n: torch.zeros_like(b, dtype=torch.bfloat16) for n, b in banks.items()}

    @torch.no_grad()
    def step(self, *, lr: Number, momentum: Number, shadows: dict[str, Tensor] | None = None) -> None:
        """Update the banks from their gradients, which are not changed. All ranks end with the same weights.

        `lr` and `momentum` may be tensors of one element, which a CUDA graph reads anew at every replay. The
        new weights are also written to `shadows`, by bank name, in their own dtype.
        """
        for name, bank in self.banks.items():
            if bank.grad is None:
                raise RuntimeError(f"Muon: {name} has no gradient; call backward first")
            update = muon_momentum(bank.grad, self.momentum_buffers[name], momentum)
            update = map_slots(update, self.orthogonalize, self.world)
            rows, cols = bank.shape[-2:]
            scale = math.sqrt(max(1.0, rows / cols))  # as Jordan et al. scale tall matrices
            shadow = None if shadows is None else shadows.get(name)
            muon_apply(bank, update, lr, weight_decay=self.weight_decay, scale=scale, shadow=shadow)

    def orthogonalize(self, part: Tensor) -> Tensor:
        """Return the update's direction of some slots (slots, rows, cols), before its rate."""
        rows = F.normalize(part, dim=-1, eps=1e-7) if self.row_norm else part
        return ops.newton_schulz(rows, self.ns_steps, self.coefficients)

    def state(self) -> dict[str, Tensor]:
        """Return the momentum buffers by name."""
        return {f"muon.{name}": buffer for name, buffer in self.momentum_buffers.items()}

    def load_state(self, state: Tensors) -> None:
        """Invert `state`."""
        for name, buffer in self.state().items():
            buffer.copy_(state[name])


def map_slots(stack: Tensor, function: Callable[[Tensor], Tensor], world: World) -> Tensor:
    """Apply `function` to a (slots, rows, cols) stack, each rank to its share, and gather the results."""
    if world.world_size == 1:
        return function(stack)
    share = -(-stack.shape[0] // world.world_size)
    padded = stack.new_zeros(share * world.world_size, *stack.shape[1:])  # all_gather needs equal shares
    mine = function(stack[world.rank * share : (world.rank + 1) * share].contiguous())
    part = stack.new_zeros(share, *stack.shape[1:])
    part[: mine.shape[0]] = mine
    dist.all_gather(list(padded.split(share)), part)
    return padded[: stack.shape[0]]
