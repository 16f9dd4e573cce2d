"""Compare our training step on a CPU with the same network, optimizer and data in plain PyTorch.

    python benchmarks/bench_step.py [--preset small] [--threads 1 2] [--rounds 10] [--json FILE]
    python benchmarks/bench_step.py --preset exp101 --micro-batch 2048 --rounds 3

Ways take turns in one process: ours, and the peers eager, under torch.compile, under torch.compile with
max-autotune, and compiled with Newton-Schulz in float32, which a CPU without bfloat16 products needs. All
begin with the same weights and see the same batches, so their losses must agree to rounding. Then comes a
profile of one of our steps by operation. A way that fails is a row with the reason. The exit status is 1 if
ours failed or losses disagree.
"""

import pgolf_fast  # noqa: F401 - first: it sets what torch reads when it is imported

# isort: split
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from cpu_jobs import steady, token_pool
from gpu_session.plain import PlainTrainer
from gpu_session.step import Pool, make_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pgolf_fast import console
from pgolf_fast.bench.peers import compile_settings
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.cores import available_cores, describe
from pgolf_fast.distributed import this_process
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

    def step(self, *, timed: bool = True) -> None:
        start = time.perf_counter()
        self.losses.append(self.advance())
        if timed:
            self.seconds.append(time.perf_counter() - start)


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
    start = time.perf_counter()
    way = Way(
        name, WAYS[name](config, Pool(*tokens, config.train.micro_batch_tokens // config.train.seq_len))
    )
    for _ in range(WARM_UP):
        way.step(timed=False)
    way.prepare_seconds = time.perf_counter() - start
    return way


def operations(way: Way) -> list[dict]:
    """Return the operations of one step that take longest by themselves, in milliseconds."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        way.advance()
    events = trace.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    events = sorted(events, key=lambda e: -e.self_cpu_time_total)[:LONGEST]
    return [
        {
            "operation": e.key[:60],
            "calls": e.count,
            "ms": e.self_cpu_time_total / 1e3,
            "share": e.self_cpu_time_total / total,
        }
        for e in events
    ]


def compare(config: RunConfig, threads: int, names: Sequence[str], rounds: int, end: float) -> dict:
    """Measure the ways on that many threads; return their record. No round begins after `end`."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # compiled code has the number of threads in it
    tokens, ways, failed = token_pool(config), list[Way](), dict[str, str]()
    for name in names:
        try:
            ways.append(prepare(name, config, tokens))
            print(f"{threads} threads, {name}: ready in {ways[-1].prepare_seconds:.0f} s", flush=True)
        except Exception as error:  # noqa: BLE001 - one peer's compiler must not lose the others' rows
            failed[name] = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"{threads} threads, {name}: failed: {failed[name]}", flush=True)
    for number in range(rounds):
        if number and time.monotonic() > end:
            print(f"out of time after {number} rounds", flush=True)
            break
        for way in ways:
            way.step()
    found = {w.name: w for w in ways}
    return {
        "threads": threads,
        "ways": [row(way, found.get("ours"), found.get("eager")) for way in ways],
        "failed": failed,
        "profile": operations(found["ours"]) if "ours" in found else [],
    }


def row(way: Way, ours: Way | None, reference: Way | None) -> dict:
    """Return a way's figures; differences of losses are those from `reference`."""
    median = statistics.median(way.seconds)
    truth = way if reference is None else reference
    gaps = [abs(a - b) for a, b in zip(way.losses, truth.losses, strict=False)]
    return {
        "way": way.name,
        "median_s": median,
        "min_s": min(way.seconds),
        "over_ours": None if ours is None else median / statistics.median(ours.seconds),
        "min_over_ours": None if ours is None else min(way.seconds) / min(ours.seconds),
        "last_loss": way.losses[-1],
        "largest_gap": max(gaps),
        "prepare_s": way.prepare_seconds,
        "seconds": way.seconds,
        "losses": way.losses,
    }


HEAD = ("way", "median s", "min s", "over ours", "min over ours", "last loss", "largest gap", "prepared in s")


def text_of(record: dict) -> str:
    rows = [
        (
            r["way"],
            f"{r['median_s']:.4f}",
            f"{r['min_s']:.4f}",
            *("-" if r[k] is None else f"{r[k]:.2f}" for k in ("over_ours", "min_over_ours")),
            f"{r['last_loss']:.5f}",
            f"{r['largest_gap']:.1e}",
            f"{r['prepare_s']:.0f}",
        )
        for r in record["ways"]
    ]
    rows += [(name, f"failed: {reason}", *["-"] * 6) for name, reason in record["failed"].items()]
    longest = [
        (o["operation"], f"{o['calls']}", f"{o['ms']:.1f}", f"{o['share']:.1%}") for o in record["profile"]
    ]
    parts = [f"{record['threads']} threads", console.Table(HEAD, rows).text()]
    parts += [console.Table(("operation of ours", "calls", "ms", "share"), longest).text()] if longest else []
    return "\n".join(parts)


def make_config(arguments: argparse.Namespace) -> RunConfig:
    """Return the preset with steps that are all alike; with --micro-batch, of one micro-batch."""
    config = steady(preset(arguments.preset))
    if size := arguments.micro_batch:
        train = replace(config.train, seq_len=min(config.train.seq_len, size))
        config = replace(config, train=replace(train, micro_batch_tokens=size, batch_tokens=size))
    return config


def parse() -> argparse.Namespace:
    cores = available_cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="small", help="for example small, tiny, exp101_tiny, exp101")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--micro-batch", type=int, help="tokens of a step, as one micro-batch; default: the preset's"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="start no new round after this long")
    parser.add_argument(
        "--json", type=Path, help="file for the figures, rewritten after each count of threads"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    torch._dynamo.config.recompile_limit = 64  # every way compiles the same functions
    config, records, begin = make_config(arguments), list[dict](), time.monotonic()
    shape = f"{config.train.batch_tokens} tokens a step in sequences of {config.train.seq_len}"
    what = f"{arguments.preset}: {shape}; {describe()}"
    print(what, flush=True)
    for done, threads in enumerate(arguments.threads, start=1):
        end = begin + 60 * arguments.minutes * done / len(arguments.threads)
        records.append(compare(config, threads, arguments.ways, arguments.rounds, end))
        print(text_of(records[-1]), flush=True)
        if arguments.json:
            facts = {"preset": arguments.preset, "what": what, **provenance()}
            write_text(arguments.json, json.dumps({**facts, "records": records}, indent=1) + "\n")
    wrong = [r["way"] for record in records for r in record["ways"] if not r["largest_gap"] <= AGREE]
    if wrong:
        print(f"losses differ by more than {AGREE} nats: {', '.join(wrong)}")
    return 1 if wrong or any("ours" in record["failed"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
