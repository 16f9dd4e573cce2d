"""Helpers shared by test files: accuracy assertions, memory layouts, a tiny network."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.ops import judge
from pgolf_fast.quant.gptq import gptq


def gptq_alone(
    weight: Tensor, hessian: Tensor, name: str = "weight", **settings: Any
) -> tuple[Tensor, Tensor]:
    """Run `gptq` on one matrix."""
    return gptq([({name: weight}, hessian)], **settings)[name]


def assert_as_accurate(got, low, exact, factor=2.0, atol=1e-6):
    """`got` may miss the float64 answer by `factor` times what eager misses it by in the same dtype."""
    verdict = judge.verdict("result", got, low, exact, factor=factor, atol=atol)
    assert verdict.ok, f"{verdict}, {factor} times eager's"


def results(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], douts: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return outputs of `function(*inputs)`, gradients of its floating-point inputs, and incoming gradients.

    Without `douts`, incoming gradients are random.
    """
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    douts = list(douts or [torch.randn(o.shape, dtype=o.dtype, device=o.device) for o in outs])
    floats = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outs, floats, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])
    return [o.detach() for o in outs], list(grads), douts


def compare(
    op: Callable[..., Any],
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    *,
    eager: Callable[..., Any] | None = None,
    factor: float = judge.FACTOR,
) -> list[judge.Verdict]:
    """Compare outputs and every gradient of `op(*inputs)` with `formula` in float64.

    The yardstick is `eager` (by default the formula itself) in the dtype of the inputs. Raises TypeError if
    the dtypes of results differ from the yardstick's.
    """
    outs, grads, douts = results(op, inputs)
    low_outs, low_grads, _ = results(eager or formula, inputs, douts)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    exact_outs, exact_grads, _ = results(formula, wide, douts)
    for got, low in zip(outs + grads, low_outs + low_grads, strict=True):
        if got.dtype != low.dtype:
            raise TypeError(f"a result has dtype {got.dtype}, but the formula's has {low.dtype}")
    exact = _named(exact_outs, exact_grads)
    truth = judge.Truth(exact, _named(low_outs, low_grads), tuple(douts), judge.coarsest(inputs))
    return judge.verdicts(_named(outs, grads), truth, factor)


def _named(outs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    names: Iterator[str] = (f"{kind}{i}" for kind, n in (("out", outs), ("d ", grads)) for i in range(len(n)))
    return dict(zip(names, (*outs, *grads), strict=True))


def assert_matches_float64(op, formula, inputs: Sequence[Tensor | None], *, eager=None, factor=2.0) -> None:
    """Outputs and every gradient of `op` agree with `formula` in float64 (see `compare`)."""
    verdicts = compare(op, formula, inputs, eager=eager, factor=factor)
    assert all(verdict.ok for verdict in verdicts), "; ".join(map(str, verdicts))


def _sliced(t: Tensor, pad: int) -> Tensor:
    """Return a slice of wider rows; the surrounding elements are NaN (or a large integer)."""
    around = float("nan") if t.is_floating_point() else 10**6
    buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 2 * pad), around)
    buffer[..., pad:-pad] = t
    return buffer[..., pad:-pad]


# Layout of the n-th tensor of a call; every n has its own strides.
LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sliced": lambda t, n: _sliced(t, n + 1) if t.dim() else t,
    "transposed": lambda t, n: _sliced(t.mT.contiguous(), n + 1).mT if t.dim() > 1 else t,
    "expanded": lambda t, n: t[:1].expand_as(t) if t.dim() and len(t) else t,
}


def lay_out(layout: str, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return `inputs` in that layout; none is contiguous unless it is too small to tell."""
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
    expanded = [d.new_ones(()).expand(d.shape) for d in douts]  # the gradient that .sum().backward() passes
    torch.testing.assert_close(
        results(op, inputs, expanded)[1], results(op, contiguous, ones)[1], **tolerance
    )


def assert_adds_to_banks(
    op, inputs: Sequence[Tensor], banks: Sequence[int], slots: Sequence[Sequence[int]]
) -> None:
    """Backward with gradient banks adds the dense gradient into the slots of each bank and nothing else.

    `op(*inputs, *gradient_banks)`; `banks` are the positions of the weight banks in `inputs`, `slots` the
    slots of each that the call reads. The gradient banks are float32 and start with large values, which
    exposes overwriting or adding in a narrower dtype.
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
    """Return a config with every feature of the network at a small size."""
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


# Parts of the record networks (PR 1855 and before), as changes of `tiny_config`
FRONTIER: dict[str, dict[str, Any]] = {
    "loops": {"num_loops": 2, "loop_start": 1, "loop_end": 2},
    "loop_to_the_end": {"num_loops": 1, "loop_start": 2, "loop_end": 3, "smear_form": "gated"},
    "lanes": {"num_layers": 5, "lanes_from": 3, "lanes_end": "mlp", "skip_gates": True},
    "dense_gate": {"head_gate": "dense", "rope_bf16_frequencies": True},
    "output_gate": {"head_gate": "output", "gate_window": 5},
    "output_gate_of_queries": {"head_gate": "output_q", "num_loops": 1, "loop_start": 1, "loop_end": 1},
    "record": {
        "mlp_mult": 4.0,
        "num_loops": 2,
        "loop_start": 1,
        "loop_end": 1,
        "lanes_from": 2,
        "skip_gates": True,
        "smear_form": "gated",
        "head_gate": "sparse",
        "first_attn_scale": 1.0,
        "rope_bf16_frequencies": True,
        "bigram_vocab_size": 0,
        "trigram": False,
        "ve_enabled": False,
    },
}


@torch.no_grad()
def randomize_(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter random values large enough to affect the result."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        values *= parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.5
        parameter.copy_(values if parameter.dim() > 1 else values + 1)
    return model


def slow(*values, **options):
    """Return a parameter whose tests only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
