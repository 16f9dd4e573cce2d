"""Seconds that grid rd takes at full size: exp101 with synthetic weights, Hessians and importances.

    python benchmarks/bench_landing.py [--target 14000000]

Weights are normal with the RMS of exp101's trained banks, Hessians those of random correlated inputs, rows
of log-normal importance. Calibration is not part of it: see bench_export.py. Prints wall-clock seconds on as
many threads as PyTorch takes (set OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from pgolf_fast.artifact.landing import fit_to_target
from pgolf_fast.artifact.pack import artifact_bytes
from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.presets import exp101
from pgolf_fast.config.schema import PackConfig
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fisher import Fisher
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import group_of, is_slot, unbank

RMS = {"qo_bank": 0.176, "kv_bank": 0.197, "mlp_up_bank": 0.202, "mlp_down_bank": 0.118}


def synthetic(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Fisher]]:
    """A state dict of exp101 and factors for each of its matrices."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GPT(exp101().model).state_dict().items()}
    state = {n: RMS.get(n, 0.1) * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    hessians: dict[str, Tensor] = {}
    fishers = {}
    for name, matrix in unbank(state).items():
        if matrix.ndim != 2 or not name.endswith(".weight"):
            continue
        group, size = group_of(name), matrix.shape[1]
        if group not in hessians:
            inputs = torch.randn(2 * size, size, generator=generator)
            inputs = inputs @ torch.randn(size, size, generator=generator) * size**-0.5
            hessians[group] = inputs.T @ inputs / len(inputs)
        rows = 1e-5 * torch.exp(torch.randn(len(matrix), generator=generator))
        fishers[name] = Fisher(rows, hessians[group], 0.01 if is_slot(name) else 1e-3)
    return state, fishers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", type=int, default=14_000_000, help="bytes of the artifact")
    target = parser.parse_args().target
    state, fishers = synthetic(torch.Generator().manual_seed(0))
    tree, sized = run_config_to_dict(exp101()), [0.0, 0]

    def size(quantized) -> int:
        start = time.perf_counter()
        result = artifact_bytes(quantized, tree, PackConfig())
        sized[0], sized[1] = sized[0] + time.perf_counter() - start, sized[1] + 1
        return result

    start = time.perf_counter()
    grids = RateDistortion(state, fishers, exp101().quant)
    ready = time.perf_counter()
    grids.quantize(1e-9)
    once = time.perf_counter()
    landed = fit_to_target(grids, size, target)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"threads                      {torch.get_num_threads():12d}")
    print(f"factors of all Hessians      {ready - start:12.2f} s")
    print(f"all matrices at one price    {once - ready:12.2f} s")
    print(f"landing                      {end - once:12.2f} s, {sized[0]:.2f} s of it for {sized[1]} sizes")
    print(f"artifact                     {landed.artifact_bytes:12,} bytes of {target:,}")
    print(f"peak memory                  {peak:12,.0f} MiB")


if __name__ == "__main__":
    main()
