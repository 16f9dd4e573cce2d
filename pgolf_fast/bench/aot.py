"""`pgolf aot`: every kernel at the shapes of presets, compiled for GPUs that need not be here.

The cases call the public ops, forward and backward, so what is compiled is what training launches: the same
launch table, the same specialisation on strides and alignment. The tensors' values mean nothing here.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pgolf_fast import console, ops
from pgolf_fast.bench.compile_only import SHARED_LIMIT, Compiled, compile_only
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.presets import preset
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import attention_backend, tiles
from pgolf_fast.ops.bits import row_bytes
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum
from pgolf_fast.ops.ngram_hash import choose_table_gradient

TOKENS = 2048
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One specialisation of one kernel on one architecture."""

    case: str
    compiled: Compiled

    def cells(self) -> tuple[object, ...]:
        c = self.compiled
        numbers = (c.warps, c.stages, c.registers, c.spill_bytes, c.shared_bytes)
        return (c.kernel, f"sm_{c.arch}", *numbers, c.tensor_core_instructions, c.tma_instructions, self.case)

    def record(self) -> dict[str, object]:
        return dict(zip((name.replace(" ", "_") for name in HEADER), self.cells(), strict=True))


_NUMBERS = ("warps", "stages", "registers", "spill bytes", "shared bytes", "tensor core", "TMA")
HEADER = ("kernel", "arch", *_NUMBERS, "case")


def compile_presets(names: Sequence[str], architectures: Sequence[int]) -> tuple[list[Row], list[str]]:
    """Compile every case of every preset for every architecture; specialisations that repeat count once.

    Returns the rows, and a line for each case with a kernel that takes more than its GPU has. Raises
    PgolfError where nothing can be compiled.
    """
    if importlib.util.find_spec("triton") is None:
        raise PgolfError("Triton is not installed, and `pgolf aot` compiles with it: pip install triton")
    configs = [preset(name).model for name in names]
    rows: list[Row] = []
    misfits: list[str] = []
    for arch in architectures:
        with compile_only(arch) as compiled, tiles.kernels_on_cpu(row_of(arch)):
            for config in configs:
                for case, run in CASES.items():
                    before = len(compiled)
                    misfits += _run(case, run, config, arch)
                    rows += [Row(case, entry) for entry in compiled[before:]]
    return rows, list(dict.fromkeys(misfits))


def row_of(arch: int) -> str:
    """The launch table's row for a compute capability."""
    return "sm80" if arch < 90 else "sm90" if arch < 100 else "sm100"


def _run(case: str, run: Callable[[ModelConfig], None], config: ModelConfig, arch: int) -> list[str]:
    from triton.runtime.errors import OutOfResources

    try:
        run(config)
    except OutOfResources as error:
        return [f"{case} does not fit sm_{arch}: {error}"]
    return []


def table(rows: Sequence[Row]) -> str:
    """All rows, sorted by architecture and kernel."""
    cells = sorted((row.cells() for row in rows), key=lambda c: (int(str(c[1])[3:]), c))
    return console.table(cells, HEADER)


def write(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """The table as JSON, with the versions that made it."""
    import triton

    about = {"triton": triton.__version__, "torch": torch.__version__, "presets": list(names)}
    content = {**about, "tokens": TOKENS, "dtype": str(DTYPE), "kernels": [row.record() for row in rows]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def problems(rows: Sequence[Row]) -> list[str]:
    """What would make a kernel slow or impossible on Hopper (shared memory: on any GPU), one line each."""
    multiplies = kernels_in_source()
    lines = []
    for row in rows:
        entry = row.compiled
        name = f"{entry.kernel} on sm_{entry.arch} ({row.case})"
        if entry.shared_bytes > SHARED_LIMIT[entry.arch]:
            limit = SHARED_LIMIT[entry.arch]
            lines.append(f"{name}: {entry.shared_bytes} bytes of shared memory, but there are {limit}")
        if entry.arch == 90 and entry.spill_bytes:
            lines.append(f"{name}: {entry.spill_bytes} bytes of registers spill to memory")
        if entry.arch == 90 and multiplies.get(entry.kernel) and not entry.count("HGMMA"):
            lines.append(f"{name}: multiplies matrices without HGMMA")
    return lines


def unreached(rows: Sequence[Row]) -> list[str]:
    """Kernels of the project that no case has launched."""
    reached = {row.compiled.kernel for row in rows}
    return [name for name in kernels_in_source() if name not in reached]


def kernels_in_source() -> dict[str, bool]:
    """Every kernel of kernels/*.py, and whether it, or a device function it calls, multiplies matrices."""
    calls: dict[str, set[str]] = {}
    for folder in _kernel_folders():
        for path in sorted(folder.glob("*.py")):
            for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(function, ast.FunctionDef) and _is_jit(function):
                    calls.setdefault(function.name, set()).update(_called(function))
    return {name: _reaches_dot(name, calls) for name in sorted(calls) if name.endswith("_kernel")}


def _kernel_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("pgolf_fast.kernels")
    yield from map(Path, spec.submodule_search_locations or () if spec else ())


def _is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).split("(")[0].endswith("jit") for decorator in function.decorator_list)


def _called(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func).split(".")[-1] if "tl.dot" not in ast.unparse(node.func) else "tl.dot"
            )


def _reaches_dot(name: str, calls: dict[str, set[str]]) -> bool:
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current == "tl.dot":
            return True
        if current in calls and current not in seen:
            seen.add(current)
            waiting += calls[current]
    return False


def _leaf(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def _bank_shapes(c: ModelConfig) -> dict[str, tuple[int, int, int]]:
    return {
        "qo": (2 * c.num_layers, c.model_dim, c.model_dim),
        "kv": (2 * c.num_layers, c.kv_dim, c.model_dim),
        "up": (c.num_layers, c.mlp_up_rows, c.model_dim),
        "down": (c.num_layers, c.model_dim, c.mlp_hidden),
    }


def _mlp(c: ModelConfig, banked: bool) -> None:
    shapes = _bank_shapes(c)
    x, up, down = _leaf(1, TOKENS, c.model_dim), _leaf(*shapes["up"]), _leaf(*shapes["down"])
    grad_up, grad_down = (torch.zeros(shapes[name]) if banked else None for name in ("up", "down"))
    ops.mlp(x, up, down, 1, c.mlp_activation, grad_up=grad_up, grad_down=grad_down).sum().backward()
    with torch.no_grad():
        ops.mlp(x, up, down, 1, c.mlp_activation)


def _attention(
    c: ModelConfig, banked: bool, xsa: bool, value: bool = False, window: int | None = None
) -> None:
    shapes = _bank_shapes(c)
    x, qo, kv = _leaf(1, TOKENS, c.model_dim), _leaf(*shapes["qo"]), _leaf(*shapes["kv"])
    grad_qo, grad_kv = (torch.zeros(shapes[name]) if banked else None for name in ("qo", "kv"))
    gain = _leaf(c.num_heads, dtype=torch.float32)
    value_embed = _leaf(1, TOKENS, c.kv_dim) if value else None
    cos, sin = rope_tables(c, TOKENS, x.device)

    def attend() -> Tensor:
        return ops.gqa_attention(
            x,
            qo,
            kv,
            gain,
            value_embed,
            cos,
            sin,
            1,
            num_kv_heads=c.num_kv_heads,
            xsa=xsa,
            grad_qo=grad_qo,
            grad_kv=grad_kv,
            window=window,
        )

    attend().sum().backward()
    with torch.no_grad():
        attend()


def _attention_of_a_library(c: ModelConfig) -> None:
    """What our kernels do around it; PyTorch's attention for CPUs stands for all of them."""
    attention_backend.choose("flash")
    try:
        _attention(c, banked=True, xsa=True)
    finally:
        attention_backend.choose("auto")


def _ngram_hash(c: ModelConfig) -> None:
    if not c.bigram_vocab_size:
        return
    tokens = torch.arange(TOKENS).remainder(c.vocab_size).view(1, TOKENS)
    table = _leaf(c.bigram_vocab_size, c.bigram_dim, dtype=torch.float32)
    scale, boost = _leaf(dtype=torch.float32), _leaf(dtype=torch.float32)
    spaces = torch.zeros(c.vocab_size, dtype=torch.bool)
    ops.ngram_hash_embed(
        tokens,
        table,
        spaces,
        scale,
        boost,
        pos_conditional=c.pos_conditional,
        trigram=c.trigram,
        out_dtype=DTYPE,
    ).sum().backward()


def _ngram_hash_atomic(c: ModelConfig) -> None:
    choose_table_gradient("atomic")
    try:
        _ngram_hash(c)
    finally:
        choose_table_gradient("sorted")


def _residual_norm(c: ModelConfig, scaled: bool, wider: int = 1) -> None:
    x, branch = (_leaf(1, TOKENS // wider, wider * c.model_dim) for _ in range(2))
    scales = [_leaf(wider * c.model_dim, dtype=torch.float32) for _ in range(2)]
    mixed, normed = ops.residual_norm(x, branch, scales[0] if scaled else None, scales[1], 0.5)
    (mixed.sum() + normed.sum()).backward()


def _smear_gate(c: ModelConfig) -> None:
    ops.smear_gate(_leaf(1, TOKENS, c.model_dim), _leaf(c.model_dim, dtype=torch.float32)).sum().backward()


def _cross_entropy(c: ModelConfig) -> None:
    x, head = _leaf(1, TOKENS, c.model_dim), _leaf(c.vocab_size, c.model_dim)
    targets = torch.arange(TOKENS).remainder(c.vocab_size).view(1, TOKENS)
    ops.softcap_cross_entropy(x, head, targets, c.logit_softcap).sum().backward()
    with torch.no_grad():
        ops.softcap_cross_entropy(x, head, targets, c.logit_softcap)


def _int6(c: ModelConfig, tokens: int) -> None:
    for _, rows, columns in _bank_shapes(c).values():
        packed = torch.zeros(rows, row_bytes(columns, 6), dtype=torch.uint8)
        ops.int6_matmul(torch.zeros(tokens, columns, dtype=DTYPE), packed, torch.ones(rows))


def _newton_schulz(c: ModelConfig) -> None:
    for shape in _bank_shapes(c).values():
        ops.newton_schulz(torch.zeros(shape, dtype=DTYPE), 1)


def _muon(c: ModelConfig, shadowed: bool) -> None:
    for shape in _bank_shapes(c).values():
        master, buffer = torch.zeros(shape), torch.zeros(shape, dtype=DTYPE)
        shadow = torch.zeros(shape, dtype=DTYPE) if shadowed else None
        update = muon_momentum(master, buffer, 0.95)
        muon_apply(master, update, 0.02, weight_decay=0.04, scale=1.0, shadow=shadow)


# name -> what to run for a network; a new kernel must be reached by one of these (tests/test_aot.py)
CASES: dict[str, Callable[[ModelConfig], None]] = {
    "mlp, gradient banks": partial(_mlp, banked=True),
    "mlp, gradients": partial(_mlp, banked=False),
    "attention, gradient banks": partial(_attention, banked=True, xsa=True),
    "attention with value embedding, gradient banks": partial(_attention, banked=True, xsa=True, value=True),
    "attention, gradients": partial(_attention, banked=False, xsa=True),
    "attention without XSA": partial(_attention, banked=True, xsa=False),
    "attention of the last 64 positions": partial(_attention, banked=True, xsa=True, window=64),
    "attention of a library": _attention_of_a_library,
    "hash n-grams": _ngram_hash,
    "hash n-grams, atomic gradient": _ngram_hash_atomic,
    "residual norm of x and x0": partial(_residual_norm, scaled=True),
    "residual norm of a branch": partial(_residual_norm, scaled=False),
    "residual norm of rows wider than a tile": partial(_residual_norm, scaled=True, wider=16),
    "smear gate": _smear_gate,
    "loss": _cross_entropy,
    "int6, 1 row": partial(_int6, tokens=1),
    "int6, 16 rows": partial(_int6, tokens=16),
    "int6, 64 rows": partial(_int6, tokens=64),
    "int6, many rows": partial(_int6, tokens=TOKENS),
    "newton_schulz of the banks": _newton_schulz,
    "muon": partial(_muon, shadowed=False),
    "muon with shadow banks": partial(_muon, shadowed=True),
}
