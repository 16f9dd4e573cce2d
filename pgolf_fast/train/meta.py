"""First-order MAML on one micro-batch (PR 1501; Finn et al. 2017): learn weights that adapt well."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.config.meta import MetaConfig
from pgolf_fast.model.bank import make_banks
from pgolf_fast.model.gpt import GPT


def fomaml_step(
    model: GPT, tokens: Tensor, targets: Tensor, config: MetaConfig, *, loss_scale: float
) -> Tensor:
    """Add the meta-gradient of one micro-batch to the model's gradients; returns the outer loss, detached.

    The first half of each sequence takes one SGD step on the banks (all but the first blocks'); the loss of
    the second half, times `config.weight * loss_scale`, is differentiated at the stepped banks. Its bank
    gradients are added to the real ones as they are (first order). tokens and targets are (B, T), T even.
    """
    model.allocate_gradient_banks()
    half = tokens.shape[1] // 2
    masters = model.bank_parameters()
    inner = [torch.zeros_like(master) for master in masters]
    banks = make_banks([master.to(model.compute_dtype) for master in masters], inner)
    # only the banks' gradients: other parameters do not take part in the inner step
    loss = model.loss(tokens[:, :half], targets[:, :half], banks)
    torch.autograd.backward(loss, inputs=list(banks.weights()))
    _freeze_first(inner, config.freeze_blocks, model.config.num_layers)
    with torch.no_grad():
        stepped = [
            torch.sub(master, grad, alpha=config.inner_lr).to(model.compute_dtype)
            for master, grad in zip(masters, inner, strict=True)
        ]
    outer_banks = make_banks(stepped, [master.grad for master in masters if master.grad is not None])
    outer = model.loss(tokens[:, half:], targets[:, half:], outer_banks)
    (outer * (config.weight * loss_scale)).backward()
    return outer.detach()


def _freeze_first(grads: list[Tensor], blocks: int, num_layers: int) -> None:
    """Zero the gradients of the first blocks in every bank."""
    for grad in grads:
        for start in range(0, grad.shape[0], num_layers):
            grad[start : start + blocks] = 0
