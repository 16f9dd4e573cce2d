"""Curvature of a loss: Hessian-vector products, trace and extreme eigenvalues.

The ops' backward passes are not differentiable, so a Hessian-vector product is a difference of two gradients
in float64: at the weights, which all products share, and at a distance of 1e-9 of their norm. On `small` and
one window, the relative error of v^T H v was 1.5e-6 along the top eigenvector and 1e-7 along a random vector;
central differences with a step of 1e-6 had 1e-3 along the former.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_fast.evaluation.score import CPU_TOKENS
from pgolf_fast.model.gpt import GPT

STEP = 1e-9
Product = Callable[[Tensor], Tensor]


class LossSurface:
    """Mean loss of fixed windows as a function of all parameters, flattened to (size,) float64."""

    def __init__(self, model: GPT, tokens: Tensor, targets: Tensor):
        """Compute loss and gradient of a float64 `model` on tokens and targets (windows, T)."""
        self._model = model
        self._parameters = list(model.parameters())
        batch = max(1, CPU_TOKENS // tokens.shape[1])
        self._batches = list(zip(tokens.split(batch), targets.split(batch), strict=True))
        self._count = targets.numel()
        self.size = sum(p.numel() for p in self._parameters)
        self.blocks: dict[str, slice] = {}
        """Range of each parameter in the vector."""
        start = 0
        for name, parameter in model.named_parameters():
            self.blocks[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        self._step = STEP * math.sqrt(sum(float(p.detach().square().sum()) for p in self._parameters))
        model.allocate_gradient_banks()
        self.loss, self.gradient = self._loss_and_gradient()
        """Loss in nats, and gradient (size,)."""

    def product(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian by a vector (size,)."""
        step = self._step / float(vector.norm())
        weights = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for parameter, place in zip(self._parameters, self.blocks.values(), strict=True):
                parameter.add_(vector[place].view_as(parameter), alpha=step)
        ahead = self._loss_and_gradient()[1]
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)
        return (ahead - self.gradient) / step

    def _loss_and_gradient(self) -> tuple[float, Tensor]:
        self._model.zero_grad(set_to_none=False)
        total = 0.0
        for tokens, targets in self._batches:
            loss = self._model.token_losses(tokens, targets).sum() / self._count
            loss.backward()
            total += loss.item()
        parts = (torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters)
        return total, torch.cat([grad.flatten() for grad in parts])


@dataclass(frozen=True)
class Uncertain:
    """A number and its error: the standard error of a mean, or the residual of an eigenvalue."""

    value: float
    error: float


def random_signs(size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Yield vectors (size,) of independent ±1, float64, identical on every device."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, 2, (size,), generator=generator).to(device).mul(2).sub(1).double()


def trace(
    product: Product, vectors: Iterable[Tensor], blocks: Mapping[str, slice]
) -> tuple[Uncertain, dict[str, Uncertain]]:
    """Estimate the trace of a symmetric matrix and of its diagonal blocks (Hutchinson 1990).

    The mean of v^T H v over vectors v of random signs is the trace; that of v_b^T (H v)_b is that of block b.
    """
    samples: list[Tensor] = []
    for vector in vectors:
        terms = vector * product(vector)
        samples.append(torch.stack([*(terms[place].sum() for place in blocks.values()), terms.sum()]).cpu())
    stacked = torch.stack(samples)
    means, errors = stacked.mean(0).tolist(), (stacked.std(0) / math.sqrt(len(stacked))).tolist()
    *parts, whole = (Uncertain(value, error) for value, error in zip(means, errors, strict=True))
    return whole, dict(zip(blocks, parts, strict=True))


def extremes(
    product: Product, start: Tensor, steps: int, largest: int = 1
) -> tuple[list[Uncertain], Uncertain]:
    """Estimate the `largest` eigenvalues of a symmetric matrix, descending, and the smallest (Lanczos 1950).

    The k-th is at most the k-th largest eigenvalue, and the last at least the smallest. The error is the norm
    of the residual: some eigenvalue is within it, but after few steps it may be another one. There are no
    more estimates than steps. All vectors are kept orthogonal, which takes the memory of `steps` vectors.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, len(start))):
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # after one pass, a small remainder is as large as its rounding errors
            for known in basis:
                image = image - (image @ known) * known
        off_diagonal.append(float(image.norm()))
        if off_diagonal[-1] <= 1e-10 * max(
            map(abs, diagonal)
        ):  # the space is exhausted: eigenvalues are exact
            off_diagonal[-1] = 0.0
            break
        basis.append(image / off_diagonal[-1])
    band = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    small = (
        torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(band, 1) + torch.diag(band, -1)
    )
    values, vectors = torch.linalg.eigh(small)
    residuals = off_diagonal[-1] * vectors[-1].abs()
    ascending = [Uncertain(*pair) for pair in zip(values.tolist(), residuals.tolist(), strict=True)]
    return ascending[::-1][:largest], ascending[0]
