"""`pgolf aot`: compile every kernel at the shapes of presets, for GPUs that need not be present.

The cases run the public ops, forward and backward, so what is compiled is what training launches: the same
tiles, the same specialization on strides and alignment.
"""

import ast
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pgolf_fast import console
from pgolf_fast.bench import registry
from pgolf_fast.bench.compile_only import SHARED_LIMIT, Compiled, compile_only
from pgolf_fast.bench.peers import forced_attention
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text
from pgolf_fast.ops import cases, tiles
from pgolf_fast.ops.cases import CASES
from pgolf_fast.ops.ngram_hash import choose_table_gradient

TOKENS = 2048
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One specialization of one kernel on one architecture."""

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


@contextmanager
def _atomic_gradient() -> Iterator[None]:
    choose_table_gradient("atomic")
    try:
        yield
    finally:
        choose_table_gradient("sorted")


# Cases that also run with a setting that launches other kernels. PyTorch's CPU attention stands in for every
# library: our kernels around them are the same.
SETTINGS: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "gqa_attention": ("with a library's attention", partial(forced_attention, "flash")),
    "ngram_hash_embed": ("with an atomic gradient", _atomic_gradient),
}


def compile_presets(
    names: Sequence[str], architectures: Sequence[int], only: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """Compile every case of every preset for every architecture; repeated specializations count once.

    `only` restricts the cases. Returns the rows, and a line for each case with a kernel that needs more than
    its GPU has. Raises PgolfError if nothing can be compiled.
    """
    if importlib.util.find_spec("triton") is None:
        raise PgolfError("Triton is not installed, and `pgolf aot` compiles with it: pip install triton")
    configs = [preset(name) for name in names]
    rows: list[Row] = []
    misfits: list[str] = []
    for arch in architectures:
        with compile_only(arch) as compiled, tiles.kernels_on_cpu(row_of(arch)):
            for config in configs:
                for case, tokens in _cases(config, only):
                    for what, around in (("", nullcontext), SETTINGS.get(case, ("", None))):
                        if around is None:
                            continue
                        before, label = len(compiled), f"{case} {what}".strip()
                        with around():
                            misfits += _run(label, partial(run_case, case, config, tokens), arch)
                        rows += [Row(label, entry) for entry in compiled[before:]]
    return rows, list(dict.fromkeys(misfits))


def _cases(config: RunConfig, only: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the cases that a preset launches, with their token counts."""
    for name, entry in CASES.items():
        unused = name.startswith("mlp-") and name != f"mlp-{config.model.mlp_activation}"
        unused |= name == "ngram_hash_embed" and not config.model.bigram_vocab_size
        if entry.kernels is not None and not unused and (not only or name in only):
            yield from ((name, tokens) for tokens in registry.token_counts(name, (TOKENS,)))


def run_case(name: str, config: RunConfig, tokens: int) -> None:
    """Run a case forward and, if it can, backward: with and without gradient banks."""
    sizes = replace(registry.sizes_of(config, tokens), batch=1, length=tokens)
    case = cases.make(name, sizes, DTYPE)
    case.ours().forward()
    for banks in (True, False):
        if case.trained:
            contender = case.ours(banks=banks)
            contender.both([torch.zeros_like(out) for out in contender.forward()])


def row_of(arch: int) -> str:
    """Return the table's row for a compute capability."""
    return "sm80" if arch < 90 else "sm90" if arch < 100 else "sm100"


def _run(case: str, run: Callable[[], None], arch: int) -> list[str]:
    from triton.runtime.errors import OutOfResources

    try:
        run()
    except OutOfResources as error:
        return [f"{case} does not fit sm_{arch}: {error}"]
    return []


def table(rows: Sequence[Row]) -> str:
    """Return all rows as text, sorted by architecture and kernel."""
    cells = sorted((row.cells() for row in rows), key=lambda c: (int(str(c[1])[3:]), c))
    return console.table(cells, HEADER)


def write(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write the table as JSON, with the versions that made it."""
    import triton

    about = {"triton": triton.__version__, "torch": torch.__version__, "presets": list(names)}
    content = {**about, "tokens": TOKENS, "dtype": str(DTYPE), "kernels": [row.record() for row in rows]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def problems(rows: Sequence[Row]) -> list[str]:
    """Return one line for each thing that makes a kernel slow or impossible to launch.

    Spills and missing HGMMA instructions count on Hopper, shared memory on every GPU.
    """
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
    """Return the kernels of the project that no case launched."""
    reached = {row.compiled.kernel for row in rows}
    return [name for name in kernels_in_source() if name not in reached]


def kernels_in_source() -> dict[str, bool]:
    """Return every kernel of kernels/*.py, and True if it or a function it calls multiplies matrices."""
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
