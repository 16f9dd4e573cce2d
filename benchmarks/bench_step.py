"""Compare our training step on a CPU with the same network, optimizer and data in plain PyTorch.

    python benchmarks/bench_step.py [--preset small] [--threads 1 2] [--rounds 10] [--json FILE]
    python benchmarks/bench_step.py --preset exp101 --micro-batch 2048 --rounds 3

Five ways to compute it take turns in one process: ours, and the peers eager, under torch.compile, under
torch.compile with max-autotune, and compiled with Newton-Schulz (NS) in float32, which a CPU without native
bfloat16 products needs. All begin with the same weights and see the same batches, so their losses must agree
to rounding with those of eager, if that runs. Then comes a profile of one of our steps by operation. A way
that fails is listed with its reason. The exit status is 1 if ours failed or losses disagree.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import cpu_jobs  # before torch, so that OpenMP is set up
import torch
from gpu_session.plain import PlainTrainer
from gpu_session.step import Pool, make_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pgolf_fast import console
from pgolf_fast.bench.doctor import cpu_cores
from pgolf_fast.bench.peers import compile_settings
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.cores import available_cores
from pgolf_fast.distributed import fewer_collections, keep_freed_memory, this_process
from pgolf_fast.io import write_text
from pgolf_fast.ops import reference
from pgolf_fast.train.trainer import Trainer

WARM_UP = 2  # steps that are not timed: compilation, then oneDNN's own set-up
AGREE = 1e-2  # nats: rounding of bfloat16 in Newton-Schulz, over some twenty steps
LONGEST = 15  # operations of the profile


@dataclass
class Way:
    """One implementation of the step."""

    name: str
    advance: Callable[[], float]
    prepare_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def ours(config: RunConfig, pool: Pool) -> Callable[[], float]:
    world = this_process()
    trainer = Trainer(make_model(config, world.device), config, pool, world)
    return lambda: trainer.advance().loss


def plain(config: RunConfig, pool: Pool, compiled: str | None = None, *, wide: bool = False):
    """Return the step of plain PyTorch; with `wide`, Newton-Schulz in float32."""
    settings = None if compiled is None else compile_settings(compiled)
    model = make_model(config, this_process().device)
    trainer = PlainTrainer(model, config, pool.next_batch, compile=settings)
    if wide:
        trainer.functions["newton_schulz"] = torch.compile(wide_newton_schulz, dynamic=False)
    return lambda: float(trainer.advance())


def wide_newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    return reference.newton_schulz(g.float(), steps).to(g.dtype)


WAYS: dict[str, Callable[..., Callable[[], float]]] = {
    "ours": ours,
    "eager": plain,
    "compile": partial(plain, compiled="compile"),
    "compile, NS in float32": partial(plain, compiled="compile", wide=True),
    "max-autotune": partial(plain, compiled="compile-max-autotune"),
}


def prepare(name: str, config: RunConfig, tokens: tuple[Tensor, Tensor]) -> Way:
    """Return a way after its steps of warm-up."""
    start, sequences = time.perf_counter(), config.train.micro_batch_tokens // config.train.seq_len
    way = Way(name, WAYS[name](config, Pool(*tokens, sequences)))
    way.losses += [way.advance() for _ in range(WARM_UP)]
    way.prepare_seconds = time.perf_counter() - start
    return way


def operations(way: Way) -> list[dict]:
    """Return the operations of one step that take longest by themselves."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        way.advance()
    events = sorted(trace.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    rows = [(e.key[:60], e.count, e.self_cpu_time_total) for e in events[:LONGEST]]
    return [{"operation": key, "calls": n, "ms": us / 1e3, "share": us / total} for key, n, us in rows]


def compare(config: RunConfig, threads: int, names: Sequence[str], rounds: int, end: float) -> dict:
    """Measure the ways on that many threads; return a record. Only the first round may begin after `end`."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # compiled code has the number of threads in it
    tokens, ways, failed = cpu_jobs.token_pool(config), dict[str, Way](), dict[str, str]()
    for name in names:
        try:
            ways[name] = prepare(name, config, tokens)
            print(f"{threads} threads, {name}: ready in {ways[name].prepare_seconds:.0f} s", flush=True)
        except Exception as error:  # noqa: BLE001 - one peer's compiler must not lose the others' rows
            failed[name] = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"{threads} threads, {name}: failed: {failed[name]}", flush=True)
    with fewer_collections():  # as in `pgolf train`
        for number in range(rounds):
            if number and time.monotonic() > end:
                print(f"out of time after {number} rounds", flush=True)
                break
            for way in ways.values():
                start = time.perf_counter()
                way.losses.append(way.advance())
                way.seconds.append(time.perf_counter() - start)
    truth = ways.get("eager") or next(iter(ways.values()), None)
    rows = [row(way, ways.get("ours"), truth) for way in ways.values() if truth]
    longest = operations(ways["ours"]) if "ours" in ways else []
    return {"threads": threads, "ways": rows, "failed": failed, "profile": longest}


def row(way: Way, ours: Way | None, truth: Way) -> dict:
    """Return a way's figures; `loss_gap` is the largest difference of a step's loss from that of `truth`."""
    found = {"way": way.name, "median_s": statistics.median(way.seconds), "min_s": min(way.seconds)}
    if ours is not None:
        found["over_ours"] = found["median_s"] / statistics.median(ours.seconds)
        found["min_over_ours"] = found["min_s"] / min(ours.seconds)
    found |= {"loss": way.losses[-1], "prepare_s": way.prepare_seconds}
    found["loss_gap"] = max(abs(a - b) for a, b in zip(way.losses, truth.losses, strict=True))
    return {**found, "seconds": way.seconds, "losses": way.losses}


COLUMNS = {"median_s": ".4f", "min_s": ".4f", "over_ours": ".2f", "min_over_ours": ".2f"}
COLUMNS |= {"loss": ".5f", "loss_gap": ".1e", "prepare_s": ".0f"}


def text_of(record: dict) -> str:
    rows = [
        (r["way"], *(format(r[key], form) if key in r else "-" for key, form in COLUMNS.items()))
        for r in record["ways"]
    ]
    parts = [f"{record['threads']} threads", console.Table(("way", *COLUMNS), rows).text()] if rows else []
    parts += [f"{name} failed: {reason}" for name, reason in record["failed"].items()]
    longest = [
        (o["operation"], f"{o['calls']}", f"{o['ms']:.1f}", f"{o['share']:.1%}") for o in record["profile"]
    ]
    return "\n".join([*parts, console.Table(("operation of ours", "calls", "ms", "share"), longest).text()])


def make_config(arguments: argparse.Namespace) -> RunConfig:
    """Return the preset with steps that are all alike; with --micro-batch, of one micro-batch."""
    config = cpu_jobs.steady(preset(arguments.preset))
    if size := arguments.micro_batch:
        train = replace(config.train, seq_len=min(config.train.seq_len, size))
        config = replace(config, train=replace(train, micro_batch_tokens=size, batch_tokens=size))
    return config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="small", help="for example small, tiny, exp101_tiny, exp101")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, available_cores()}))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--micro-batch", type=int, help="tokens of a step of one micro-batch, at most")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no new round after this long")
    parser.add_argument("--json", type=Path, help="file for the figures, rewritten after each thread count")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # every way compiles the same functions
    config, records, begin = make_config(arguments), list[dict](), time.monotonic()
    shape = f"{config.train.batch_tokens} tokens a step in sequences of {config.train.seq_len}"
    what = f"{arguments.preset}: {shape}; {cpu_cores()}"
    print(what, flush=True)
    for done, threads in enumerate(arguments.threads, start=1):
        end = begin + 60 * arguments.minutes * done / len(arguments.threads)
        records.append(compare(config, threads, arguments.ways, arguments.rounds, end))
        print(text_of(records[-1]), flush=True)
        if arguments.json:
            facts = {"preset": arguments.preset, "what": what, **provenance()}
            write_text(arguments.json, json.dumps({**facts, "records": records}, indent=1) + "\n")
    wrong = [r["way"] for record in records for r in record["ways"] if not r["loss_gap"] <= AGREE]
    if wrong:
        print(f"losses differ by more than {AGREE} nats: {', '.join(wrong)}")
    return 1 if wrong or any("ours" in record["failed"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
