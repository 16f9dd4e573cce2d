"""pgolf::newton_schulz — approximate orthogonalisation of a stack of matrices (Jordan et al. 2024, Muon)."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.ops import reference
from pgolf_fast.ops.checks import expect_shape


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """`U V^T` of each `g = U S V^T`, approximately: singular values end in about 0.68 to 1.14.

    g (slots, rows, cols) in the dtype the iteration runs in (bfloat16 in training); the result is like g.
    Inference only: no autograd is registered. Raises ValueError for a wrong rank or a negative step count.
    """
    return torch.ops.pgolf.newton_schulz(g, steps)


def _check(g: Tensor, steps: int) -> None:
    expect_shape("newton_schulz", "g", g, (None, None, None))
    if steps < 0:
        raise ValueError(f"pgolf::newton_schulz: steps is {steps}; it must not be negative")


@torch.library.custom_op("pgolf::newton_schulz", mutates_args=())
def _newton_schulz(g: Tensor, steps: int) -> Tensor:
    _check(g, steps)
    if g.numel() == 0:
        return torch.empty_like(g, memory_format=torch.contiguous_format)
    return reference.newton_schulz(g, steps).clone(memory_format=torch.contiguous_format)


@_newton_schulz.register_fake
def _(g, steps):
    _check(g, steps)
    return torch.empty_like(g, memory_format=torch.contiguous_format)
