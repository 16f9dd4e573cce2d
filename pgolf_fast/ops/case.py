"""A case: an op with inputs, its reference and its cost; and contenders, the implementations of a case."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["fwd", "fwd+bwd"]
MODES: tuple[Mode, ...] = ("fwd", "fwd+bwd")
Inputs = dict[str, Any]  # tensors; None for an optional input that is absent
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network and a batch, from which every case takes its shapes."""

    batch: int = 2
    length: int = 33
    dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    rotary: int = 8  # Rotated channels per head
    hidden: int = 96  # Hidden channels of an ungated MLP
    gated_hidden: int = 64
    up_rows: int = 96  # Rows of the MLP's up bank, for the optimizer's cases
    layers: int = 3  # Layers of the banks, for the optimizer's cases
    vocab: int = 50
    bigram_rows: int = 64
    bigram_dim: int = 16
    softcap: float = 30.0
    pos_conditional: bool = True
    trigram: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.kv_heads


@dataclass(frozen=True)
class Work:
    """Arithmetic of an op, and its ideal traffic: every operand and result moved once."""

    forward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_flops: float = 0.0
    backward_bytes: float = 0.0

    def of(self, mode: Mode) -> tuple[float, float]:
        """Return FLOPs and bytes of a mode."""
        if mode == "fwd":
            return self.forward_flops, self.forward_bytes
        return self.forward_flops + self.backward_flops, self.forward_bytes + self.backward_bytes


@dataclass(frozen=True)
class Contender:
    """One implementation of a case, bound to its inputs."""

    name: str
    function: Callable[..., Outputs]  # Called with `inputs` by name
    inputs: Inputs
    trained: tuple[str, ...] = ()  # Inputs that autograd differentiates
    banks: Mapping[str, Tensor] = field(default_factory=dict)
    """Gradient banks that backward adds into, by input name."""
    mutated: Mapping[str, Tensor] = field(default_factory=dict)
    """Initial values of the inputs that a call overwrites."""
    factor: float = 2.0  # Allowed multiple of eager's own error; infinite for peers that round the weights
    around: Callable[[], AbstractContextManager[object]] = nullcontext  # Context of forward and backward

    def forward(self) -> Outputs:
        """Run forward alone. Inputs that the op overwrites are not restored, so that only it is timed."""
        with self.around(), torch.no_grad():
            return self.function(**self.inputs)

    def fresh(self) -> Outputs:
        """Run forward on the initial inputs."""
        restored = {name: value.clone() for name, value in self.mutated.items()}
        return replace(self, inputs={**self.inputs, **restored}).forward()

    def both(self, douts: Sequence[Tensor]) -> tuple[Outputs, tuple[Tensor | None, ...]]:
        """Return outputs, and gradients of the trained inputs in order (None for those with a bank)."""
        leaves = [self.inputs[name] for name in self.trained]
        with self.around():
            outs = self.function(**self.inputs)
            return outs, torch.autograd.grad(outs, leaves, douts, allow_unused=True)

    def results(self, douts: Sequence[Tensor]) -> tuple[Outputs, dict[str, Tensor]]:
        """Return outputs, and gradients by input name, from autograd or the gradient banks."""
        for bank in self.banks.values():
            bank.zero_()
        outs, grads = self.both(douts)
        found = {**dict(zip(self.trained, grads, strict=True)), **self.banks}
        return outs, {name: grad for name, grad in found.items() if grad is not None}


@dataclass(frozen=True)
class Case:
    """An op with inputs and the reference that it must agree with."""

    inputs: Inputs
    op: Callable[..., Outputs]
    """Called with `inputs` by name and, optionally, gradient banks by the names in `grad_banks`."""
    reference: Callable[..., Outputs]  # Called with `inputs` by name
    batched: tuple[str, ...]  # Inputs whose first dimension is the batch: its entries are independent
    trained: tuple[str, ...] = ()  # Inputs with gradients; empty for an op without backward
    grad_banks: Mapping[str, str] = field(default_factory=dict)
    """Keyword of each gradient bank -> the input that it belongs to."""
    weights: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Name of each weight -> its bank and slot."""
    mutated: tuple[str, ...] = ()  # Inputs that the op overwrites
    work: Work = Work()
    tokens: int = 0  # Tokens, or rows of x; 0 if the op does not depend on them
    chunk: int = 1 << 30  # Entries of the batch that are evaluated at once in float64
    options: Mapping[str, Any] = field(default_factory=dict)  # Settings of the op that peers need too
    name: str = ""  # Name in the catalog; set by `make`, as are `kernels` and `sizes`
    sizes: Sizes = Sizes()
    kernels: str | None = None  # The op's name in `tiles.DEFAULTS`; None for ops without Triton kernels

    @property
    def first(self) -> Tensor:
        """The first floating-point input, or the first input."""
        tensors = [t for t in self.inputs.values() if t is not None]
        return next((t for t in tensors if t.is_floating_point()), tensors[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def batch(self) -> int:
        return self.inputs[self.batched[0]].shape[0]

    @property
    def blocks(self) -> int:
        """Blocks in which the batch is evaluated."""
        return -(-self.batch // self.chunk)

    def modes(self, wanted: Iterable[Mode]) -> list[Mode]:
        """Return those of `wanted` that the op has."""
        return [mode for mode in wanted if mode == "fwd" or self.trained]

    def ours(self, *, banks: bool = True) -> Contender:
        """Return the op itself, adding weight gradients into gradient banks if it has any."""
        initial = {name: self.inputs[name] for name in self.mutated}
        inputs = {**self.inputs, **{name: t.clone() for name, t in initial.items()}}
        grads = {
            keyword: torch.zeros_like(self.inputs[name], dtype=torch.float32)
            for keyword, name in (self.grad_banks.items() if banks else ())
        }
        held = {self.grad_banks[keyword]: grad.detach() for keyword, grad in grads.items()}
        return Contender("ours", partial(self.op, **grads), inputs, self.trained, held, initial)

    def by_weight(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split gradients "d BANK" into those of the weights in its slots."""
        split = {k: grad for k, grad in gradients.items() if k[2:] not in self.unused_slots()}
        for weight, (bank, slot) in self.weights.items():
            if f"d {bank}" in gradients:
                split[f"d {weight}"] = gradients[f"d {bank}"][slot]
        return split

    def unused_slots(self) -> dict[str, list[int]]:
        """Return the slots of each bank that the op must not change."""
        used: dict[str, set[int]] = {}
        for bank, slot in self.weights.values():
            used.setdefault(bank, set()).add(slot)
        return {bank: sorted({*range(len(self.inputs[bank]))} - slots) for bank, slots in used.items()}
