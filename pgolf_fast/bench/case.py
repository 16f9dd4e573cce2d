"""One measurable thing: an op with inputs, our call, other ways to compute the same, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

Mode = Literal["fwd", "fwd+bwd"]
MODES: tuple[Mode, ...] = ("fwd", "fwd+bwd")
Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Work:
    """Arithmetic of an op, and the traffic that cannot be avoided: operands and results once each way."""

    forward_flops: float
    forward_bytes: float
    backward_flops: float = 0.0
    backward_bytes: float = 0.0

    def of(self, mode: Mode) -> tuple[float, float]:
        """FLOPs and bytes of a mode."""
        if mode == "fwd":
            return self.forward_flops, self.forward_bytes
        return self.forward_flops + self.backward_flops, self.forward_bytes + self.backward_bytes


@dataclass(frozen=True)
class Contender:
    """One way to compute a case, with the tensors it reads bound in."""

    name: str
    run: Callable[[], Outputs]
    leaves: dict[str, Tensor]
    """What autograd differentiates, by input name."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """Gradient slots that backward adds to instead, by input name."""
    factor: float = 3.0
    """How many times eager's own error the result may have; infinity for peers that round weights."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What forward and backward run in."""

    def forward(self) -> Outputs:
        with self.around(), torch.no_grad():
            return self.run()

    def both(self, douts: Sequence[Tensor]) -> tuple[Outputs, tuple[Tensor | None, ...]]:
        """Outputs, and gradients of the leaves in their order."""
        with self.around():
            outs = self.run()
            return outs, torch.autograd.grad(outs, list(self.leaves.values()), douts, allow_unused=True)

    def results(self, douts: Sequence[Tensor]) -> tuple[Outputs, dict[str, Tensor]]:
        """Outputs and gradients by input name, wherever this contender puts them."""
        for slot in self.held.values():
            slot.zero_()
        outs, grads = self.both(douts)
        found = {**dict(zip(self.leaves, grads, strict=True)), **self.held}
        return outs, {name: grad for name, grad in found.items() if grad is not None}


@dataclass(frozen=True)
class Formula:
    """PyTorch code for a case, called with its inputs by name."""

    function: Function
    backend: SDPBackend | None = None
    """The one attention kernel that it may use; None leaves the choice to PyTorch."""


@dataclass(frozen=True)
class Case:
    """An op at one shape. The first formula is the definition: it is also run in float64."""

    op: str
    kernel_op: str
    """The op's name in `ops.launch`."""
    tokens: int
    shape: dict[str, int]
    inputs: dict[str, Tensor]
    batched: tuple[str, ...]
    """Inputs whose first dimension is the batch: every entry of it is computed independently."""
    trained: tuple[str, ...]
    """Inputs with gradients; none for an op without backward."""
    ours: Contender
    formulas: dict[str, Formula]
    work: Work
    chunk: int = 1
    """Entries of the batch computed at once in float64."""
    variants: dict[str, Contender | str] = field(default_factory=dict)
    """Our op with something chosen that is not the default, by peer name; or why this machine cannot."""
    constants: dict[str, float] = field(default_factory=dict)
    """Numbers that a peer from another package needs as well."""

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.inputs.values() if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    def modes(self, wanted: Sequence[Mode]) -> list[Mode]:
        """Those of `wanted` that the op has."""
        return [mode for mode in wanted if mode == "fwd" or self.trained]

    def leaves(self) -> dict[str, Tensor]:
        return {name: self.inputs[name] for name in self.trained}

    def contender(self, name: str, formula: Formula, function: Function | None = None) -> Contender:
        """`formula` on this case's inputs; `function` replaces its code (say, by a compiled one)."""
        call = function or formula.function

        def run() -> Outputs:
            if formula.backend is None:
                return call(**self.inputs)
            with torch.nn.attention.sdpa_kernel(formula.backend):
                return call(**self.inputs)

        return Contender(name, run, self.leaves(), factor=10.0)
