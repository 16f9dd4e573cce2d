"""What a session on a GPU should run, in order of worth: GPU tests, then the training step and its peers.

    python benchmarks/gpu_session.py --out benchmarks/results

writes one JSON file with GPU, versions, commit, test outcome and, for each way of running one micro-batch of
the preset (forward and backward), milliseconds and time by kernel class. Rehearse with
`--device cpu --preset tiny`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from plain import plain_ops
from torch.profiler import ProfilerActivity, profile

from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.files import write_text
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.world import environment, resolve_dtype

# First match wins; names are those of CUDA kernels.
KERNEL_CLASSES = {
    "attention": ("flash", "fmha", "cudnn_generated", "attention", "sdpa"),
    "gemm": ("gemm", "cutlass", "nvjet", "cublas", "matmul", "addmm", "bmm", "aten::mm", "linear"),
    "scatter and gather": ("index", "scatter", "gather", "embedding"),
    "copies": ("memcpy", "memset", "copy"),
    "fused by Inductor": ("triton",),
}
# name -> (plain PyTorch?, attention backend, torch.compile mode or None for eager)
WAYS = {
    "pgolf ops, eager": (False, "any", None),
    "pgolf ops, compile": (False, "any", "default"),
    "plain, eager, flash": (True, "flash", None),
    "plain, compile, flash": (True, "flash", "default"),
    "plain, compile, cudnn": (True, "cudnn", "default"),
    "plain, compile max-autotune, flash": (True, "flash", "max-autotune-no-cudagraphs"),
}


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_session: this machine has no CUDA GPU; rehearse with --device cpu --preset tiny",
            file=sys.stderr,
        )
        return 2
    record: dict[str, object] = {
        "commit": commit(),
        "environment": environment(),
        "device": str(device),
        "preset": arguments.preset,
        "tests": None if arguments.skip_tests else run_tests(),
    }
    record["steps"] = measure_all(preset(arguments.preset), device, arguments)
    path = Path(arguments.out) / f"gpu_session_{time.strftime('%Y%m%d_%H%M%S')}.json"
    write_text(path, json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results", help="folder of the JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="exp101")
    parser.add_argument("--rounds", type=int, default=10, help="timed repetitions of each way")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    return parser.parse_args()


def commit() -> str:
    """The checked-out commit, marked when files differ from it; 'unknown' outside a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def run_tests() -> dict[str, object]:
    """The tests that have a GPU side."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-k", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-2000:])
    lines = done.stdout.strip().splitlines()
    return {"status": done.returncode, "summary": lines[-1] if lines else ""}


def measure_all(
    config: RunConfig, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    rows = []
    for name in arguments.ways:
        plain, backend, mode = WAYS[name]
        try:
            row = measure(
                config, device, plain, backend if device.type == "cuda" else "any", mode, arguments.rounds
            )
        except (
            RuntimeError
        ) as error:  # a backend that refuses the shape is a result, not the end of the session
            row = {"error": str(error).splitlines()[0]}
        rows.append({"way": name, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(
    config: RunConfig, device: torch.device, plain: bool, backend: str, mode: str | None, rounds: int
) -> dict[str, object]:
    """Median milliseconds of forward and backward of one micro-batch, and where they go."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    dtype = resolve_dtype(config.train.compute_dtype, device)
    model = GPT(config.model, compute_dtype=dtype).to(device)
    if not plain:
        model.allocate_gradient_banks()
    length = config.train.seq_len
    shape = (config.train.micro_batch_tokens // length, length)
    tokens, targets = (torch.randint(config.model.vocab_size, shape, device=device) for _ in range(2))
    loss = model.loss if mode is None else torch.compile(model.loss, mode=mode, fullgraph=True)

    def step() -> None:
        loss(tokens, targets, model.banks()).backward()

    def run() -> dict[str, object]:
        times = timed(step, device, rounds)
        peak = torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else None
        tokens_per_second = shape[0] * length / (statistics.median(times) / 1e3)
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "micro_batch": list(shape),
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "tokens_per_second": tokens_per_second,
            "peak_mib": peak,
            "ms_by_class": by_class(step, device),
        }

    if plain:
        with plain_ops(backend):
            return run()
    return run()


def timed(step: Callable[[], None], device: torch.device, rounds: int) -> list[float]:
    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_class(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by kernel class (of operators on a CPU)."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        step()
        synchronize(device)
    totals: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        names = ((k, word) for k, words in KERNEL_CLASSES.items() for word in words)
        kind = next((k for k, word in names if word in event.key.lower()), "elementwise and other")
        totals[kind] += spent / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    sys.exit(main())
