"""`pgolf doctor --check`: every op, forward and backward, against its formula in float64 on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.ops import native, reference, tiles
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum

Row = tuple[str, str, str, str, str, str]
_BYTES = torch.arange(5000).remainder(251).to(torch.uint8)


@dataclass(frozen=True)
class Check:
    """An op with inputs and the formula it must agree with.

    `low` are the positions of the inputs in the compute dtype; other floats stay float32. With `banks`, the
    op takes gradient banks for the inputs at those positions as well, and is checked with and without.
    """

    op: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: Sequence[Tensor | None]
    low: Sequence[int] = ()
    banks: Sequence[int] = ()
    backward: bool = True
    kernels: str | None = None
    """The op's name in tiles.DEFAULTS, if it has kernels."""

    def cast(self, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
        placed = [t if t is None else t.to(device) for t in self.inputs]
        return [t.to(dtype) if t is not None and i in self.low else t for i, t in enumerate(placed)]


def check_ops(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """One row for each op and dtype; the last cell is "ok", or says what is wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checks = {name: make() for name, make in CHECKS.items()}
        return [
            _judge(name, check, device, kind)
            for name, check in checks.items()
            for kind in _dtypes(check, device, dtype)
        ]


def _dtypes(check: Check, device: torch.device, dtype: torch.dtype) -> list[torch.dtype]:
    if not check.low:
        dtypes = [t.dtype for t in check.inputs if t is not None]
        return [next((kind for kind in dtypes if kind.is_floating_point), dtypes[0])]
    kinds = list(dict.fromkeys((torch.float32, dtype)))
    example = torch.empty(0, device=device)
    if (
        device.type == "cuda"
        and check.kernels == "gqa_attention"
        and not tiles.uses_kernels("gqa_attention", example)
    ):
        kinds.remove(torch.float32)  # PyTorch's flash attention on a GPU runs in 16 bits only
    return kinds


def _judge(name: str, check: Check, device: torch.device, dtype: torch.dtype) -> Row:
    inputs = check.cast(device, dtype)
    start = (name, str(dtype).removeprefix("torch."), _by(check, torch.empty(0, dtype=dtype, device=device)))
    try:
        worst, compared = _compare(check, inputs)
    except Exception as error:  # noqa: BLE001 - whatever a broken op raises, it is named and the others still run
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        return (*start, "nothing", "-", f"FAILED: {reason}")
    return (*start, compared, f"{worst:.2f}", "ok" if worst <= 1 else "WRONG")


def _by(check: Check, probe: Tensor) -> str:
    if check.kernels is None:
        return "Python" if native.extension() is None else "C++"
    return "Triton" if tiles.uses_kernels(check.kernels, probe) else "PyTorch"


def _compare(check: Check, inputs: Sequence[Tensor | None]) -> tuple[float, str]:
    """The largest error as a share of what is allowed, and how many tensors it was taken over."""
    nothing = [None] * len(check.banks)
    outs, grads, douts = _results(lambda *t: check.op(*t, *nothing), inputs, check.backward)
    low_outs, low_grads, _ = _results(check.formula, inputs, check.backward, douts)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    exact_outs, exact_grads, _ = _results(check.formula, wide, check.backward, douts)
    exacts, lows = exact_outs + exact_grads, low_outs + low_grads
    shares = [_share(*triple, exacts) for triple in zip(outs + grads, lows, exacts, strict=True)]
    compared = f"{len(outs)} forward"
    if grads:
        compared += f", {len(grads)} backward"
    if check.banks:
        held, dense, eager = _bank_gradients(check, inputs, douts), dict(enumerate(exact_grads)), low_grads
        floats = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]
        for position, bank in zip(check.banks, held, strict=True):
            index = floats.index(position)
            shares.append(_share(bank, eager[index], dense[index], exacts))
        compared += f", {len(held)} banks"
    return max(shares), compared


def _share(got: Tensor, low: Tensor, exact: Tensor, exacts: Sequence[Tensor]) -> float:
    """Error over allowed error: thrice eager's own in the same dtype, and a rounding of the largest value.

    Few numbers are no yardstick, and may be sums that cancel: they are judged by the largest value of all.
    """
    if got.shape != exact.shape:
        raise RuntimeError(f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}")
    error, eager = ((t.double() - exact).abs().max().item() for t in (got, low))
    few = exact.numel() < 16
    size = max(float(t.abs().max()) for t in exacts) if few else float(exact.abs().max())
    eps = torch.finfo(low.dtype).eps if low.is_floating_point() else 0.0
    share = error / (3 * eager + 2 * (4 if few else 1) * eps * size + 1e-6)
    return share if share == share else float("inf")


def _results(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    backward: bool,
    douts: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor]]:
    leaves = [
        t if t is None else t.detach().requires_grad_(backward and t.is_floating_point()) for t in inputs
    ]
    out = function(*leaves)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    if not backward:
        return outs, [], []
    if douts is None:
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    floats = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outs, floats, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])
    return [o.detach() for o in outs], list(grads), douts


def _bank_gradients(check: Check, inputs: Sequence[Tensor | None], douts: Sequence[Tensor]) -> list[Tensor]:
    held = [
        torch.zeros_like(t, dtype=torch.float32) for t in (inputs[i] for i in check.banks) if t is not None
    ]
    leaves = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    check.op(*leaves, *held).backward(douts[0])
    return held


def _mlp(kind: str) -> Check:
    rows = 96 * (2 if kind == "swiglu" else 1)
    inputs = [torch.randn(2, 33, 64), torch.randn(3, rows, 64) / 8, torch.randn(3, 64, 96) / 8]

    def op(x: Tensor, up: Tensor, down: Tensor, grad_up: Tensor | None, grad_down: Tensor | None) -> Tensor:
        return ops.mlp(x, up, down, 1, kind, grad_up=grad_up, grad_down=grad_down)

    def formula(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return reference.mlp(x, up, down, 1, kind)

    return Check(op, formula, inputs, low=(0, 1, 2), banks=(1, 2), kernels="mlp")


def _attention(xsa: bool, value: bool) -> Check:
    angle = torch.outer(torch.arange(33.0), 10 ** -torch.arange(4.0))
    weights = [torch.randn(6, 64, 64) / 8, torch.randn(6, 32, 64) / 8]
    value_embed = torch.randn(2, 33, 32) if value else None
    inputs = [torch.randn(2, 33, 64), *weights, torch.randn(4), value_embed]

    def op(x, qo, kv, gain, embed, grad_qo, grad_kv):  # type: ignore[no-untyped-def]
        cos, sin = angle.cos().to(x.device), angle.sin().to(x.device)
        return ops.gqa_attention(
            x, qo, kv, gain, embed, cos, sin, 1, num_kv_heads=2, xsa=xsa, grad_qo=grad_qo, grad_kv=grad_kv
        )

    def formula(x, qo, kv, gain, embed):  # type: ignore[no-untyped-def]
        cos, sin = angle.cos().to(x.device), angle.sin().to(x.device)
        return reference.gqa_attention(x, qo, kv, gain, embed, cos, sin, 1, 2, xsa)

    return Check(op, formula, inputs, low=(0, 1, 2, 4), banks=(1, 2), kernels="gqa_attention")


def _hash() -> Check:
    tokens, spaces = torch.randint(0, 50, (2, 33)), torch.arange(50) % 3 == 0
    inputs = [tokens, torch.randn(64, 16), spaces, torch.randn(()), torch.randn(())]
    return Check(
        lambda *t: ops.ngram_hash_embed(*t, pos_conditional=True, trigram=True),
        partial(reference.ngram_hash_embed, pos_conditional=True, trigram=True),
        inputs,
        kernels="ngram_hash_embed",
    )


def _norm() -> Check:
    inputs = [torch.randn(5, 64), torch.randn(5, 64), torch.randn(64), torch.randn(64)]
    return Check(
        partial(ops.residual_norm, layer_scale=0.5),
        partial(reference.residual_norm, layer_scale=0.5),
        inputs,
        low=(0, 1),
        kernels="residual_norm",
    )


def _smear() -> Check:
    inputs = [torch.randn(2, 9, 64), torch.randn(64)]
    return Check(ops.smear_gate, reference.smear_gate, inputs, low=(0,), kernels="smear_gate")


def _loss() -> Check:
    targets = torch.arange(77) % 50
    inputs = [torch.randn(77, 64), torch.randn(50, 64)]
    return Check(
        lambda x, w: ops.softcap_cross_entropy(x, w, targets.to(x.device), 30.0),
        lambda x, w: reference.softcap_cross_entropy(x, w, targets.to(x.device), 30.0),
        inputs,
        low=(0, 1),
        kernels="softcap_cross_entropy",
    )


def _orthogonal() -> Check:
    return Check(
        lambda g: ops.newton_schulz(g, 5),
        lambda g: reference.newton_schulz(g, 5),
        [torch.randn(3, 48, 32)],
        low=(0,),
        backward=False,
        kernels="newton_schulz",
    )


def _momentum() -> Check:
    def op(grad: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        buffer = buffer.clone()
        return muon_momentum(grad, buffer, 0.95), buffer

    def formula(grad: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        new = 0.95 * buffer + grad.to(buffer.dtype)
        return grad.to(buffer.dtype) + 0.95 * new, new

    inputs = [torch.randn(3, 48, 33).bfloat16().float(), torch.randn(3, 48, 33)]
    return Check(op, formula, inputs, low=(1,), backward=False, kernels="muon")


def _apply() -> Check:
    def op(master: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        new, shadow = master.clone(), torch.empty_like(update)
        muon_apply(new, update, 0.02, weight_decay=0.04, scale=1.5, shadow=shadow)
        return new, shadow

    def formula(master: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        new = (1 - 0.02 * 0.04) * master - 0.02 * 1.5 * update.to(master.dtype)
        return new, new.to(update.dtype)

    inputs = [torch.randn(3, 48, 33), torch.randn(3, 48, 33)]
    return Check(op, formula, inputs, low=(1,), backward=False, kernels="muon")


def _int6() -> Check:
    codes = (torch.arange(32 * 24) % 64 - 32).to(torch.int8).view(32, 24)
    packed = ops.int6_pack(codes)
    return Check(
        lambda x, scale: ops.int6_matmul(x, packed.to(x.device), scale),
        lambda x, scale: (x.to(scale.dtype) @ (codes.to(scale) * scale[:, None]).T).to(x.dtype),
        [torch.randn(5, 24), torch.rand(32)],
        low=(0,),
        backward=False,
        kernels="int6_matmul",
    )


def _bits(bits: int) -> Check:
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (7, 37), dtype=torch.int8)

    def op(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        packed = ops.pack_bits(codes, bits)
        return ops.unpack_bits(packed, 37, bits), ops.dequantize_bits(packed, scale, 37, bits, torch.float32)

    inputs = [codes, torch.rand(7)]
    return Check(op, lambda codes, scale: (codes, codes * scale[:, None]), inputs, backward=False)


def _lzma() -> Check:
    def op(data: Tensor) -> Tensor:
        return ops.lzma_decompress(ops.lzma_compress(data.cpu()), data.numel()).to(data.device)

    return Check(op, lambda t: t, [_BYTES], backward=False)


# the words before a comma are the ops a check is about
CHECKS: dict[str, Callable[[], Check]] = {
    "mlp, leaky_relu_squared": lambda: _mlp("leaky_relu_squared"),
    "mlp, relu_squared": lambda: _mlp("relu_squared"),
    "mlp, swiglu": lambda: _mlp("swiglu"),
    "gqa_attention": lambda: _attention(False, False),
    "gqa_attention, XSA and value embedding": lambda: _attention(True, True),
    "ngram_hash_embed": _hash,
    "residual_norm": _norm,
    "smear_gate": _smear,
    "softcap_cross_entropy": _loss,
    "newton_schulz": _orthogonal,
    "muon_momentum": _momentum,
    "muon_apply": _apply,
    "int6_matmul": _int6,
    **{f"pack_bits + unpack_bits + dequantize_bits, {b} bits": partial(_bits, b) for b in range(4, 9)},
    "lzma_compress + lzma_decompress": _lzma,
}
