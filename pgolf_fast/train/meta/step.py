"""A step of meta-learning on one micro-batch: half of it adapts the banks, the other half judges the result.

All members are of first order (Finn et al. 2017): the gradient where the inner step ends counts as that where
it began. docs/meta.md has the formulas, and says where the originals' texts and programs disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgolf_fast.config.meta import MetaConfig
from pgolf_fast.model.bank import make_banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.meta.rates import SlotRates

# (tokens, targets), each (B, T)
Batch = tuple[Tensor, Tensor]


def meta_step(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    config: MetaConfig,
    *,
    loss_scale: float,
    rates: SlotRates | None = None,
) -> Tensor:
    """Add the meta-gradient of one micro-batch to the model's gradients; returns the outer loss, detached.

    The banks, all but the first blocks', take one SGD step on the inner half: by `inner_lr`, times the slots'
    rates if there are `rates`. With the outer half's loss after it (which is returned) and before it,
    `loss_scale * ((weight + delta_weight) * after - delta_weight * before)` is differentiated: by every
    parameter outside the banks; by the stepped banks, whose gradient the real ones receive as it is; by the
    real ones, in `before`; and by the rates. tokens and targets are (B, T).
    """
    model.allocate_gradient_banks()
    inner, outer = halves(tokens, targets, across_batch=config.method != "fomaml")
    masters = model.bank_parameters()
    gradients = [master.grad for master in masters if master.grad is not None]
    steps = inner_gradients(model, inner, config)
    with torch.no_grad():
        ways = zip(masters, steps if rates is None else rates.scale(steps), strict=True)
        stepped = [torch.sub(m, way, alpha=config.inner_lr).to(model.compute_dtype) for m, way in ways]
    # rates learn from what this loss alone adds
    received = gradients if rates is None else [torch.zeros_like(gradient) for gradient in gradients]
    weight = config.weight + config.delta_weight
    after = _add_gradients(model, outer, stepped, received, weight * loss_scale)
    if rates is not None:
        rates.receive(received, steps, config.inner_lr)
        torch._foreach_add_(gradients, received)
    if config.delta_weight:
        _add_gradients(model, outer, list(masters), gradients, -config.delta_weight * loss_scale)
    return after


def halves(tokens: Tensor, targets: Tensor, *, across_batch: bool) -> tuple[Batch, Batch]:
    """What adapts and what judges: of the sequences, or of each sequence, as of a batch that is only one."""
    dim = 0 if across_batch and len(tokens) > 1 else 1
    sizes = [tokens.shape[dim] // 2, -(-tokens.shape[dim] // 2)]
    (x, outer_x), (y, outer_y) = tokens.split(sizes, dim), targets.split(sizes, dim)
    return (x, y), (outer_x, outer_y)


def _add_gradients(
    model: GPT, batch: Batch, weights: list[Tensor], gradients: list[Tensor], factor: float
) -> Tensor:
    """Differentiate `factor` times the loss at these banks, whose part goes to `gradients`; the loss."""
    loss = model.loss(*batch, make_banks(_compute(model, weights), gradients))
    (loss * factor).backward()
    return loss.detach()


def inner_gradients(model: GPT, inner: Batch, config: MetaConfig) -> list[Tensor]:
    """The direction of the inner step for each bank, zero in the first blocks.

    For `sam` it is the gradient `sam_radius` along the plain one, over all four banks (Foret et al. 2021).
    """
    masters = [master.detach() for master in model.bank_parameters()]
    gradients = bank_gradients(model, inner, masters, config.freeze_blocks)
    if config.method != "sam":
        return gradients
    length = nn.utils.get_total_norm(gradients).clamp_min(1e-12)
    uphill = [m + g * (config.sam_radius / length) for m, g in zip(masters, gradients, strict=True)]
    return bank_gradients(model, inner, uphill, config.freeze_blocks)


def bank_gradients(model: GPT, batch: Batch, weights: list[Tensor], frozen: int) -> list[Tensor]:
    """The loss's gradients by these banks, zero in the first `frozen` blocks; nothing else gets any."""
    gradients = [torch.zeros_like(weight) for weight in weights]
    banks = make_banks(_compute(model, weights), gradients)
    torch.autograd.backward(model.loss(*batch, banks), inputs=list(banks.weights()))
    for gradient in gradients:
        for start in range(0, len(gradient), model.config.num_layers):
            gradient[start : start + frozen] = 0
    return gradients


def _compute(model: GPT, weights: list[Tensor]) -> list[Tensor]:
    return [weight.detach().to(model.compute_dtype) for weight in weights]
