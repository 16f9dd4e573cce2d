"""Roofline of a machine: its limits of arithmetic and memory traffic."""

import functools
from dataclasses import dataclass

import torch

from pgolf_fast.bench.timer import one_thread, time_in_turn


@dataclass(frozen=True)
class Roof:
    """Peak FLOP/s and byte/s, and the source of both."""

    flops: float
    bytes: float
    source: str

    def seconds(self, flops: float, moved: float) -> float:
        """Return the least time for that much arithmetic and traffic."""
        return max(flops / self.flops, moved / self.bytes)


# Part of a GPU's name -> dense 16-bit FLOP/s, float32 FLOP/s without TF32, byte/s (NVIDIA's data sheets).
DATA_SHEETS = {
    "H200": (989e12, 67e12, 4.8e12),
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100": (989e12, 67e12, 3.35e12),
    "B200": (2250e12, 75e12, 8.0e12),
    "A100-SXM4-80GB": (312e12, 19.5e12, 2.04e12),
    "A100": (312e12, 19.5e12, 1.555e12),
}


@functools.lru_cache(maxsize=8)
def roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Return the data sheet's limits of a GPU in the table, or measured limits of any other device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (low, single, moved) in DATA_SHEETS.items():
            if part in name:
                return Roof(low if dtype.itemsize == 2 else single, moved, f"data sheet of {part}")
    return measured_roof(device, dtype)


def measured_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measure a large square product and a large copy (bytes read plus written)."""
    cuda = device.type == "cuda"
    n, count = (8192, 1 << 30) if cuda else (512, 1 << 23)
    with torch.no_grad(), one_thread():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        source = torch.randn(count // 4, device=device)
        target = torch.empty_like(source)
        calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
        times = time_in_turn(calls, device, seconds=0.3)
    product, copy = (times[name].median / 1e3 for name in ("product", "copy"))
    return Roof(2 * n**3 / product, 2 * count / copy, "measured")
