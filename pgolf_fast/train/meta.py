"""A meta-learning step on one micro-batch: half of it adapts the banks, the other half evaluates the result.

All methods are first order (Finn et al. 2017): the gradient after the inner step is used as if it were taken
before it. docs/meta.md has the formulas, and where the originals' texts and programs disagree.
"""

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import MetaConfig
from pgolf_fast.data.loader import Batch
from pgolf_fast.model.bank import BANK_NAMES, Banks, make_banks
from pgolf_fast.model.gpt import GPT


class SlotRates(nn.Module):
    """A factor on the inner learning rate for each bank slot, initially 1 (MetaSGD: Li et al. 2017, PR 1502).

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


def meta_step(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    config: MetaConfig,
    *,
    loss_scale: float,
    rates: SlotRates | None = None,
) -> Tensor:
    """Add the meta-gradient of one micro-batch to the model's gradients; return the outer loss, detached.

    The banks, except in the first blocks, take one SGD step on the inner half, with learning rate `inner_lr`
    times the slots' `rates`, if given. Let `after` (returned) and `before` be the outer half's loss after and
    before that step. The objective is
    `loss_scale * ((weight + delta_weight) * after - delta_weight * before)`. It is differentiated by every
    parameter outside the banks, by the stepped banks (whose gradient goes to the real ones unchanged), by the
    real banks in `before`, and by the rates. tokens and targets are (B, T).
    """
    model.allocate_gradient_banks()
    inner, outer = halves(tokens, targets, across_batch=config.method != "fomaml")
    masters = model.bank_parameters()
    gradients = [master.grad for master in masters if master.grad is not None]
    steps = inner_gradients(model, inner, config)
    with torch.no_grad():
        scaled = steps if rates is None else rates.scale(steps)
        pairs = zip(masters, scaled, strict=True)
        stepped = [torch.sub(m, s, alpha=config.inner_lr).to(model.compute_dtype) for m, s in pairs]
    # rates need the gradient of this loss alone, without what the training batch has accumulated
    received = gradients if rates is None else [torch.zeros_like(gradient) for gradient in gradients]
    factor = (config.weight + config.delta_weight) * loss_scale
    after = _add_gradients(model, outer, _banks(model, stepped, received), factor)
    if rates is not None:
        rates.receive(received, steps, config.inner_lr)
        torch._foreach_add_(gradients, received)
    if config.delta_weight:
        before = _banks(model, list(masters), gradients)
        _add_gradients(model, outer, before, -config.delta_weight * loss_scale)
    return after


def halves(tokens: Tensor, targets: Tensor, *, across_batch: bool) -> tuple[Batch, Batch]:
    """Split a batch into inner and outer half: by sequence if `across_batch` and B > 1, else in time."""
    dim = 0 if across_batch and len(tokens) > 1 else 1
    sizes = [tokens.shape[dim] // 2, -(-tokens.shape[dim] // 2)]
    (x, outer_x), (y, outer_y) = tokens.split(sizes, dim), targets.split(sizes, dim)
    return (x, y), (outer_x, outer_y)


def _add_gradients(model: GPT, batch: Batch, banks: Banks, factor: float) -> Tensor:
    """Return the loss at these banks, and differentiate `factor` times it."""
    loss = model.loss(*batch, banks)
    (loss * factor).backward()
    return loss.detach()


def inner_gradients(model: GPT, inner: Batch, config: MetaConfig) -> list[Tensor]:
    """Return the gradient that each bank's inner step follows, zero in the first blocks.

    For `sam` it is taken after an ascent step of norm `sam_radius` over all banks (Foret et al. 2021).
    """
    masters = [master.detach() for master in model.bank_parameters()]
    gradients = bank_gradients(model, inner, masters, config.freeze_blocks)
    if config.method != "sam":
        return gradients
    length = nn.utils.get_total_norm(gradients).clamp_min(1e-12)
    uphill = [m + g * (config.sam_radius / length) for m, g in zip(masters, gradients, strict=True)]
    return bank_gradients(model, inner, uphill, config.freeze_blocks)


def bank_gradients(model: GPT, batch: Batch, weights: list[Tensor], frozen: int) -> list[Tensor]:
    """Return the loss's gradients by these banks, zero in the first `frozen` blocks; change nothing else."""
    gradients = [torch.zeros_like(weight) for weight in weights]
    banks = _banks(model, weights, gradients)
    torch.autograd.backward(model.loss(*batch, banks), inputs=list(banks.weights()))
    for gradient in gradients:
        for start in range(0, len(gradient), model.config.num_layers):
            gradient[start : start + frozen] = 0
    return gradients


def _banks(model: GPT, weights: list[Tensor], gradients: list[Tensor]) -> Banks:
    return make_banks([weight.detach().to(model.compute_dtype) for weight in weights], gradients)
