"""pgolf::newton_schulz — approximate orthogonalisation of a stack of matrices (Jordan et al. 2024, Muon)."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.ops import launch, reference
from pgolf_fast.ops.checks import expect_shape
from pgolf_fast.ops.launch import Launch

launch.declare("newton_schulz_normalize", Launch(16, 128, num_warps=4))
for _kernel in ("newton_schulz_gram", "newton_schulz_poly", "newton_schulz_apply"):
    launch.declare(_kernel, Launch(128, 128, 64, num_warps=8, num_stages=3))


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
    if launch.uses_kernels("newton_schulz", g):
        return _newton_schulz_kernels(g, steps)
    return reference.newton_schulz(g, steps).clone(memory_format=torch.contiguous_format)


def _newton_schulz_kernels(g: Tensor, steps: int) -> Tensor:
    """Sums in float32, one rounding per product; a tall matrix is its own wide transpose, by strides."""
    from pgolf_fast.kernels import newton_schulz as kernels

    a, b, c = reference.NS_COEFFICIENTS
    tall = g.shape[1] > g.shape[2]
    normalize = launch.launch("newton_schulz_normalize", g)
    x = torch.empty_like(g, memory_format=torch.contiguous_format)
    partial = g.new_empty(g.shape[0], kernels.norm_parts(g.shape[1], normalize), dtype=torch.float32)
    with launch.on_device_of(g):
        kernels.launch_newton_schulz_normalize(g, partial, x, normalize)
        if steps == 0:
            return x
        following = torch.empty_like(x)
        gram = g.new_empty(g.shape[0], min(g.shape[1:]), min(g.shape[1:]))
        poly = torch.empty_like(gram)
        for _ in range(steps):
            wide, wide_following = (x.mT, following.mT) if tall else (x, following)
            kernels.launch_newton_schulz_gram(wide, gram, launch.launch("newton_schulz_gram", g))
            kernels.launch_newton_schulz_poly(gram, poly, b, c, launch.launch("newton_schulz_poly", g))
            kernels.launch_newton_schulz_apply(
                poly, wide, wide_following, a, launch.launch("newton_schulz_apply", g)
            )
            x, following = following, x
    return x


@_newton_schulz.register_fake
def _(g, steps):
    _check(g, steps)
    return torch.empty_like(g, memory_format=torch.contiguous_format)
