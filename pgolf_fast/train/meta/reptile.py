"""Reptile, the last phase of a run: weights go towards where plain SGD leads (Nichol et al. 2018, PR 296).

The phase starts from the averaged weights and what it leaves are the run's final weights: no average is taken
in it. A step of the phase is an outer step: a few inner SGD steps, each on the next segment of the training
stream, then a little of the way they went. Only the MLP matrices of the last blocks move. Under several ranks
each goes a way of its own, on other segments, and all take the mean. Quantisation-aware training stays on if
it was on: the inner steps then read rounded weights, and gradients pass straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.config.meta import ReptileConfig
from pgolf_fast.model.bank import transformed
from pgolf_fast.model.gpt import GPT

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """Where inner steps led: the moving slots of the up and down banks; mean loss and gradient norm, ()."""

    ends: list[Tensor]
    loss: Tensor
    grad_norm: Tensor


class Reptile:
    """Moves the MLP matrices of a model's last blocks."""

    def __init__(self, model: GPT, config: ReptileConfig):
        self.model, self.config = model, config
        layers = model.config.num_layers
        self.first = layers - config.blocks(layers)
        """The first block that moves."""

    def banks(self) -> list[nn.Parameter]:
        """The banks of which slots move."""
        return [self.model.mlp_up_bank, self.model.mlp_down_bank]

    def adapt(self, batches: Iterable[tuple[Tensor, Tensor]], rounding: Rounding | None) -> Way:
        """One SGD step for each batch of (tokens, targets), (B, T), from the weights as they are, which stay.

        `rounding` is what forward does to the banks: fake quantisation, or None.
        """
        ends = [bank.detach()[self.first :].clone() for bank in self.banks()]
        gradients = [torch.zeros_like(end) for end in ends]
        losses, norms = [], []
        for tokens, targets in batches:
            torch._foreach_zero_(gradients)
            losses.append(self._add_gradients(tokens, targets, ends, gradients, rounding))
            norms.append(nn.utils.get_total_norm(gradients))
            torch._foreach_add_(ends, gradients, alpha=-self.config.inner_lr)
        return Way(ends, torch.stack(losses).double().mean(), torch.stack(norms).double().mean())

    def _add_gradients(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: list[Tensor],
        gradients: list[Tensor],
        rounding: Rounding | None,
    ) -> Tensor:
        """The loss with these weights for the moving ones, whose gradients are added; all else gets none."""
        model = self.model
        with torch.no_grad():
            banks = model.banks(rounding)
            moving = [w.to(model.compute_dtype) for w in transformed(weights, rounding)]
        up, down = (w.detach().requires_grad_() for w in moving)

        def mlp(layer: int, x: Tensor) -> Tensor:
            activation = model.config.mlp_activation
            if layer < self.first:
                return ops.mlp(x, banks.up, banks.down, layer, activation)
            slot, (grad_up, grad_down) = layer - self.first, gradients
            return ops.mlp(x, up, down, slot, activation, grad_up=grad_up, grad_down=grad_down)

        loss = model.token_losses(tokens, targets, banks, mlp=mlp).mean()
        torch.autograd.backward(loss, inputs=[up, down])
        return loss.detach()

    @torch.no_grad()
    def move(self, ends: list[Tensor]) -> None:
        """The outer step: `weights += outer_lr * (ends - weights)`."""
        for bank, end in zip(self.banks(), ends, strict=True):
            bank[self.first :].lerp_(end, self.config.outer_lr)
