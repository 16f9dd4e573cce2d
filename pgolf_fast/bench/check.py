"""Whether a contender computes the case: outputs and gradients against float64, eager as the yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf_fast.bench.case import Case, Contender, Mode, Outputs

Named = dict[str, Tensor]
FEW = 16  # a handful of numbers is no yardstick: judged by the largest of all values


@dataclass(frozen=True)
class Truth:
    """What the definition gives in float64, and what it gives in the dtype of the case."""

    exact: Named
    low: Named
    douts: tuple[Tensor, ...]
    """Incoming gradients of the outputs; empty when only forward is judged."""
    summing: float = 0.0
    """Allowed on top, as a share of the largest value, of gradients that are float32 sums over all tokens."""


@dataclass(frozen=True)
class Verdict:
    """The result that is furthest beyond what it is allowed."""

    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2e}, allowed {self.allowed:.2e}"


def truth_of(case: Case, mode: Mode) -> Truth:
    """Everything about `case` that contenders are judged by. Computed in blocks of the batch."""
    with torch.no_grad():
        first = case.formulas["eager"].function(**_part(case, 0, 1, None))
    batch = case.inputs[case.batched[0]].shape[0]
    douts: tuple[Tensor, ...] = ()
    if mode == "fwd+bwd":
        douts = tuple(torch.randn(batch, *o.shape[1:], dtype=o.dtype, device=o.device) for o in first)
    exact, low = _evaluate(case, douts, torch.float64), _evaluate(case, douts, None)
    # rounding errors of a plain sum grow like the root of its length; the blocks' own sums are shorter
    return Truth(exact, low, douts, 4 * torch.finfo(torch.float32).eps * max(case.tokens, 1) ** 0.5)


def _part(case: Case, start: int, stop: int, dtype: torch.dtype | None) -> Named:
    """The inputs for some entries of the batch, as leaves, floating-point ones in `dtype`."""
    part = {}
    for name, tensor in case.inputs.items():
        piece = tensor.detach()[start:stop] if name in case.batched else tensor.detach()
        if dtype is not None and piece.is_floating_point():
            piece = piece.to(dtype)
        part[name] = piece.requires_grad_() if name in case.trained else piece
    return part


def _evaluate(case: Case, douts: Sequence[Tensor], dtype: torch.dtype | None) -> Named:
    """Outputs ("out0", ...) and gradients ("d x", ...) of the definition."""
    batch = case.inputs[case.batched[0]].shape[0]
    pieces: dict[str, list[Tensor]] = {}
    shared: Named = {}
    for start in range(0, batch, case.chunk):
        part = _part(case, start, start + case.chunk, dtype)
        with torch.set_grad_enabled(bool(douts)):
            outs = case.formulas["eager"].function(**part)
        for i, out in enumerate(outs):
            pieces.setdefault(f"out{i}", []).append(out.detach())
        if not douts:
            continue
        incoming = [d[start : start + case.chunk].to(o.dtype) for d, o in zip(douts, outs, strict=True)]
        grads = torch.autograd.grad(outs, [part[name] for name in case.trained], incoming)
        for name, grad in zip(case.trained, grads, strict=True):
            if name in case.batched:
                pieces.setdefault(f"d {name}", []).append(grad)
            else:  # every block adds to it
                key = f"d {name}"
                shared[key] = shared.get(key, torch.zeros((), device=grad.device)) + grad.double()
    return {**{name: torch.cat(parts) for name, parts in pieces.items()}, **shared}


def judge(contender: Contender, truth: Truth) -> Verdict:
    """The worst of all results of `contender`: outputs, and gradients where `truth` has them."""
    if truth.douts:
        outs, grads = contender.results(truth.douts)
    else:
        outs, grads = contender.forward(), {}
    got = {**_named(outs), **{f"d {name}": grad for name, grad in grads.items()}}
    return worst(got, truth, contender.factor)


def _named(outs: Outputs) -> Named:
    return {f"out{i}": out.detach() for i, out in enumerate(outs)}


def worst(got: Named, truth: Truth, factor: float) -> Verdict:
    """The result in `got` that exceeds `factor` times eager's own error by most."""
    largest = max(float(exact.abs().max()) for exact in truth.exact.values())
    # eps of the coarsest type that eager rounds to anywhere
    coarsest = max(torch.finfo(low.dtype).eps for name, low in truth.low.items() if name in got)
    verdicts = [
        _verdict(name, result, truth, factor, coarsest, largest)
        for name, result in got.items()
        if name in truth.exact
    ]
    return max(verdicts, key=lambda v: v.error / v.allowed if v.error == v.error else float("inf"))


def _verdict(name: str, got: Tensor, truth: Truth, factor: float, coarsest: float, largest: float) -> Verdict:
    exact, low = truth.exact[name], truth.low[name]
    if got.shape != exact.shape:
        return Verdict(f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}", float("nan"), 0.0)
    error, yardstick = (float((t.double() - exact).abs().max()) for t in (got, low))
    few = exact.numel() < FEW
    size = largest if few else float(exact.abs().max())
    rounding = coarsest + (truth.summing if low.dtype == torch.float64 else 0.0)  # summed over blocks
    allowed = factor * (4 if few else 1) * yardstick + 1e-6 + rounding * size
    return Verdict(name, error, allowed)


def judge_tail(case: Case, entries: int) -> Verdict:
    """The last entries of the batch as `case.ours` computes them among all, against the same entries alone.

    For tensors whose offsets do not fit 32 bits; gradients of shared inputs must only be finite.
    """
    with torch.no_grad():
        outs = case.ours.run()
    douts = tuple(torch.randn_like(out) for out in outs)
    del outs
    outs, grads = case.ours.results(douts)
    for name, grad in grads.items():
        if name not in case.batched and not bool(torch.isfinite(grad).all()):
            return Verdict(f"d {name} is not finite", float("nan"), 0.0)
    tail = {f"d {name}": grad[-entries:] for name, grad in grads.items() if name in case.batched}
    got = {**{f"out{i}": out.detach()[-entries:] for i, out in enumerate(outs)}, **tail}
    ends = {name: t.detach()[-entries:] if name in case.batched else t for name, t in case.inputs.items()}
    small = replace(case, inputs=ends)
    last = [dout[-entries:] for dout in douts]
    truth = Truth(_evaluate(small, last, torch.float64), _evaluate(small, last, None), tuple(last))
    return worst(got, truth, case.ours.factor)
