"""`pgolf doctor`: versions, the implementation that each op runs, and whether it is right on this machine."""

import os
from importlib import import_module
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS
from torch._library.simple_registry import singleton

from pgolf_fast import cores
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_json
from pgolf_fast.model.runtime import environment, resolve_dtype
from pgolf_fast.ops import attention_backend, cases, judge, lzma, native, tiles
from pgolf_fast.ops.case import Case

_PASSES = set(tiles.DEFAULTS) - {"weight_grad", "ngram_hash_embed", "muon"}  # ops in C++ on a CPU
Row = tuple[str, str, str, str, str, str]


def examine(*, check: bool, table: bool = False) -> tuple[str, bool]:
    """Return the report as text, and True if nothing is wrong."""
    if table:
        return f'{ops_table()}\n\nyes / no; "-": not meant to have one', True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    facts = [(name, str(value)) for name, value in environment().items()]
    facts += [("compute dtype 'auto'", str(dtype).removeprefix("torch.")), ("CPU cores", cpu_cores())]
    parts = [
        str(Table(None, facts)),
        str(implementations(device, dtype)),
        str(Table(("attention", "what it is", "here"), attention(device, dtype))),
    ]
    wrong: list[str] = []
    if check:
        rows = check_ops(device, dtype)
        parts.append(str(Table(("op", "dtype", "by", "compared", "error / allowed", "verdict"), rows)))
        wrong = list(dict.fromkeys(op for row in rows if row[-1] != "ok" for op in cases.CASES[row[0]].ops))
        parts += [f"do not use: {', '.join(wrong)}"] if wrong else []
    return "\n\n".join(parts), not wrong


def cpu_cores() -> str:
    """Return the cores, limits, threads and spin count of this process in one line."""
    quota, spins = cores.cpu_quota(), os.environ.get("GOMP_SPINCOUNT", "default")
    limited = "no CPU quota" if quota is None else f"a CPU quota of {quota:g}"
    machine = f"{os.cpu_count()} in this machine, {cores.allowed_cores()} by affinity, {limited}"
    return f"{machine}: {cores.threads()} threads; GOMP_SPINCOUNT {spins}"


def fetch_fa3() -> Path:
    """Download FlashAttention 3, built for this PyTorch and GPU, and remember where it is.

    Only this function uses the network: training loads what it left, and a newer build comes only with a new
    call. Raises PgolfError if the package `kernels` is missing, or has no build for this machine.
    """
    if not attention_backend.installed("kernels"):
        raise PgolfError("the package kernels is not installed: pip install 'pgolf-fast[fa3]'")
    try:
        module = import_module("kernels").get_kernel("kernels-community/flash-attn3", version=1)
    except Exception as error:
        raise PgolfError(f"FlashAttention 3 was not fetched: {error}") from error
    write_json(attention_backend.fetched_file(), {"torch": torch.__version__, "module": module.__file__})
    return Path(module.__file__)


def implementations(device: torch.device, dtype: torch.dtype) -> Table:
    """Return what each op runs on tensors of that device and dtype."""
    extension = native.extension()
    codec = "PyTorch" if extension is None else f"C++, SIMD: {extension.bits_simd()}"
    rows = [
        *((op, _implementation(op, device, dtype)) for op in tiles.DEFAULTS),
        ("pack_bits, unpack_bits, dequantize_bits", codec),
        ("lzma_compress, lzma_decompress", lzma.backend()),
    ]
    return Table(("op", "implementation"), rows)


def attention(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Return what `attention_backend.available` does, below the fused pass where that runs instead."""
    rows = attention_backend.available(device)
    if native.passes("gqa_attention", torch.empty(0, dtype=dtype, device=device)) is None:
        return rows
    rest = [(name, what, "available" if here == "chosen" else here) for name, what, here in rows]
    return [("C++", "own fused pass, XSA inside", "chosen"), *rest]


def _implementation(op: str, device: torch.device, dtype: torch.dtype) -> str:
    if tiles.uses_kernels(op, torch.empty(0, dtype=dtype, device=device)):
        return f"Triton, tiles for {tiles.architecture(device)}" if device.type == "cuda" else "Triton"
    if device.type != "cuda":
        fused = native.passes(op, torch.empty(0, dtype=dtype)) if op in _PASSES else None
        return "PyTorch" if fused is None else f"C++, SIMD: {fused.passes()}"
    by_choice = tiles.implementation(op) == "torch"
    return "PyTorch, by choice" if by_choice else "PyTorch: Triton does not support this GPU"


def public_ops() -> list[str]:
    """Return the names of the ops that a user may call, sorted."""
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pgolf::")
    }
    return sorted(name for name in names if not name.endswith("_backward"))


def kernels_of(name: str) -> str | None:
    """Return the key in `tiles.DEFAULTS` for an op's kernels; None if it has none."""
    return next((entry.kernels for entry in cases.CASES.values() if name in entry.ops), None)


def ops_table() -> Table:
    """Return the implementations of every public op, as PyTorch's registry lists them."""
    rows = []
    for name in public_ops():
        definition, kernel = OPDEFS.get(f"pgolf::{name}"), kernels_of(name)
        cuda = tiles.implementation(kernel) if kernel else "torch" if _has(name, "CUDA") else "-"
        fake = singleton.find(f"pgolf::{name}").fake_impl.kernel is not None
        autograd = definition is not None and definition._backward_fn is not None
        cpu, faked = ("yes" if has else "no" for has in (_has(name, "CPU"), fake))
        rows.append((name, cpu, cuda, faked, "yes" if autograd else "-"))
    return Table(("op", "cpu", "cuda", "fake", "autograd"), rows)


def _has(name: str, device: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(f"pgolf::{name}", key) for key in (device, "CompositeExplicitAutograd"))


def check_ops(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Run every case of the catalog and return a row for each dtype; the last cell is "ok" or the error."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [_check(name, device, kind) for name in cases.CASES for kind in _dtypes(name, device, dtype)]


def _dtypes(name: str, device: torch.device, dtype: torch.dtype) -> list[torch.dtype]:
    kernels = cases.CASES[name].kernels
    if kernels is None:
        return [torch.float32]
    kinds = list(dict.fromkeys((torch.float32, dtype)))
    probe = torch.empty(0, device=device)
    if probe.is_cuda and kernels == "gqa_attention" and not tiles.uses_kernels("gqa_attention", probe):
        kinds.remove(torch.float32)  # PyTorch's flash attention on a GPU runs in 16 bits only
    return kinds


def _check(name: str, device: torch.device, dtype: torch.dtype) -> Row:
    case = cases.make(name, dtype=dtype, device=device)
    start = (name, str(dtype).removeprefix("torch."), _by(case))
    try:
        truth = judge.truth_of(case)
        contenders = [case.ours(), case.ours(banks=False)] if case.grad_banks else [case.ours()]
        share = judge.worst([judge.judge(case, one, truth) for one in contenders]).share
    except Exception as error:  # noqa: BLE001 - whatever a broken op raises, it is named and the others still run
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        return (*start, "nothing", "-", f"FAILED: {reason}")
    counts = {"forward": sum(key.startswith("out") for key in truth.exact), "backward": len(case.trained)}
    counts["banks"] = len(case.grad_banks)
    compared = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return (*start, compared, f"{share:.2f}", "ok" if share <= 1 else "WRONG")


def _by(case: Case) -> str:
    if case.kernels is None:
        return "Python" if native.extension() is None else "C++"
    return "Triton" if tiles.uses_kernels(case.kernels, case.first) else "PyTorch"
