"""Compare quantizing a full-size model and generating calibration text with slower implementations.

    python benchmarks/bench_export.py [gptq] [calibration] [--smoke] [--out export.json]

`gptq` quantizes the 66 bank matrices of exp101 (26 M weights and Hessians made up as
`bench_artifact.py` makes them up) in C++ and in torch: with the floor of 1/31 under all steps, which leaves
one candidate for the row scales, and without, which leaves five. Compares the codes of the first layer.

`calibration` writes 64 texts of 2,048 tokens with the network of `small` in float32, keeping keys and values,
and compares the logits of every position with those of the full forward. A forward of the whole prefix for
every token, in batches of 8, would take hours: its time is measured at eight lengths from 1 to 2,047 and
linearly interpolated over all lengths, which overestimates a quadratic time by at most 1 %.

Every measurement runs in a separate process, whose peak memory is reported. Times are wall-clock seconds on
as many threads as PyTorch takes (set OMP_NUM_THREADS). Prints tables and writes JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from artifact_worker import peak_mib, timed
from synthetic_artifact import synthetic_hessians, synthetic_weights
from torch import Tensor

from pgolf_fast.bench.store import provenance
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.presets import exp101, small, tiny
from pgolf_fast.config.schema import QuantConfig, RunConfig
from pgolf_fast.console import Table
from pgolf_fast.distributed import keep_freed_memory
from pgolf_fast.io import write_text
from pgolf_fast.model.decoding import Decoder
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops.native import extension
from pgolf_fast.quant import gptq
from pgolf_fast.quant.calibration import self_generate
from pgolf_fast.quant.state import READERS, hessian_name, unbank

PARTS = ("gptq", "calibration")
LENGTHS = 8
UNCACHED_BATCH = 8  # as in the original program
COMPARED_TEXTS = 4

Groups = list[tuple[dict[str, Tensor], Tensor]]


def main() -> int:
    arguments = parse()
    if arguments.worker is not None:
        print(json.dumps(WORKERS[arguments.worker](arguments.smoke)))
        return 0
    results: dict[str, object] = {"provenance": provenance(), "threads": torch.get_num_threads()}
    if "gptq" in arguments.parts:
        paths = ["C++", "torch"] if extension() is not None else ["torch"]
        runs = [run(f"{path}, {steps}", arguments.smoke) for steps in ("free", "floor") for path in paths]
        results["gptq"] = runs
        columns = ("path", "steps", "matrices", "weights", "seconds", "inputs MiB", "peak MiB", "same codes")
        print(Table(columns, [[r[c] for c in columns] for r in runs]), end="\n\n", flush=True)
    if "calibration" in arguments.parts:
        done = run("calibration", arguments.smoke)
        results["calibration"] = done
        print(Table(("prefix", "uncached s a token"), done["lengths"].items()), end="\n\n")
        print(Table(None, [(name, value) for name, value in done.items() if name != "lengths"]))
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(results, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="gptq, calibration (default: both)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if wrong := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {wrong[0]}; there are {', '.join(PARTS)}")
    return arguments


def run(worker: str, smoke: bool) -> dict[str, Any]:
    """Run a worker in a separate process and return its result."""
    command = [sys.executable, __file__, "--worker", worker, *["--smoke"] * smoke]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# GPTQ


def bank_matrices(config: RunConfig) -> Groups:
    """Return every group of matrices with its Hessian, layer by layer."""
    state = synthetic_weights(config)
    matrices, hessians = unbank(state), synthetic_hessians(state)
    return [
        (
            {name: matrices[name] for name in (f"blocks.{layer}.{reader}" for reader in readers)},
            hessians[hessian_name(layer, which)],
        )
        for layer in range(config.model.num_layers)
        for which, readers in READERS.items()
    ]


def measure_gptq(path: str, floor: bool, smoke: bool) -> dict[str, object]:
    keep_freed_memory()
    groups = bank_matrices(tiny() if smoke else exp101())
    before = round(peak_mib())
    with mock.patch.object(gptq, "extension", return_value=extension() if path == "C++" else None):
        done, seconds = timed(lambda: gptq.gptq(groups, scale_floor=floor))
        peak = round(peak_mib())
    other = gptq.gptq(groups[: len(READERS)], scale_floor=floor)
    with mock.patch.object(gptq, "extension", return_value=None):
        in_torch = gptq.gptq(groups[: len(READERS)], scale_floor=floor)
    same = [(other[name][0] == codes).flatten() for name, (codes, _) in in_torch.items()]
    return {
        "path": path,
        "steps": "1/31 or more" if floor else "free",
        "matrices": len(done),
        "weights": sum(codes.numel() for codes, _ in done.values()),
        "seconds": round(seconds, 3),
        "inputs MiB": before,
        "peak MiB": peak,
        "same codes": round(torch.cat(same).float().mean().item(), 6),
    }


# Calibration


@torch.no_grad()
def measure_calibration(smoke: bool) -> dict[str, object]:
    keep_freed_memory()
    config = QuantConfig()
    if smoke:
        config = replace(config, calibration_sequences=8, calibration_length=40)
    count, length = config.calibration_sequences, config.calibration_length
    model = random_model((tiny() if smoke else small()).model)
    self_generate(
        model, replace(config, calibration_length=8), length
    )  # initializes what is initialized once
    _, cached = timed(lambda: self_generate(model, config, length))
    peak = round(peak_mib())
    text = torch.randint(model.config.vocab_size, (UNCACHED_BATCH, length))
    difference = largest_difference(model, text[:COMPARED_TEXTS])
    lengths = np.unique(np.linspace(1, length - 1, LENGTHS).astype(int))
    batches = -(-count // UNCACHED_BATCH)

    def token_after(prefix: Tensor) -> float:
        """Return the seconds for the logits after prefix (B, n) without a cache."""
        return min(timed(lambda: model.head(model.hidden(prefix)[:, -1]))[1] for _ in range(2))

    seconds = [batches * token_after(text[:, :n]) for n in lengths]
    uncached = float(np.interp(np.arange(1, length), lengths, seconds).sum())
    return {
        "texts": count,
        "tokens of each": length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cached s": round(cached, 2),
        "peak MiB": peak,
        "uncached s, integrated": round(uncached, 1),
        "uncached / cached": round(uncached / cached, 1),
        "largest logit difference": difference,
        "lengths": {int(n): round(s, 5) for n, s in zip(lengths, seconds, strict=True)},
    }


def random_model(config: ModelConfig) -> GPT:
    """Return a model with every parameter away from its initial value, so that logits spread."""
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def largest_difference(model: GPT, text: Tensor) -> float:
    """Return the largest difference of cached and full logits over all positions of text (B, T)."""
    decoder, full = Decoder(model, *text.shape), model.logits(text)
    steps = zip(text.unbind(1), full.unbind(1), strict=True)
    return max((decoder.step(tokens) - logits).abs().max().item() for tokens, logits in steps)


WORKERS: dict[str, Callable[[bool], dict[str, object]]] = {
    f"{path}, {steps}": partial(measure_gptq, path, steps == "floor")
    for path in ("C++", "torch")
    for steps in ("free", "floor")
}
WORKERS["calibration"] = measure_calibration


if __name__ == "__main__":
    sys.exit(main())
