"""pgolf::newton_schulz: approximate orthogonalization of a stack of matrices (Jordan et al. 2024, Muon)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf_fast.ops import native, reference, tiles
from pgolf_fast.ops.checks import expect_shape
from pgolf_fast.ops.tiles import Tile

# Not measured; bound by memory.
tiles.declare("newton_schulz_normalize", Tile(16, 128, num_warps=4))
# Not measured. Three stages of 128 x 64 take 96 KiB, which every supported GPU has.
for _kernel in ("newton_schulz_gram", "newton_schulz_poly", "newton_schulz_apply"):
    tiles.declare(_kernel, Tile(128, 128, 64, num_warps=8, num_stages=3), blocks=2)


def _check(g: Tensor, steps: int, coefficients: Sequence[float] | None) -> None:
    expect_shape("newton_schulz", "g", g, (None, None, None))
    if steps < 0:
        raise ValueError(f"pgolf::newton_schulz: steps is {steps}; it must not be negative")
    if coefficients is not None and len(coefficients) != 3 * steps:
        why = f"coefficients has {len(coefficients)} numbers, but {steps} steps need {3 * steps}"
        raise ValueError(f"pgolf::newton_schulz: {why}")


@torch.library.custom_op("pgolf::newton_schulz", mutates_args=())
def newton_schulz(g: Tensor, steps: int = 5, coefficients: Sequence[float] | None = None) -> Tensor:
    """Approximate `U V^T` of each matrix `g = U S V^T`: singular values become 0.68 to 1.14, about.

    g (slots, rows, cols), bfloat16 in training; the iteration runs in its dtype, but in float32 on a CPU that
    emulates it. The result has the shape and dtype of g. Each step is `a x + (b A + c A A) x` with
    `A = x x^T`; `coefficients` are a, b and c of every step in turn (3 * steps), such as
    `reference.POLAR_EXPRESS` (0.86 to 1.14). No autograd is registered. Raises ValueError if g is not 3-D,
    `steps` is negative, or `coefficients` has another length.
    """
    _check(g, steps, coefficients)
    polynomials = reference.polynomials(steps, coefficients)
    if g.numel() == 0:
        return torch.empty_like(g, memory_format=torch.contiguous_format)
    if tiles.uses_kernels("newton_schulz", g):
        return _cuda(g, polynomials)
    return _cpu(g, polynomials)


def _cpu(g: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Iterate in float32 where the CPU cannot multiply in g's 16-bit dtype, and round once at the end.

    On one thread with AVX2, the banks of `small` take 0.15 s; iterating in bfloat16 takes 5.9 s.
    """
    if g.element_size() == 2 and not native.multiplies(g.dtype):
        return _cpu(g.float(), polynomials).to(g.dtype)
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).contiguous()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in polynomials:
        gram = _symmetric(x, None, 1.0, 0.0)
        poly = _symmetric(gram, gram, c, b)
        # adding a to poly's diagonal saves a copy of x, but in bfloat16 doubles the error of Polar Express
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).contiguous()


def _symmetric(x: Tensor, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return alpha x x^T + beta add, of which the fused pass computes one triangle."""
    fused = native.passes("newton_schulz", x)
    if fused is None:
        return x @ x.mT if add is None else torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)
    out = x.new_empty(*x.shape[:2], x.shape[1])
    native.call(fused.symmetric_product, x, add, out, alpha, beta)
    return out


def _cuda(g: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Sum in float32 and round once per product; a tall matrix is read as its wide transpose, by strides."""
    from pgolf_fast.kernels import newton_schulz as kernels

    tall = g.shape[1] > g.shape[2]
    names = ("normalize", "gram", "poly", "apply")
    normalize, gram_tile, poly_tile, apply_tile = (tiles.lookup(f"newton_schulz_{name}", g) for name in names)
    x = torch.empty_like(g, memory_format=torch.contiguous_format)
    partial = g.new_empty(g.shape[0], kernels.norm_parts(g.shape[1], normalize), dtype=torch.float32)
    with tiles.on_device_of(g):
        kernels.launch_newton_schulz_normalize(g, partial, x, normalize)
        if not polynomials:
            return x
        following = torch.empty_like(x)
        gram = g.new_empty(g.shape[0], min(g.shape[1:]), min(g.shape[1:]))
        poly = torch.empty_like(gram)
        for a, b, c in polynomials:
            wide, wide_following = (x.mT, following.mT) if tall else (x, following)
            kernels.launch_newton_schulz_gram(wide, gram, gram_tile)
            kernels.launch_newton_schulz_poly(gram, poly, b, c, poly_tile)
            kernels.launch_newton_schulz_apply(poly, wide, wide_following, a, apply_tile)
            x, following = following, x
    return x


@newton_schulz.register_fake
def _(g, steps=5, coefficients=None):
    _check(g, steps, coefficients)
    return torch.empty_like(g, memory_format=torch.contiguous_format)
