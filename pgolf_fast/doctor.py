"""`pgolf doctor`: what this machine has, which implementation each op uses, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_fast import ops, report
from pgolf_fast.ops import lzma, reference
from pgolf_fast.train.world import environment, resolve_dtype

# No Triton kernel is registered under an op yet; every device runs the plain PyTorch implementation.
IMPLEMENTATIONS = {
    "mlp": "PyTorch",
    "gqa_attention": "PyTorch, with its flash attention",
    "ngram_hash_embed": "PyTorch",
    "residual_norm": "PyTorch",
    "smear_gate": "PyTorch",
    "softcap_cross_entropy": "PyTorch, rows in blocks",
    "newton_schulz": "PyTorch",
    "int6_matmul": "PyTorch",
}


@dataclass(frozen=True)
class Doctor:
    """Arguments of `pgolf doctor`."""

    check: bool = False
    """Also run every op against its reference on this machine."""


def examine(*, check: bool) -> tuple[str, bool]:
    """The report as text, and whether nothing is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = [(name, str(value)) for name, value in environment().items()]
    facts.append(("compute dtype 'auto'", str(resolve_dtype("auto", device)).removeprefix("torch.")))
    implementations = {**IMPLEMENTATIONS, "lzma_compress, lzma_decompress": lzma.backend()}
    parts = [report.table(facts), report.table(list(implementations.items()), ("op", "implementation"))]
    healthy = True
    if check:
        rows = check_ops(device)
        healthy = all(row[-1] == "ok" for row in rows)
        parts.append(report.table(rows, ("op", "worst error", "allowed", "verdict")))
    return "\n\n".join(parts), healthy


def check_ops(device: torch.device) -> list[tuple[str, str, str, str]]:
    """Each op's forward against its reference in float64, on `device`."""
    return [_verdict(name, *make(device)) for name, make in _CASES.items()]


def _verdict(name: str, got: Tensor, want: Tensor) -> tuple[str, str, str, str]:
    error = float((got.double().cpu() - want.double().cpu()).abs().max())
    allowed = (2e-2 if got.dtype == torch.bfloat16 else 1e-4) * max(1.0, float(want.abs().max()))
    return name, f"{error:.1e}", f"{allowed:.1e}", "ok" if error <= allowed else "WRONG"


def _random(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def _mlp(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    x, up, down = r(2, 33, 64), r(3, 96, 64) / 8, r(3, 64, 96) / 8
    wide = reference.mlp(x.double(), up.double(), down.double(), 1, "leaky_relu_squared")
    return ops.mlp(x, up, down, 1, "leaky_relu_squared"), wide


def _attention(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    x, qo, kv, gain, value = r(2, 33, 64), r(6, 64, 64) / 8, r(6, 32, 64) / 8, r(4), r(2, 33, 32)
    angle = torch.outer(torch.arange(33.0), 10 ** -torch.arange(4.0)).to(device)
    if device.type == "cuda":  # flash attention on a GPU runs in 16 bits only
        x, qo, kv, value = (t.bfloat16() for t in (x, qo, kv, value))
    cos, sin = angle.cos(), angle.sin()
    got = ops.gqa_attention(x, qo, kv, gain, value, cos, sin, 1, num_kv_heads=2, xsa=True)
    x, qo, kv, gain, value, cos, sin = (t.double() for t in (x, qo, kv, gain, value, cos, sin))
    return got, reference.gqa_attention(x, qo, kv, gain, value, cos, sin, 1, 2, True)


def _hash(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    tokens = torch.randint(0, 50, (2, 33), generator=torch.Generator().manual_seed(1)).to(device)
    spaces = (torch.arange(50) % 3 == 0).to(device)
    table, scale, boost = r(64, 16), r(1)[0], r(1)[0]
    got = ops.ngram_hash_embed(tokens, table, spaces, scale, boost, pos_conditional=True, trigram=True)
    table, scale, boost = table.double(), scale.double(), boost.double()
    return got, reference.ngram_hash_embed(tokens, table, spaces, scale, boost, True, True)


def _norm(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    x, branch, x_scale, branch_scale = r(5, 64), r(5, 64), r(64), r(64)
    got = ops.residual_norm(x, branch, x_scale, branch_scale, 0.5)
    x, branch, x_scale, branch_scale = (t.double() for t in (x, branch, x_scale, branch_scale))
    return torch.stack(got), torch.stack(reference.residual_norm(x, branch, x_scale, branch_scale, 0.5))


def _smear(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    x, gate = r(2, 9, 64), r(64)
    return ops.smear_gate(x, gate), reference.smear_gate(x.double(), gate.double())


def _loss(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    x, weight = r(77, 64), r(50, 64)
    targets = (torch.arange(77) % 50).to(device)
    got = ops.softcap_cross_entropy(x, weight, targets, 30.0)
    return got, reference.softcap_cross_entropy(x.double(), weight.double(), targets, 30.0)


def _orthogonal(device: torch.device) -> tuple[Tensor, Tensor]:
    g = _random(device)(3, 48, 32)
    return ops.newton_schulz(g, 5), reference.newton_schulz(g.double(), 5)


def _int6(device: torch.device) -> tuple[Tensor, Tensor]:
    r = _random(device)
    codes = (torch.arange(32 * 24) % 64 - 32).to(torch.int8).view(32, 24)
    x, scale = r(5, 24), r(32).abs()
    packed = ops.int6_pack(codes).to(device)
    return ops.int6_matmul(x, packed, scale), x.double() @ (
        codes.to(device).double() * scale.double()[:, None]
    ).T


_CASES: dict[str, Callable[[torch.device], tuple[Tensor, Tensor]]] = {
    "mlp": _mlp,
    "gqa_attention": _attention,
    "ngram_hash_embed": _hash,
    "residual_norm": _norm,
    "smear_gate": _smear,
    "softcap_cross_entropy": _loss,
    "newton_schulz": _orthogonal,
    "int6_matmul": _int6,
}
