"""Commands about ops and kernels on this machine: doctor, bench, tune, aot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgolf_fast import console
from pgolf_fast.cli.options import Words
from pgolf_fast.cli.output import print_out


@dataclass(frozen=True)
class Doctor:
    check: bool = False
    """Also check every op, forward and backward, against its reference on this machine."""
    table: bool = False
    """Print only which ops have which implementation and tests."""


def doctor(options: Doctor) -> int:
    from pgolf_fast.bench.doctor import examine

    text, healthy = examine(check=options.check, table=options.table)
    print_out(text)
    return 0 if healthy else 1


@dataclass(frozen=True)
class Bench:
    preset: str = "exp101"
    """Preset whose shapes are measured."""
    ops: Words = ()
    """Ops by the start of their names (mlp, gqa_attention, int6_matmul, ...); default: all."""
    tokens: tuple[int, ...] = ()
    """Token counts; default: 98304 32768 196608 on a GPU, 2048 on a CPU."""
    modes: tuple[Literal["fwd", "fwd+bwd"], ...] = ("fwd", "fwd+bwd")
    """Forward, forward and backward, or both."""
    peers: Words | None = None
    """Other implementations by name; default: all that are installed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is bfloat16 on a GPU and float32 on a CPU."""
    out: Path | None = None
    """JSONL file to append records to."""
    quick: bool = False
    """Shrink the preset to tiny and measure little, without torch.compile, to see whether everything runs."""
    minutes: float | None = None
    """Start nothing new after this long."""
    plots: Path | None = None
    """Folder for roofline.png and ratios.png."""
    records: Path | None = None
    """Print and plot this results file instead of measuring."""
    compare: tuple[Path, Path] | None = None
    """Compare two results files instead, before and after; exit status 1 if one of our ops became slower."""
    threshold: float = 1.1
    """With --compare: allowed ratio of the times, after to before."""


def bench(options: Bench) -> int:
    from pgolf_fast.bench import plots, run, store

    console.setup_logging()
    if options.compare is not None:
        text, slower = store.compare_files(*options.compare, options.threshold)
        print_out(text)
        return 1 if slower else 0
    if options.records is not None:
        records = store.read_records(options.records)
    else:
        results = store.Store(options.out)
        wanted = {
            name: getattr(options, name) for name in ("ops", "tokens", "modes", "dtype", "quick", "minutes")
        }
        try:
            run.measure(run.bench_plan(options.preset, peer_names=options.peers, **wanted), results.add)
        finally:
            results.close()
        records = results.records
    print_out(store.describe(records))
    if options.plots is not None:
        for name, plot in (("roofline.png", plots.plot_roofline), ("ratios.png", plots.plot_ratios)):
            plot(records, options.plots / name)
            print_out(f"wrote {options.plots / name}")
    return 1 if any("error" in record and record["peer"] == "ours" for record in records) else 0


@dataclass(frozen=True)
class Tune:
    preset: str = "exp101"
    """Preset whose shapes are timed."""
    ops: Words = ()
    """Ops by the start of their names; default: all."""
    kernels: Words = ()
    """Kernels by name; default: every kernel that the ops launch."""
    tokens: int | None = None
    """Token count; default: a micro-batch of the preset."""
    candidates: int = 24
    """Limit for the candidates tried per kernel."""
    minutes: float | None = None
    """Start no new candidate after this long."""
    out: Path | None = None
    """JSON file for the results; default: the user's cache, which training reads."""


def tune(options: Tune) -> int:
    from pgolf_fast.bench import tune
    from pgolf_fast.ops import tuned

    console.setup_logging()
    wanted = {name: getattr(options, name) for name in ("ops", "kernels", "tokens", "candidates", "minutes")}
    chosen = tune.tune_plan(options.preset, **wanted)
    path = options.out or tuned.cache_file()
    results = tune.tune(chosen, lambda one: tuned.save_rows(path, [tune.as_tuned(one, chosen)]))
    if not results:
        print_out("no kernel was launched by these ops")
        return 1
    print_out(f"{tune.tune_table(results)}\nwrote {path}")
    return 0


@dataclass(frozen=True)
class Aot:
    presets: Annotated[Words, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET ...")] = (
        "exp101",
        "exp101_swiglu",
    )
    """Presets whose shapes are compiled."""
    arch: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities: 80 (A100), 86, 89, 90 (H100, H200), 100 (B200), 120."""
    out: Path | None = None
    """JSON file for the table."""


def aot(options: Aot) -> int:
    from pgolf_fast.bench import aot

    rows, misfits = aot.compile_presets(options.presets, options.arch)
    print_out(aot.table(rows))
    wrong = [*misfits, *aot.problems(rows)]
    if options.out is not None:
        aot.write(options.out, rows, options.presets)
        print_out(f"wrote {options.out}")
    for name in aot.unreached(rows):
        print_out(f"{name}: not launched at these shapes")
    for line in wrong:
        print_out(line)
    return 1 if wrong else 0
