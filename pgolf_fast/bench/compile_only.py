"""A Triton driver without a GPU: launches are compiled for a named GPU and recorded, not run.

Everything before the launch is real: this project's launchers, Triton's specialization on the arguments, its
compiler, the assembler that ships with it, and the limit on shared memory. Works with triton 3.6 to 3.9.
"""

import itertools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pgolf_fast.errors import PgolfError

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
    spill_bytes: int
    """Stack and local memory; 0 if nothing spilled."""
    shared_bytes: int
    instructions: Counter[str] = field(default_factory=Counter)
    """Count of each opcode in the machine code."""
    launches: list[tuple[int, int, int]] = field(default_factory=list)
    """The grid of every launch."""

    def count(self, *fragments: str) -> int:
        """Count instructions whose opcode contains one of `fragments`."""
        return sum(n for opcode, n in self.instructions.items() if any(f in opcode for f in fragments))

    @property
    def tensor_core_instructions(self) -> int:
        """Count of HMMA and similar on Ampere, HGMMA on Hopper, UTC*MMA on Blackwell."""
        return self.count("MMA")

    @property
    def tma_instructions(self) -> int:
        """Count of bulk tensor copies (Hopper and later)."""
        return self.count("UTMA")


def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    shipped = Path(nvidia.__file__).parent / "bin" / name
    found = str(shipped) if shipped.exists() else shutil.which(name)
    if found is None:
        raise PgolfError(f"{name} is needed to read compiled kernels; it comes with Triton and with CUDA")
    return found


def _inspect(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Return resource usage and opcode counts of a device binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([_tool(tool), flag, path], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    return numbers, Counter(opcodes)


class _Launcher:
    """A replacement for Triton's C launcher that records the grid, and the compiler's warps and stages."""

    def __init__(self, source: object, metadata: Any):
        self.warps, self.stages = metadata.num_warps, metadata.num_stages

    def __call__(self, x: int, y: int, z: int, stream: int, function: Compiled, *rest: object) -> None:
        function.warps, function.stages = self.warps, self.stages
        function.launches.append((x, y, z))


class _Driver:
    """The methods of Triton's CUDA driver that compiling a launch needs."""

    launcher_cls = _Launcher

    def __init__(self, arch: int):
        self.arch, self.device = arch, next(_devices)
        self.utils = self
        self.compiled: list[Compiled] = []

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device: a new number makes it compile again.
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> object:
        return torch.cpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        fixed = {"multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
        unused = dict.fromkeys(("mem_clock_rate", "mem_bus_width", "sm_clock_rate"), 1)
        return {"max_shared_mem": SHARED_LIMIT[self.arch], **fixed, **unused}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[Compiled, Compiled, int, int, int]:
        usage, opcodes = _inspect(cubin)
        spill = usage.get("STACK", 0) + usage.get("LOCAL", 0)
        entry = Compiled(name, self.arch, 0, 0, usage.get("REG", 0), spill, shared, opcodes)
        self.compiled.append(entry)
        # The first is the module; without one, Triton would load the binary again at every launch.
        return entry, entry, entry.registers, spill, 1024

    def unload_module(self, module: object) -> None:
        pass

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def assemble_tensormap_to_arg(self, information: object, arguments: object) -> object:
        return arguments


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
