"""What an error in a weight costs: Fisher information in two factors, rows and columns (K-FAC).

Martens and Grosse 2015. A change E of a matrix raises the loss by about 1/2 sum_r rows[r] e_r^T hessian e_r
nats per token. Gradients are those of the log-probability of tokens that the model itself draws, so no data
is needed, and their mean square is the Fisher information, not its empirical stand-in.
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

BATCHES = 16  # gradients that the importances are means of
SHARED = 0.1  # part of a row's importance that is the mean of its matrix: text has not visited every row
TABLE_DAMPING = 1e-3  # of the mean diagonal, of Hessians that come from gradients
_ROUNDS = 3  # of fitting rows to columns and columns to rows


@dataclass(frozen=True, eq=False)
class Fisher:
    """Factors of a matrix (R, C): rows (R,) of its importance and hessian (C, C), float32 on its device."""

    rows: Tensor
    hessian: Tensor
    damping: float


def collect_fisher(
    model: GPT, tokens: Tensor, hessians: Mapping[str, Tensor], *, damping: float = 0.01, seed: int = 42
) -> dict[str, Fisher]:
    """The factors of every matrix by its unbanked name. `model` is not changed.

    tokens (sequences, length) are inputs; targets are drawn from the model's own distribution over what comes
    next. hessians, as from `collect_hessians`, are the column factors of bank matrices; those of all others
    (tables have no inputs to take them of) are fitted to gradients in turn with the rows, as matrix normal
    distributions are (Dutilleul 1999). A row's importance is taken against the inverse of the column factor,
    as that is how the errors which GPTQ leaves are spread.
    Raises PgolfError for fewer than one sequence or two tokens, or a gradient that is not finite.
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
    """Per batch of texts, the gradient float32 of the summed loss, by unbanked name, of every matrix."""
    generator = torch.Generator(inputs.device).manual_seed(seed)
    parameters = dict(model.named_parameters())
    parts = inputs.split(-(-len(inputs) // BATCHES))
    for part in progress(parts, "importances", unit="batch"):
        with torch.no_grad():
            chances = torch.softmax(model.logits(part).float(), dim=-1)
            targets = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(part)
        with torch.enable_grad():
            loss = model.token_losses(part, targets).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        by_name = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        yield {n: g.float() for n, g in unbank(by_name).items() if n.endswith(".weight") and g.ndim == 2}


def _square_root(hessian: Tensor, damping: float, name: str) -> Tensor:
    """V (C, C) with V^T V = (hessian + damping mean(diag))^-1."""
    order, factor = inverse_factor(hessian, damping, name)
    root = torch.empty_like(factor)
    root[:, order] = factor
    return root


def _row_sums(gradient: Tensor, root: Tensor) -> Tensor:
    """g_r^T H^-1 g_r / C of every row: one sample of its importance, times the tokens it is summed over."""
    return (gradient @ root.T).square().mean(dim=1)


def _smooth(rows: Tensor) -> Tensor:
    """Importances no smaller than a part of their mean; ones where nothing has any."""
    mean = rows.mean()
    return torch.lerp(rows, mean.expand_as(rows), SHARED) if mean > 0 else torch.ones_like(rows)


def _fit(gradients: Tensor, tokens: int) -> Fisher:
    """Both factors of one matrix by gradients (batches, R, C); the hessian has mean diagonal 1."""
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
