"""Cost of an error in a weight: Fisher information with a row and a column factor (K-FAC).

Martens and Grosse 2015. A change E of a matrix raises the loss by about 1/2 sum_r rows[r] e_r^T hessian e_r
nats per token. Gradients are those of the log-probability of tokens sampled from the model, so no data is
needed, and their mean square is the true Fisher information rather than the empirical one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_fast.console import progress
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.gptq import inverse_factor
from pgolf_fast.quant.state import group_of, is_slot, unbank

BATCHES = 16  # gradients that importances are averaged over
SHARED = 0.1  # share of the matrix mean in a row's importance: short text does not visit every row
TABLE_DAMPING = 1e-3  # times the mean diagonal, for Hessians fitted to gradients
_ROUNDS = 3  # alternations of fitting rows and columns


@dataclass(frozen=True, eq=False)
class Fisher:
    """Factors of a matrix (R, C): row importances (R,) and hessian (C, C), float32 on its device."""

    rows: Tensor
    hessian: Tensor
    damping: float


def collect_fisher(
    model: GPT, tokens: Tensor, hessians: Mapping[str, Tensor], *, damping: float = 0.01, seed: int = 42
) -> dict[str, Fisher]:
    """Return the factors of every matrix by unbanked name. The model is not changed.

    tokens (sequences, length) are inputs; targets are sampled from the model. hessians, from
    `collect_hessians`, are the column factors of bank matrices. Tables have no input to take a Hessian of:
    their two factors are fitted to gradients alternately, like a matrix normal distribution (Dutilleul 1999).
    Row importances are measured against the inverse of the column factor, the spread of GPTQ's errors.
    Raises PgolfError for fewer than one sequence or two tokens, or a non-finite gradient.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise PgolfError(
            f"importances need (sequences, length of 2 or more) tokens, not {tuple(tokens.shape)}"
        )
    inputs = tokens[:, :-1].to(model.tok_emb.weight.device)
    columns = {name: hessian / inputs.shape[1] for name, hessian in hessians.items()}
    factors = {name: _square_root(hessian, damping, name) for name, hessian in columns.items()}
    rows: dict[str, Tensor] = {}
    kept: dict[str, list[Tensor]] = {}
    for gradients in _gradients(model, inputs, seed):
        for name, gradient in gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                raise PgolfError(f"the gradient of {name} is not finite: the training run diverged")
            if is_slot(name):
                share = _row_sums(gradient, factors[group_of(name)])
                rows[name] = rows[name] + share if name in rows else share
            else:
                kept.setdefault(name, []).append(gradient.bfloat16())
    fishers = {
        name: Fisher(_smooth(total / inputs.numel()), columns[group_of(name)], damping)
        for name, total in rows.items()
    }
    for name, samples in kept.items():
        fishers[name] = _fit(torch.stack(samples), inputs.numel())
    return fishers


def _gradients(model: GPT, inputs: Tensor, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield, per batch of text, the float32 gradients of the summed loss by unbanked matrix name."""
    generator = torch.Generator(inputs.device).manual_seed(seed)
    parameters = dict(model.named_parameters())
    parts = inputs.split(-(-len(inputs) // BATCHES))
    for part in progress(parts, "importances", unit="batch"):
        with torch.no_grad():
            chances = torch.softmax(model.logits(part).float(), dim=-1)
            targets = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(part)
        with torch.enable_grad():
            loss = model.token_losses(part, targets).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        by_name = {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}
        yield {n: g.float() for n, g in unbank(by_name).items() if n.endswith(".weight") and g.ndim == 2}


def _square_root(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Return V (C, C) with V^T V = (hessian + damping mean(diag) I)^-1."""
    order, factor = inverse_factor(hessian, damping, name)
    root = torch.empty_like(factor)
    root[:, order] = factor
    return root


def _row_sums(gradient: Tensor, root: Tensor) -> Tensor:
    """Return g_r^T H^-1 g_r / C per row: a sample of its importance, times the number of tokens summed."""
    return (gradient @ root.T).square().mean(dim=1)


def _smooth(rows: Tensor) -> Tensor:
    """Pull importances towards their mean, so that none is zero; ones if all are zero."""
    mean = rows.mean()
    return torch.lerp(rows, mean.expand_as(rows), SHARED) if mean > 0 else torch.ones_like(rows)


def _fit(gradients: Tensor, tokens: int) -> Fisher:
    """Fit both factors of a matrix to gradients (batches, R, C); the hessian has mean diagonal 1."""
    hessian = torch.eye(gradients.shape[2], device=gradients.device)
    rows = _fitted_rows(gradients, hessian, tokens)
    for _ in range(_ROUNDS):
        weighed = (gradient.float() * rows.rsqrt()[:, None] for gradient in gradients)
        gram = functools.reduce(torch.add, (w.T @ w for w in weighed))
        mean = torch.diagonal(gram).mean()
        if mean <= 0:
            break
        hessian = gram / mean
        rows = _fitted_rows(gradients, _square_root(hessian, TABLE_DAMPING, "a table"), tokens)
    return Fisher(rows, hessian, TABLE_DAMPING)


def _fitted_rows(gradients: Tensor, root: Tensor, tokens: int) -> Tensor:
    sums = (_row_sums(gradient.float(), root) for gradient in gradients)
    return _smooth(functools.reduce(torch.add, sums) / tokens)
