"""The tensors that weight-space studies compare, and the ways they flatten them.

"Published" is what the analyses of PR 1501 and PR 1502 computed. They took every tensor of at least 65,536
elements, which are the four banks and the three tables of exp101, and read a bank as one matrix with a row
for each slot. Banks count here whatever their size, so that small models have the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.model.bank import BANK_NAMES

LARGE = 65_536
"""Elements from which on the published spectra look at a tensor."""
MOST_DIRECTIONS = 32


def common(subjects: Sequence[Subject]) -> list[str]:
    """The tensors that all models have, in the first one's order.

    Raises PgolfError naming the first whose shapes differ.
    """
    first = subjects[0]
    names = [name for name in first.state if all(name in other.state for other in subjects)]
    for name in names:
        shape = first.state[name].shape
        for other in subjects[1:]:
            if other.state[name].shape != shape:
                raise PgolfError(
                    f"{name} is {tuple(shape)} in {first.name} and {tuple(other.state[name].shape)} in "
                    f"{other.name}: only models of one shape can be compared"
                )
    return names


def pairs(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Subject]]:
    """Every two models, the earlier one first. Raises PgolfError as `common`."""
    common(subjects)
    yield from combinations(subjects, 2)


def large(state: Mapping[str, Tensor]) -> list[str]:
    """The tensors of the published spectra: banks, and other matrices of 65,536 elements or more."""
    return [n for n, t in state.items() if n in BANK_NAMES or (t.ndim >= 2 and t.numel() >= LARGE)]


def flattened(tensor: Tensor) -> Tensor:
    """A bank as the published analyses read it, one row a slot; other matrices as they are. float64."""
    return tensor.double().flatten(1)


def leading(smaller_side: int) -> int:
    """How many leading directions of a matrix are compared: a quarter of them, at least 1, at most 32."""
    return min(MOST_DIRECTIONS, max(1, smaller_side // 4))


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Of two tensors as vectors, in float64; None where one is zero."""
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    return max(-1.0, min(1.0, float(x @ y) / norms)) if norms else None


def norm(tensor: Tensor) -> float:
    """Euclidean, over all elements, in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))
