"""What several test files share: the accuracy rule, memory layouts, a tiny network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.quant.gptq import gptq


def gptq_alone(
    weight: Tensor, hessian: Tensor, name: str = "weight", **settings: Any
) -> tuple[Tensor, Tensor]:
    """`gptq` of one matrix."""
    return gptq([({name: weight}, hessian)], **settings)[name]


def assert_as_accurate(got, low, exact, factor=2.0, atol=1e-6):
    """`got` may miss the float64 answer by `factor` times what eager misses it by in the same dtype."""
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    if got.numel() == 0:
        return
    err, base = (got.double() - exact).abs().max(), (low.double() - exact).abs().max()
    assert err <= factor * base + atol, f"error {err:.3e} > {factor} x eager's {base:.3e}"


def results(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], douts: Sequence[Tensor] | None = None
):
    """Outputs of `function(*inputs)` and the gradients of its floating-point inputs (None where unused)."""
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    douts = douts or [torch.randn(o.shape, dtype=o.dtype, device=o.device) for o in outs]
    floats = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outs, floats, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])
    return [o.detach() for o in outs], list(grads), douts


def assert_matches_float64(op, formula, inputs: Sequence[Tensor | None], *, eager=None, factor=2.0) -> None:
    """Outputs and every gradient of `op` against `formula` in float64.

    The yardstick is `eager` (by default the formula itself) in the dtype of the inputs. One unit in the last
    place of the largest value is allowed on top: where eager happens to be exact, a result rounded once is
    right too. Gradients of a handful of numbers are long sums that may cancel, and a handful of lucky ones is
    no yardstick: they are judged by the largest of all values.
    """
    outs, grads, douts = results(op, inputs)
    low_outs, low_grads, _ = results(eager or formula, inputs, douts)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    exact_outs, exact_grads, _ = results(formula, wide, douts)
    assert [o.dtype for o in outs] == [o.dtype for o in low_outs]
    assert [g.dtype for g in grads] == [g.dtype for g in low_grads]
    exacts = exact_outs + exact_grads
    sizes = [t.abs().max().item() if t.numel() else 0.0 for t in exacts]
    coarsest = max(torch.finfo(t.dtype).eps for t in inputs if t is not None and t.is_floating_point())
    for got, low, exact, size in zip(outs + grads, low_outs + low_grads, exacts, sizes, strict=True):
        few = exact.numel() < 16
        rounding = coarsest * max(sizes) if few else torch.finfo(got.dtype).eps * size
        assert_as_accurate(got, low, exact, factor * (4 if few else 1), atol=1e-6 + rounding)


def _sliced(t: Tensor, pad: int) -> Tensor:
    """The middle of wider rows; what lies around them is NaN (or a large integer)."""
    around = float("nan") if t.is_floating_point() else 10**6
    buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 2 * pad), around)
    buffer[..., pad:-pad] = t
    return buffer[..., pad:-pad]


# How the n-th tensor of a call is laid out; every n gives its own strides.
LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sliced": lambda t, n: _sliced(t, n + 1) if t.dim() else t,
    "transposed": lambda t, n: _sliced(t.mT.contiguous(), n + 1).mT if t.dim() > 1 else t,
    "expanded": lambda t, n: t[:1].expand_as(t) if t.dim() and len(t) else t,
}


def lay_out(layout: str, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`inputs` in that layout, none of them contiguous where they have a size to show it."""
    return [t if t is None else LAYOUTS[layout](t, n) for n, t in enumerate(inputs)]


def assert_strides_do_not_matter(op, inputs: Sequence[Tensor | None], **tolerance: float) -> None:
    """`op` gives the same values and gradients for strided `inputs` and strided incoming gradients."""
    contiguous = [t if t is None else t.contiguous() for t in inputs]
    outs, grads, douts = results(op, contiguous)
    for strided in (douts, [LAYOUTS["transposed"](d, 2) for d in douts]):
        got_outs, got_grads, _ = results(op, inputs, strided)
        torch.testing.assert_close(got_outs + got_grads, outs + grads, **tolerance)
    assert all(o.is_contiguous() for o in got_outs)
    ones = [torch.ones_like(d) for d in douts]
    expanded = [d.new_ones(()).expand(d.shape) for d in douts]  # what .sum().backward() hands over
    torch.testing.assert_close(
        results(op, inputs, expanded)[1], results(op, contiguous, ones)[1], **tolerance
    )


def assert_adds_to_banks(
    op, inputs: Sequence[Tensor], banks: Sequence[int], slots: Sequence[Sequence[int]]
) -> None:
    """Backward with gradient banks adds the dense gradient into the slots of each bank and nothing else.

    `op(*inputs, *gradient_banks)`; `banks` are the positions of the weight banks in `inputs`, `slots` the
    slots of each that the call reads. The gradient banks are float32 and start out large, so that adding in a
    narrower dtype, or overwriting, shows.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    held = [100 * torch.randn(inputs[b].shape, dtype=torch.float32, device=inputs[b].device) for b in banks]
    before = [h.clone() for h in held]
    out = op(*leaves, *held)
    dout = torch.randn(out.shape, dtype=out.dtype, device=out.device)
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True, retain_graph=True)
    nothing = [None] * len(banks)
    dense = results(lambda *t: op(*t, *nothing), inputs, [dout])[1]
    for position, (grad, want) in enumerate(zip(grads, dense, strict=True)):
        if position in banks:
            assert grad is None, "autograd was given a dense gradient as well"
        else:
            torch.testing.assert_close(grad, want)
    for now, then, position, used in zip(held, before, banks, slots, strict=True):
        others = [s for s in range(len(now)) if s not in used]
        torch.testing.assert_close(now[others], then[others], rtol=0, atol=0)
        added, want = (now - then)[list(used)], dense[position][list(used)].float()
        assert want.abs().max() > 0.1
        # a bank may take the product before or after its rounding to the weights' dtype
        rounding = torch.finfo(inputs[position].dtype).eps * want.abs().max().item()
        torch.testing.assert_close(added, want, rtol=0, atol=3e-4 + rounding)
    once = [h.clone() for h in held]
    torch.autograd.grad(out, leaves, dout, allow_unused=True)
    for now, middle, then in zip(held, once, before, strict=True):
        torch.testing.assert_close(now - middle, middle - then, rtol=0, atol=3e-4)


def tiny_config(**changes) -> ModelConfig:
    """Every feature of the network at a size a test can afford."""
    values = {
        "vocab_size": 96,
        "num_layers": 4,
        "model_dim": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "bigram_vocab_size": 64,
        "bigram_dim": 16,
        "rope_dims": 8,
        "ve_dim": 8,
        "ve_layers": (2, 3),
        "xsa_last_n": 4,
        "frozen_skips": 0,
    }
    return ModelConfig(**{**values, **changes})


@torch.no_grad()
def randomize_(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter random values of a healthy size, so that each of them shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        values *= parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.5
        parameter.copy_(values if parameter.dim() > 1 else values + 1)
    return model
