"""The one comparison of an op with its reference, for tests, `pgolf doctor`, `pgolf bench` and `pgolf tune`.

A result may miss the float64 answer by at most twice what the reference itself misses it by in the inputs'
dtype, plus one rounding of the largest value and 1e-6.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf_fast.ops.case import Case, Contender, Inputs

Named = dict[str, Tensor]
FACTOR = 2.0
# Fewer numbers may be lucky sums: their rounding is that of the largest result or incoming gradient.
# (XSA of one token is exactly zero, and so is eager's error; ours was up to 2.1e-6 for the query gain.)
FEW = 16


@dataclass(frozen=True)
class Verdict:
    """The largest error of one result, and the allowed error."""

    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def share(self) -> float:
        """Error over allowed error; infinite for NaN."""
        return self.error / self.allowed if self.error == self.error and self.allowed else float("inf")

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2e}, allowed {self.allowed:.2e}"


@dataclass(frozen=True)
class Truth:
    """Results of the reference in float64 (`exact`) and in the dtype of the case (`low`), by name."""

    exact: Named
    low: Named
    douts: tuple[Tensor, ...]  # Incoming gradients of the outputs; empty if only forward is judged
    eps: float  # Rounding of the coarsest input dtype
    summing: float = 0.0
    """Allowance for gradients that are float32 sums over all tokens, as a share of the largest value."""


def truth_of(case: Case, *, backward: bool | None = None) -> Truth:
    """Evaluate the reference of `case`, in blocks of the batch; with gradients if the op has any."""
    backward = bool(case.trained) if backward is None else backward
    douts: tuple[Tensor, ...] = ()
    if backward:
        with torch.no_grad():
            first = case.reference(**_block(case, 0, 1, None))
        douts = tuple(torch.randn(case.batch, *o.shape[1:], dtype=o.dtype, device=o.device) for o in first)
    exact, low = _evaluate(case, douts, torch.float64), _evaluate(case, douts, None)
    # The rounding of a plain sum grows with the root of its length; sums over blocks are shorter.
    summing = 4 * torch.finfo(torch.float32).eps * max(case.tokens, 1) ** 0.5 if case.blocks > 1 else 0.0
    return Truth(exact, low, douts, coarsest(case.inputs.values()), summing)


def coarsest(tensors: Iterable[Tensor | None]) -> float:
    """Return the largest eps of the floating-point tensors; 0 without any."""
    floats = (t for t in tensors if t is not None and t.is_floating_point())
    return max((torch.finfo(t.dtype).eps for t in floats), default=0.0)


def _block(case: Case, start: int, stop: int, dtype: torch.dtype | None) -> Inputs:
    """Return the inputs for some entries of the batch, as leaves, floating-point ones in `dtype`."""
    block: Inputs = {}
    for name, tensor in case.inputs.items():
        if tensor is None:
            block[name] = None
            continue
        piece = tensor.detach()[start:stop] if name in case.batched else tensor.detach()
        piece = piece.to(dtype) if dtype is not None and piece.is_floating_point() else piece
        block[name] = piece.requires_grad_() if name in case.trained else piece
    return block


def _evaluate(case: Case, douts: Sequence[Tensor], dtype: torch.dtype | None) -> Named:
    """Return outputs ("out0", ...) and gradients ("d x", ...) of the reference."""
    pieces: dict[str, list[Tensor]] = {}
    shared: Named = {}
    for start in range(0, case.batch, case.chunk):
        block = _block(case, start, start + case.chunk, dtype)
        with torch.set_grad_enabled(bool(douts)):
            outs = case.reference(**block)
        for i, out in enumerate(outs):
            pieces.setdefault(f"out{i}", []).append(out.detach())
        if not douts:
            continue
        incoming = [d[start : start + case.chunk].to(o.dtype) for d, o in zip(douts, outs, strict=True)]
        grads = torch.autograd.grad(outs, [block[name] for name in case.trained], incoming)
        for name, grad in zip(case.trained, grads, strict=True):
            if name in case.batched:
                pieces.setdefault(f"d {name}", []).append(grad)
            elif case.blocks == 1:
                shared[f"d {name}"] = grad
            else:  # every block adds to it
                shared[f"d {name}"] = shared.get(f"d {name}", torch.zeros_like(grad).double()) + grad.double()
    return {**{name: torch.cat(parts) for name, parts in pieces.items()}, **case.by_weight(shared)}


def judge(case: Case, contender: Contender, truth: Truth) -> Verdict:
    """Return the worst verdict on the results of `contender`: outputs, and gradients if `truth` has them."""
    outs, grads = contender.results(truth.douts) if truth.douts else (contender.fresh(), {})
    for name, slots in case.unused_slots().items():
        if name in grads and bool(grads[name][slots].any()):
            return Verdict(f"d {name} changed outside its slots", float("nan"), 0.0)
    gradients = case.by_weight({f"d {name}": grad for name, grad in grads.items()})
    got = {**{f"out{i}": out.detach() for i, out in enumerate(outs)}, **gradients}
    return worst(verdicts(got, truth, contender.factor))


def worst(found: Sequence[Verdict]) -> Verdict:
    """Return the verdict with the largest share of its allowed error."""
    return max(found, key=lambda verdict: verdict.share)


def verdicts(got: Mapping[str, Tensor], truth: Truth, factor: float = FACTOR) -> list[Verdict]:
    """Return one verdict for each result in `got` that `truth` knows."""
    largest = max(_largest(t) for t in (*truth.exact.values(), *truth.douts))
    known = [name for name in got if name in truth.exact]
    return [_verdict(name, got[name], truth, factor, largest) for name in known]


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _verdict(name: str, got: Tensor, truth: Truth, factor: float, largest: float) -> Verdict:
    exact, low = truth.exact[name], truth.low[name]
    few, summed = exact.numel() < FEW, truth.summing and low.dtype == torch.float64
    # A gradient bank may take a product before or after its rounding to the weights' dtype.
    eps = truth.eps if few or summed else coarsest((got, low))
    rounding = (eps + (truth.summing if summed else 0.0)) * (largest if few else _largest(exact))
    return verdict(name, got, low, exact, factor=factor * (4 if few else 1), atol=1e-6 + rounding)


def verdict(
    what: str, got: Tensor, low: Tensor, exact: Tensor, *, factor: float = FACTOR, atol: float = 1e-6
) -> Verdict:
    """Compare the largest error of `got` with `factor` times that of `low`, plus `atol`."""
    if got.shape != exact.shape:
        return Verdict(f"{what} has shape {tuple(got.shape)}, not {tuple(exact.shape)}", float("nan"), 0.0)
    if not got.numel():
        return Verdict(what, 0.0, atol)
    error, eager = (float((t.double() - exact.double()).abs().max()) for t in (got, low))
    return Verdict(what, error, factor * eager + atol)


def judge_tail(case: Case, contender: Contender, entries: int) -> Verdict:
    """Judge the last entries of the batch, computed among all, against the same entries alone.

    For tensors whose offsets exceed 32 bits. Gradients of inputs that entries share must only be finite.
    """
    douts = tuple(torch.randn_like(out) for out in contender.forward())
    outs, grads = contender.results(douts)
    for name, grad in grads.items():
        if name not in case.batched and not bool(torch.isfinite(grad).all()):
            return Verdict(f"d {name} is not finite", float("nan"), 0.0)
    tail = {f"d {name}": grad[-entries:] for name, grad in grads.items() if name in case.batched}
    got = {**{f"out{i}": out.detach()[-entries:] for i, out in enumerate(outs)}, **tail}
    ends = {
        name: t.detach()[-entries:] if t is not None and name in case.batched else t
        for name, t in case.inputs.items()
    }
    small, last = replace(case, inputs=ends), [dout[-entries:] for dout in douts]
    exact, low = _evaluate(small, last, torch.float64), _evaluate(small, last, None)
    return worst(verdicts(got, Truth(exact, low, tuple(last), coarsest(ends.values())), contender.factor))
