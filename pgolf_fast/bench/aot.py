"""`pgolf aot`: compile every kernel at the shapes of presets, for GPUs that need not be present.

The cases run the public ops, forward and backward, so what is compiled is what training launches: the same
tiles, the same specialization on strides and alignment. A Triton driver that needs no GPU compiles launches
and records them. All else is real: Triton's compiler, the assembler that ships with it, and the limit on
shared memory. Works with triton 3.6 to 3.9.
"""

import ast
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pgolf_fast import console
from pgolf_fast.bench import registry
from pgolf_fast.bench.peers import forced_attention
from pgolf_fast.bench.timer import temporarily
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_json
from pgolf_fast.ops import cases, tiles
from pgolf_fast.ops.cases import CASES
from pgolf_fast.ops.ngram_hash import choose_table_gradient
from pgolf_fast.ops.tuned import kernel_files

TOKENS = 2048
DTYPE = torch.bfloat16
_devices = itertools.count(1000)

# Maximum shared memory of one block in bytes, by compute capability (CUDA C programming guide).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass
class Compiled:
    """The assembler's report on one specialization of a kernel."""

    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    spill_bytes: int  # Stack and local memory; 0 if nothing spilled
    shared_bytes: int
    instructions: Counter[str] = field(default_factory=Counter)  # Count of each opcode in the machine code
    narrow: int = 0  # Loads of 16 bits from global memory in loops: without vectors, without cp.async

    def count(self, fragment: str) -> int:
        """Count instructions whose opcode contains `fragment`."""
        return sum(n for opcode, n in self.instructions.items() if fragment in opcode)

    @property
    def per_sm(self) -> int:
        """Blocks on a multiprocessor: a warp gets registers in units of 256, a block 1 KiB more memory."""
        threads = 1536 if self.arch in (86, 89, 120) else 2048
        registers = -(-max(self.registers, 1) * 32 // 256) * 256 * max(self.warps, 1)
        shared = (SHARED_LIMIT[self.arch] + 1024) // (self.shared_bytes + 1024)
        return min(65_536 // registers, shared, threads // (32 * max(self.warps, 1)), 32)


def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    shipped = Path(nvidia.__file__).parent / "bin" / name
    found = str(shipped) if shipped.exists() else shutil.which(name)
    if found is None:
        raise PgolfError(f"{name} is needed to read compiled kernels; it comes with Triton and with CUDA")
    return found


def _inspect(cubin: bytes) -> tuple[dict[str, int], str]:
    """Return the resource usage and the assembly of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([_tool(tool), flag, path], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return numbers, code


def opcodes(code: str) -> Counter[str]:
    """Count the opcodes of an assembly, without their modifiers."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    return Counter(found)


def narrow_loads(code: str) -> int:
    """Count the 16-bit loads from global memory between a label and a jump back to it."""
    lines = code.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        if jump := re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line):
            inside.update(range(labels.get(jump[1], i), i))
    return sum(re.search(r"\bLDG\.\S*[US]16\b", lines[i]) is not None for i in inside)


class _Launcher:
    """A replacement for Triton's C launcher that records the compiler's warps and stages."""

    def __init__(self, source: object, metadata: Any):
        self.warps, self.stages = metadata.num_warps, metadata.num_stages

    def __call__(self, x: int, y: int, z: int, stream: int, function: Compiled, *rest: object) -> None:
        function.warps, function.stages = self.warps, self.stages


class _Driver:
    """The methods of Triton's CUDA driver that compiling a launch needs."""

    launcher_cls = _Launcher
    is_active = staticmethod(lambda: True)
    get_current_stream = staticmethod(lambda device=0: 0)
    set_current_device = unload_module = staticmethod(lambda which: None)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cpu)
    map_python_to_cpp_type = staticmethod(lambda kind: kind)
    assemble_tensormap_to_arg = staticmethod(lambda information, arguments: arguments)

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.arch, self.utils = arch, self
        self.compiled: list[Compiled] = []
        target, device = GPUTarget("cuda", arch, 32), next(_devices)
        self.get_current_target = lambda: target
        # Triton caches compiled kernels by device: a new number makes it compile again.
        self.get_current_device = lambda: device

    def get_device_properties(self, device: int) -> dict[str, int]:
        fixed = {"multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
        unused = dict.fromkeys(("mem_clock_rate", "mem_bus_width", "sm_clock_rate"), 1)
        return {"max_shared_mem": SHARED_LIMIT[self.arch], **fixed, **unused}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[Compiled, Compiled, int, int, int]:
        usage, code = _inspect(cubin)
        spill = usage.get("STACK", 0) + usage.get("LOCAL", 0)
        sizes = (usage.get("REG", 0), spill, shared)
        entry = Compiled(name, self.arch, 0, 0, *sizes, opcodes(code), narrow_loads(code))
        self.compiled.append(entry)
        # The first is the module; without one, Triton would load the binary again at every launch.
        return entry, entry, entry.registers, spill, 1024


@contextmanager
def compile_only(arch: int) -> Iterator[list[Compiled]]:
    """Make Triton launches (on CPU tensors) compile for compute capability `arch` (90 is sm_90).

    Yields a list that receives one entry per specialization. Raises PgolfError if Triton was imported with
    its interpreter on, or `arch` is not in SHARED_LIMIT.
    """
    import triton
    from triton.runtime.driver import driver

    if arch not in SHARED_LIMIT:
        raise PgolfError(f"no architecture sm_{arch}: use one of {', '.join(map(str, SHARED_LIMIT))}")
    if triton.knobs.runtime.interpret:
        raise PgolfError("TRITON_INTERPRET=1 is set: kernels cannot be compiled in this process")
    stand_in = _Driver(arch)
    before = getattr(driver, "_active", None)
    driver.set_active(stand_in)
    try:
        yield stand_in.compiled
    finally:
        driver._active = before


@dataclass(frozen=True)
class Row:
    """One specialization of one kernel on one architecture."""

    case: str
    compiled: Compiled
    wanted: int = 1  # Blocks on a Hopper multiprocessor for which its tile was chosen

    def cells(self) -> tuple[object, ...]:
        c = self.compiled
        numbers = (c.warps, c.stages, c.registers, c.spill_bytes, c.shared_bytes, c.per_sm)
        loads = (c.count("LDGSTS"), c.narrow)
        # HMMA and similar on Ampere, HGMMA on Hopper, UTC*MMA on Blackwell; bulk copies from Hopper on
        return (c.kernel, f"sm_{c.arch}", *numbers, c.count("MMA"), *loads, c.count("UTMA"), self.case)

    def record(self) -> dict[str, object]:
        return dict(zip((name.replace(" ", "_") for name in HEADER), self.cells(), strict=True))


_SIZES = ("warps", "stages", "registers", "spill bytes", "shared bytes", "blocks per SM")
_COUNTS = ("tensor core", "cp.async", "16-bit loads in loops", "TMA")
HEADER = ("kernel", "arch", *_SIZES, *_COUNTS, "case")


# Cases that also run with a setting that launches other kernels. PyTorch's CPU attention stands in for every
# library: our kernels around them are the same.
_atomic = partial(temporarily, choose_table_gradient, "atomic", "sorted")
_own_gradients = partial(temporarily, partial(tiles.choose, "weight_grad"), "triton", "auto")
_library = ("with a library's attention", partial(forced_attention, "flash"))
SETTINGS: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "gqa_attention": _library,
    "gqa_attention-packed": _library,
    "mlp-leaky_relu_squared": ("with our weight gradients", _own_gradients),
    "ngram_hash_embed": ("with an atomic gradient", _atomic),
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
    from triton.runtime.errors import OutOfResources

    configs = [preset(name) for name in names]
    rows: list[Row] = []
    misfits: list[str] = []
    for arch in architectures:
        row = "sm80" if arch < 90 else "sm90" if arch < 100 else "sm100"
        with compile_only(arch) as compiled, tiles.kernels_on_cpu(row):
            todo = [(config, one) for config in configs for one in _cases(config, only)]
            console.logger.info("compiling %d cases for sm_%d", len(todo), arch)
            for config, (case, tokens) in console.progress(todo, f"sm_{arch}", unit="case"):
                settings = [("", nullcontext), *([SETTINGS[case]] if case in SETTINGS else [])]
                for what, around in settings:
                    before, label = len(compiled), f"{case} {what}".strip()
                    with tiles.recorded() as tiled:
                        try:
                            with around():
                                run_case(case, config, tokens)
                        except OutOfResources as error:
                            misfits.append(f"{label} does not fit sm_{arch}: {error}")
                    rows += [Row(label, entry, _wanted(entry.kernel, tiled)) for entry in compiled[before:]]
    return rows, list(dict.fromkeys(misfits))


def _wanted(kernel: str, tiled: Sequence[str]) -> int:
    """Return for how many blocks a multiprocessor the kernel's tile was chosen, among those looked up."""
    name = kernel.removesuffix("_kernel")
    same = [t for t in tiled if t == name] or [t for t in tiled if t.startswith(name)]
    return tiles.per_sm[same[0]] if same else 1


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


def table(rows: Sequence[Row]) -> str:
    """Return all rows as text, sorted by architecture and kernel."""
    cells = sorted((row.cells() for row in rows), key=lambda c: (int(str(c[1])[3:]), c))
    return console.Table(HEADER, cells).text()


def write(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write the table as JSON, with the versions that made it."""
    import triton

    about = {"triton": triton.__version__, "torch": torch.__version__, "presets": list(names)}
    content = {**about, "tokens": TOKENS, "dtype": str(DTYPE), "kernels": [row.record() for row in rows]}
    write_json(path, content, indent=1)


def problems(rows: Sequence[Row]) -> list[str]:
    """Return one line for each thing that makes a kernel slow or impossible to launch.

    Shared memory counts on every GPU, the rest on Hopper.
    """
    multiplies = kernels_in_source()
    lines = []
    for row in rows:
        entry = row.compiled
        name = f"{entry.kernel} on sm_{entry.arch} ({row.case})"
        if entry.shared_bytes > (limit := SHARED_LIMIT[entry.arch]):
            lines.append(f"{name}: {entry.shared_bytes} bytes of shared memory, but there are {limit}")
        if entry.arch != 90:
            continue
        if entry.spill_bytes:
            lines.append(f"{name}: {entry.spill_bytes} bytes of registers spill to memory")
        if entry.per_sm < row.wanted:
            lines.append(f"{name}: {entry.per_sm} blocks on a multiprocessor, its tile is for {row.wanted}")
        if multiplies.get(entry.kernel):
            if not entry.count("HGMMA"):
                lines.append(f"{name}: multiplies matrices without HGMMA")
            if not entry.count("LDGSTS") + entry.count("UTMA"):
                lines.append(f"{name}: loads its operands without cp.async")
            if entry.narrow:
                lines.append(f"{name}: {entry.narrow} loads of 16 bits in a loop")
    return lines


def unreached(rows: Sequence[Row]) -> list[str]:
    """Return the kernels of the project that no case launched."""
    reached = {row.compiled.kernel for row in rows}
    return [name for name in kernels_in_source() if name not in reached]


def kernels_in_source() -> dict[str, bool]:
    """Return every kernel of kernels/*.py, and True if it or a function it calls multiplies matrices."""
    calls: dict[str, set[str]] = {}
    for path in kernel_files():
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and any(
                ast.unparse(decorator).split("(")[0].endswith("jit") for decorator in function.decorator_list
            ):
                named = (ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call))
                words = ("tl.dot" if "tl.dot" in name else name.split(".")[-1] for name in named)
                calls.setdefault(function.name, set()).update(words)
    multiply = {name for name, called in calls.items() if "tl.dot" in called}
    while callers := {name for name, called in calls.items() if called & multiply} - multiply:
        multiply |= callers
    return {name: name in multiply for name in sorted(calls) if name.endswith("_kernel")}
