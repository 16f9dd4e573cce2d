"""From weights to a loaded artifact at the shapes of a preset: seconds and memory of every step.

`python artifact_pipeline.py STEP FOLDER` runs one step in a process of its own on what the step before left
in FOLDER (at first config.json), and prints a line of JSON. Nobody trained the weights: bank weights are
Gaussian and as wide as those of PR 1501, and each Hessian is that of correlated inputs of different strength.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from artifact_files import peak_mib, read_artifact, read_config, write_artifact
from synthetic_artifact import CLIP, SIGMA, TABLE_STD
from torch import Tensor

from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.pack import load_model, pack
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.schema import PackConfig, RunConfig
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.calibration import hessian_name
from pgolf_fast.quant.state import READERS, quantize_state, unbank

Found = dict[str, Any]
ARTIFACT = "model.pgolf"
PRUNE = 0.02  # of the bytes of the bank codes


def synthetic_weights(config: RunConfig, seed: int = 0) -> dict[str, Tensor]:
    """A state dict, float32, whose bank weights come to `SIGMA` steps of 1/31."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        state = GPT(config.model).state_dict()
    return {
        name: torch.empty(t.shape).normal_(
            0, SIGMA / CLIP if name in BANK_NAMES else TABLE_STD, generator=generator
        )
        for name, t in state.items()
    }


def synthetic_hessians(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """By `hessian_name`: inputs of log-normal strength e^(+-1) whose neighbours correlate with 0.9."""
    generator = torch.Generator().manual_seed(seed)
    matrices = unbank(state)
    hessians = {}
    for layer in range(sum(name.endswith("attn.c_q.weight") for name in matrices)):
        for which, readers in READERS.items():
            channels = torch.arange(matrices[f"blocks.{layer}.{readers[0]}"].shape[1])
            strength = torch.randn(len(channels), generator=generator).exp()
            correlation = 0.9 ** (channels[:, None] - channels).abs().float()
            hessians[hessian_name(layer, which)] = strength[:, None] * strength * correlation
    return hessians


def step_gptq(folder: Path, config: RunConfig) -> Found:
    state = synthetic_weights(config)
    hessians = synthetic_hessians(state)
    quantized, seconds = timed(lambda: quantize_state(state, config.quant, hessians))
    write_artifact(folder, quantized, config)
    return {"seconds": seconds, "matrices": len(quantized.matrices())}


def step_pack(folder: Path, config: RunConfig) -> Found:
    quantized, run = read_artifact(folder)
    free = dataclasses.replace(config.pack, code_bytes=0)
    done, seconds = timed(lambda: pack(quantized, run, folder / ARTIFACT, free))
    return {"seconds": seconds, "bytes": done.total_bytes}


def step_load(folder: Path, config: RunConfig) -> Found:
    (model, _), seconds = timed(lambda: load_model(folder / ARTIFACT))
    return {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


def step_prune(folder: Path, config: RunConfig) -> Found:
    """Pack again, into 2 % of the bank codes' bytes less."""
    quantized, run = read_artifact(folder)
    now = sizes(folder / ARTIFACT)
    target = now.total_bytes - int(PRUNE * now.sections[0].stored_bytes)
    limit = PackConfig(limit_bytes=target, code_bytes=0)
    done, seconds = timed(lambda: pack(quantized, run, folder / "pruned.pgolf", limit))
    return {
        "seconds": seconds,
        "target_bytes": target,
        "bytes_below": target - done.total_bytes,
        "pruned": done.pruned,
        "candidates": done.candidates,
    }


STEPS: dict[str, Callable[[Path, RunConfig], Found]] = {
    "gptq": step_gptq,
    "pack": step_pack,
    "load": step_load,
    "prune": step_prune,
}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def run_step(step: str, folder: Path) -> Found:
    """What the step found; `peak_mib` is all memory of its process, Python and torch included."""
    found = STEPS[step](folder, run_config_from_dict(read_config(folder)))
    return {**found, "peak_mib": peak_mib()}


if __name__ == "__main__":
    print(json.dumps(run_step(sys.argv[1], Path(sys.argv[2]))))
