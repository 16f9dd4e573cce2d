"""What the processes of `bench_artifact.py` share: a folder an artifact, the timer, the memory of a process.

A folder holds the model in the layout of PR 1501 (`reference.pt`: torch.save of names, values and kinds, one
byte a weight), which every general compressor gets as it is, the bank codes alone (`codes.bin`), and the
configuration (`config.json`).
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pgolf_fast.config.schema import RunConfig
    from pgolf_fast.quant.state import QuantizedState

REFERENCE, CODES, CONFIG = "reference.pt", "codes.bin", "config.json"
SLOW_SECONDS = 20.0  # what takes longer is timed once
RUNS = 3

Result = TypeVar("Result")


def write_artifact(folder: Path, quantized: QuantizedState, config: RunConfig) -> None:
    """The three files of an artifact. Integers of b bits have the kind "int<b>" in the layout."""
    import torch

    from pgolf_fast.quant.state import QuantizedTensor

    values: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for name, tensor in quantized.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            values[f"{name}.q"], values[f"{name}.scale"] = tensor.codes, tensor.scale
            kinds[name] = {"type": f"int{tensor.bits}"}
        else:
            values[name], kinds[name] = tensor, "passthrough"
    write_config(folder, config)
    torch.save({"w": values, "m": kinds}, folder / REFERENCE)
    codes = [matrix.codes.numpy().tobytes() for matrix in quantized.matrices().values()]
    (folder / CODES).write_bytes(b"".join(codes))


def write_config(folder: Path, config: RunConfig) -> None:
    """The configuration alone, for a pipeline that makes its own artifact."""
    from pgolf_fast.config.fields import run_config_to_dict

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(run_config_to_dict(config)), encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def read_artifact(folder: Path) -> tuple[QuantizedState, dict[str, Any]]:
    """The model and the configuration that `write_artifact` wrote."""
    import torch

    from pgolf_fast.quant.state import QuantizedState, QuantizedTensor

    tree = torch.load(folder / REFERENCE, weights_only=True)
    values = tree["w"]
    tensors = {
        name: values[name]
        if kind == "passthrough"
        else QuantizedTensor(values[f"{name}.q"], values[f"{name}.scale"], int(kind["type"][3:]))
        for name, kind in tree["m"].items()
    }
    return QuantizedState(tensors), read_config(folder)


def best_of(call: Callable[[], Result], runs: int = RUNS) -> tuple[Result, float, int]:
    """The result, the least seconds and the number of runs: `runs`, or fewer once SLOW_SECONDS are spent."""
    times: list[float] = []
    while len(times) < runs and sum(times) < SLOW_SECONDS:
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times), len(times)


def peak_mib() -> float:
    """The most memory that this process ever held, or a program that it started; 0 where nobody counts."""
    own = 0.0
    # not getrusage: what it says of a process begins with the memory of the one that started it
    status = Path("/proc/self/status")
    if status.is_file():
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM")), "VmHWM: 0 kB")
        own = int(line.split()[1]) / 1024
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
