"""Measure how time and memory on a CPU grow with model size, sequence length, vocabulary and threads.

    python benchmarks/bench_growth.py [--axes model length ...] [--json FILE] [--plot docs/growth.png]

Each point is a process of its own with a time limit; one that exceeds it is reported, and larger ones are
left out. A training step has TOKENS tokens, or one sequence if that is longer; scored windows do not overlap;
test-time training is LoRA with windows that overlap by three quarters. A slope is the exponent of a power
law fitted by least squares to all points of an axis: of seconds per token, of the arithmetic per token that
the configuration implies, and of the memory in excess of what imports take.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cpu_jobs  # before torch, so that OpenMP is set up
import numpy as np

from pgolf_fast import console
from pgolf_fast.bench.drawing import Figure, write_png
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.ttt import adapters
from pgolf_fast.cores import available_cores
from pgolf_fast.evaluation.estimate import ALL_GRADIENTS, forward_flops, learning, windows_flops
from pgolf_fast.io import write_text

TOKENS = 2048
LONG_SECONDS = 10.0  # a first piece that takes longer is the measurement
NS_STEPS = 5
AXES: dict[str, tuple] = {
    "model": ("tiny", "small", "exp101"),
    "length": (256, 512, 1024, 2048, 4096),
    "vocabulary": (1024, 2048, 4096, 8192),
    "threads": (),
}


def point_config(name: str, length: int, vocabulary: int | None) -> RunConfig:
    """Return a preset with steps of TOKENS tokens, or one sequence, of that length."""
    config = preset(name)
    tokens = max(TOKENS, length)
    train = replace(config.train, seq_len=length, micro_batch_tokens=tokens, batch_tokens=tokens)
    lora = adapters(length)["lora"]
    lora = replace(lora, lora=replace(lora.lora, documents=max(1, TOKENS // length)))
    model = replace(config.model, vocab_size=vocabulary or config.model.vocab_size)
    scores = replace(config.eval, seq_len=None, stride=length // 4, batch_seqs=None)
    return replace(config, model=model, train=train, ttt=lora, eval=scores)


def bank_shapes(config: RunConfig) -> list[tuple[int, int, int]]:
    """Return (slots, rows, columns) of the banks, which hold all matrices but the tables."""
    m, d, n = config.model, config.model.model_dim, config.model.num_layers
    return [(2 * n, d, d), (2 * n, m.kv_dim, d), (n, m.mlp_up_rows, d), (n, d, m.mlp_hidden)]


def newton_schulz_flops(config: RunConfig) -> float:
    """Return the operations of one step's orthogonalization: three products per iteration."""
    total = 0.0
    for slots, rows, columns in bank_shapes(config):
        short, long = sorted((rows, columns))
        total += slots * NS_STEPS * 2 * (2 * short**2 * long + short**3)
    return total


def flops_per_token(job: str, config: RunConfig) -> float:
    """Return the operations of products and attention per token."""
    length, model = config.train.seq_len, config.model
    whole = forward_flops(model, length, length)
    if job == "train":
        return ALL_GRADIENTS * whole / length + newton_schulz_flops(config) / config.train.batch_tokens
    if job == "eval":
        return whole / length
    _, windows, chunks = cpu_jobs.adapting(config)
    work = learning(chunks, config.ttt, model, length)
    return (windows_flops(model, windows) + work.chunks + work.segments) / int(windows.places()[-1])


def points(axis: str, base: str) -> list[dict]:
    """Return the points of an axis in ascending order; the other axes stay at `base`, 256 and one thread."""
    usual = {"axis": axis, "preset": base, "length": 256, "vocabulary": None, "threads": 1}
    key = "preset" if axis == "model" else axis
    values = AXES[axis] or [2**k for k in range(16) if 2**k < available_cores()] + [available_cores()]
    return [{**usual, key: value, "value": value} for value in values]


def work(point: dict, job: str, seconds: float) -> dict:
    """Measure one job of a point in this process."""
    config = point_config(point["preset"], point["length"], point["vocabulary"])
    importlib.import_module("torch._dynamo")  # the first custom op does, and it takes 140 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    running = cpu_jobs.JOBS[job](config)
    found = cpu_jobs.run_for(running, 0.0)
    if found["seconds"] < LONG_SECONDS:  # it set up libraries, too
        found = cpu_jobs.run_for(running, seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "tokens_per_second": found["tokens"] / found["seconds"],
        "cpu_seconds_per_token": found["cpu"] / found["tokens"],
        "bytes": (peak - before) * unit,
        "flops_per_token": flops_per_token(job, config),
        "parameters": sum(s * r * c for s, r, c in bank_shapes(config)),
    }


def measured(point: dict, job: str, seconds: float, limit: float) -> dict:
    """Measure one job of a point in a process of its own; a failure is a record with the reason."""
    command = [sys.executable, __file__, "--worker", json.dumps([point, job, seconds])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(point["threads"])}
    options = {"env": environment, "timeout": limit, "capture_output": True, "text": True, "check": False}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> list[dict]:
    records, end = list[dict](), time.monotonic() + 60 * arguments.minutes
    for axis, job in ((axis, job) for axis in arguments.axes for job in arguments.jobs):
        error = ""
        for point in points(axis, arguments.preset):
            if not error and time.monotonic() > end:
                error = "out of time"
            found = {"error": error} if error else measured(point, job, arguments.seconds, arguments.limit)
            if "error" in found and not error:
                error = f"left out: a smaller one failed ({found['error']})"
            records.append({**point, "job": job, **found})
            print(f"{axis} {point['value']}, {job}: {summary(found)}", flush=True)
    return records


def summary(found: dict) -> str:
    if "error" in found:
        return found["error"]
    speed, flops = found["tokens_per_second"], found["flops_per_token"] * found["tokens_per_second"]
    return f"{speed:,.0f} tokens/s, {flops / 1e9:.1f} GFLOP/s, {found['bytes'] / 2**20:,.0f} MiB"


def by_line(records: Sequence[dict]) -> Iterator[tuple[str, str, list[dict], list[float]]]:
    """Yield axis, job, points that were measured, and their places on the axis."""
    for axis, job in dict.fromkeys((r["axis"], r["job"]) for r in records if "error" not in r):
        part = [r for r in records if (r["axis"], r["job"]) == (axis, job) and "error" not in r]
        yield axis, job, part, [r["parameters"] if axis == "model" else r["value"] for r in part]


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the slope of the least-squares line through (log x, log y); None if there is none."""
    if len(x) < 2 or min(*x, *y) <= 0:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(records: Sequence[dict]) -> list[dict]:
    """Return the exponents of each axis and job; model size counts as parameters of the banks."""
    found = []
    for axis, job, part, x in by_line(records):
        values = {
            "seconds": [1 / r["tokens_per_second"] for r in part],
            "cpu_seconds": [r["cpu_seconds_per_token"] for r in part],
            "arithmetic": [r["flops_per_token"] / r["threads"] for r in part],
            "memory": [r["bytes"] for r in part],
        }
        exponents = {name: exponent(x, y) for name, y in values.items()}
        found.append({"axis": axis, "job": job, "points": len(part), **exponents})
    return found


def draw(records: Sequence[dict], figure: Figure) -> None:
    """Draw microseconds per token over each axis, and, dashed, the arithmetic at the first point's speed."""
    axes = list(dict.fromkeys(axis for axis, *_ in by_line(records)))
    places = dict(zip(axes, np.atleast_1d(figure.subplots(1, len(axes))), strict=True))
    jobs = list(cpu_jobs.JOBS)
    for axis, job, part, x in by_line(records):
        place, color = places[axis], f"C{jobs.index(job)}"
        times = [1e6 / r["tokens_per_second"] for r in part]
        work = [r["flops_per_token"] / r["threads"] for r in part]
        place.loglog(x, times, "o-", color=color, label=job)
        place.loglog(x, [w * times[0] / work[0] for w in work], "--", color=color)
        place.set_xticks(x, [f"{value:,}" for value in x])
        place.xaxis.set_minor_formatter("")
        place.set(xlabel="parameters in banks" if axis == "model" else axis, ylabel="microseconds per token")
        place.legend()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--jobs", nargs="+", default=list(cpu_jobs.JOBS), choices=list(cpu_jobs.JOBS))
    parser.add_argument("--preset", default="tiny", help="for all axes but model")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at least")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds of a point")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no new point after this long")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file; needs matplotlib")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(work(*arguments.worker)))
        return 0
    records = measure(arguments)
    found = slopes(records)
    if not found:
        return 1
    rows = [
        ["-" if v is None else f"{v:.2f}" if isinstance(v, float) else v for v in s.values()] for s in found
    ]
    print(f"exponents\n{console.Table(list(found[0]), rows).text()}")
    if arguments.json:
        facts = {**provenance(), "cores": available_cores(), "records": records, "slopes": found}
        write_text(arguments.json, json.dumps(facts, indent=1) + "\n")
    if arguments.plot:
        write_png(arguments.plot, lambda figure: draw(records, figure), (14, 3.6), "plot of growth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
