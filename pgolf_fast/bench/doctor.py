"""`pgolf doctor`: what this machine has, which implementation each op uses, and whether it is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pgolf_fast import console
from pgolf_fast.bench.doctor_checks import check_ops
from pgolf_fast.bench.doctor_coverage import COLUMNS, coverage
from pgolf_fast.model.runtime import environment, resolve_dtype
from pgolf_fast.ops import attention_backend, lzma, native, tiles


@dataclass(frozen=True)
class Doctor:
    """Arguments of `pgolf doctor`."""

    check: bool = False
    """Also run every op, forward and backward, against its reference on this machine."""
    table: bool = False
    """Print only what is implemented and tested: op by implementation, fake, autograd and kind of test."""


def examine(*, check: bool, table: bool = False) -> tuple[str, bool]:
    """The report as text, and whether nothing is wrong."""
    if table:
        cells, notes = coverage()
        return "\n\n".join([console.table(cells, ("op", *COLUMNS)), *notes]), True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    facts = [(name, str(value)) for name, value in environment().items()]
    facts.append(("compute dtype 'auto'", str(dtype).removeprefix("torch.")))
    parts = [console.table(facts), console.table(implementations(device, dtype), ("op", "implementation"))]
    parts.append(console.table(attention_backend.available(device), ("attention", "what it is", "here")))
    healthy = True
    if check:
        rows = check_ops(device, dtype)
        parts.append(console.table(rows, ("op", "dtype", "by", "compared", "error / allowed", "verdict")))
        wrong = list(dict.fromkeys(row[0].split(",")[0] for row in rows if row[-1] != "ok"))
        healthy = not wrong
        if wrong:
            parts.append(f"do not use: {', '.join(wrong)}")
    return "\n\n".join(parts), healthy


def implementations(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    """What each op runs on tensors of that device and dtype."""
    rows = [(op, _implementation(op, device, dtype)) for op in tiles.DEFAULTS]
    extension = native.extension()
    codec = "PyTorch" if extension is None else f"C++, SIMD: {extension.bits_simd()}"
    return [
        *rows,
        ("pack_bits, unpack_bits, dequantize_bits", codec),
        ("lzma_compress, lzma_decompress", lzma.backend()),
    ]


def _implementation(op: str, device: torch.device, dtype: torch.dtype) -> str:
    if tiles.uses_kernels(op, torch.empty(0, dtype=dtype, device=device)):
        return f"Triton, tiles for {tiles.architecture(device)}" if device.type == "cuda" else "Triton"
    if device.type != "cuda":
        return "PyTorch"
    return "PyTorch" + (
        ", by choice" if tiles.implementation(op) == "torch" else ": Triton does not serve this GPU"
    )
