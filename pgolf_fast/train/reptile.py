"""Reptile, the last phase of a run: interpolate toward the result of SGD (Nichol et al. 2018, PR 296).

The phase starts from the averaged weights, and its result is the final weights: no averages are updated.
An outer step makes a few inner SGD steps, each on the next segment of the training stream, then interpolates
toward their result. Only the MLP matrices of the last blocks are trained. Each rank makes its own inner
steps, on its own segments, and the results are averaged. Quantization-aware training stays on if it was on:
inner steps then read rounded weights, with straight-through gradients.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.config.schema import ReptileConfig
from pgolf_fast.data.loader import Batch
from pgolf_fast.model.bank import transformed
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.plan import Visit

Rounding = Callable[[Tensor], Tensor]  # the fake quantization that forward applies to the banks


@dataclass(frozen=True)
class InnerSteps:
    """Result of inner steps: the trained slots of the up and down banks; mean loss and gradient norm, ()."""

    ends: list[Tensor]
    loss: Tensor
    grad_norm: Tensor


class Reptile:
    """Reptile on the MLP matrices of a model's last blocks."""

    def __init__(self, model: GPT, config: ReptileConfig):
        self.model, self.config, layers = model, config, model.config.num_layers
        self.first = layers - config.blocks(layers)  # the first block that is trained
        self.banks = [model.mlp_up_bank, model.mlp_down_bank]  # that have trained slots

    def adapt(self, batches: Iterable[Batch], rounding: Rounding | None) -> InnerSteps:
        """Make one SGD step for each batch of (tokens, targets), (B, T), without changing the model."""
        ends = [bank.detach()[self.first :].clone() for bank in self.banks]
        gradients = [torch.zeros_like(end) for end in ends]
        losses, norms = [], []
        for batch in batches:
            torch._foreach_zero_(gradients)  # in place: one buffer for all inner steps
            losses.append(self._add_gradients(batch, ends, gradients, rounding))
            norms.append(nn.utils.get_total_norm(gradients))
            torch._foreach_add_(ends, gradients, alpha=-self.config.inner_lr)
        return InnerSteps(ends, torch.stack(losses).double().mean(), torch.stack(norms).double().mean())

    def _add_gradients(
        self, batch: Batch, weights: list[Tensor], gradients: list[Tensor], rounding: Rounding | None
    ) -> Tensor:
        """Return the loss at these weights of the trained slots, and add only their gradients."""
        model = self.model
        with torch.no_grad():
            banks = model.banks(rounding)
            trained = [w.to(model.compute_dtype) for w in transformed(weights, rounding)]
        # leaves: backward reaches the trained slots and nothing else
        up, down = (w.detach().requires_grad_() for w in trained)

        def mlp(visit: Visit, x: Tensor) -> Tensor:
            layer, activation = visit.layer, model.config.mlp_activation
            if layer < self.first:
                return ops.mlp(x, banks.up, banks.down, layer, activation)
            slot, (grad_up, grad_down) = layer - self.first, gradients
            return ops.mlp(x, up, down, slot, activation, grad_up=grad_up, grad_down=grad_down)

        loss = model.token_losses(*batch, banks, mlp=mlp).mean()
        torch.autograd.backward(loss, inputs=[up, down])
        return loss.detach()

    @torch.no_grad()
    def move(self, ends: list[Tensor]) -> None:
        """Make the outer step, `weights += outer_lr * (ends - weights)`."""
        for bank, end in zip(self.banks, ends, strict=True):
            bank[self.first :].lerp_(end, self.config.outer_lr)
