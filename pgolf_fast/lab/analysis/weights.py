"""Selecting, flattening and comparing the tensors of models.

The published forms are those of PR 1501 and PR 1502. They took every tensor of at least 65,536 elements,
which in exp101 are the four banks and the three tables, and flattened a bank to a matrix with one row per
slot. Here banks are included whatever their size, so that small models have the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.model.bank import BANK_NAMES

LARGE = 65_536
"""Least number of elements of a tensor in the published spectra."""
MOST_DIRECTIONS = 32


def common(models: Sequence[LoadedModel]) -> list[str]:
    """Return the names of the tensors that all models have, in the order of the first.

    Raises PgolfError naming the first tensor whose shapes differ.
    """
    first = models[0]
    names = [name for name in first.state if all(name in other.state for other in models)]
    for name in names:
        shape = first.state[name].shape
        for other in models[1:]:
            if other.state[name].shape != shape:
                raise PgolfError(
                    f"{name} is {tuple(shape)} in {first.name} and {tuple(other.state[name].shape)} in "
                    f"{other.name}: only models of one shape can be compared"
                )
    return names


def pairs(models: Sequence[LoadedModel]) -> Iterator[tuple[LoadedModel, LoadedModel]]:
    """Yield every pair of models, in order. Raises PgolfError as `common`."""
    common(models)
    yield from combinations(models, 2)


def large(state: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors of the published spectra: banks, and other matrices of 65,536 elements or more."""
    return [n for n, t in state.items() if n in BANK_NAMES or (t.ndim >= 2 and t.numel() >= LARGE)]


def flattened(tensor: Tensor) -> Tensor:
    """Flatten a bank to one row per slot, as the published analyses do; keep other matrices. float64."""
    return tensor.double().flatten(1)


def leading(smaller_side: int) -> int:
    """Return how many leading directions of a matrix to compare: a quarter of them, from 1 to 32."""
    return min(MOST_DIRECTIONS, max(1, smaller_side // 4))


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine of two tensors as vectors, in float64, or None if one is zero."""
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    # Rounding can exceed 1, which acos and sqrt(1 + cosine) of the callers do not accept
    return max(-1.0, min(1.0, float(x @ y) / norms)) if norms else None


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm over all elements, in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))
