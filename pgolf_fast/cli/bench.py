"""`pgolf bench` and `pgolf tune`: their arguments, and the text and exit status they end with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pgolf_fast import console
from pgolf_fast.bench import peers, plots, registry, run, store, tune
from pgolf_fast.config.presets import preset
from pgolf_fast.config.shrink import shrink
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.ops import tuned
from pgolf_fast.ops.case import MODES, Mode

GPU_TOKENS = (98_304, 32_768, 196_608)
CPU_TOKENS = (2_048,)
QUICK_TOKENS = (128,)


@dataclass(frozen=True)
class Bench:
    """Arguments of `pgolf bench`."""

    preset: str = "exp101"
    """Preset whose shapes are measured."""
    ops: tuple[str, ...] = ()
    """Ops by the beginning of their names (mlp, gqa_attention, int6_matmul, ...); default: all."""
    tokens: tuple[int, ...] = ()
    """Tokens at once; default 98304 32768 196608 on a GPU and 2048 on a CPU."""
    modes: tuple[Mode, ...] = MODES
    """fwd, fwd+bwd, or both."""
    peers: tuple[str, ...] | None = None
    """Peers by name; default: all that exist here."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is bfloat16 on a GPU and float32 on a CPU."""
    out: Path | None = None
    """JSONL file that records are appended to."""
    quick: bool = False
    """The preset shrunk to tiny, few tokens and runs, no torch.compile: does everything run?"""
    minutes: float | None = None
    """Begin nothing new after this long."""
    plots: Path | None = None
    """Folder for roofline.png and ratios.png."""
    records: Path | None = None
    """Show and plot this file instead of measuring."""
    compare: tuple[Path, Path] | None = None
    """Compare two files instead, before and after; exit status 1 when one of our ops became slower."""
    threshold: float = 1.1
    """With --compare: how many times as long an op may take."""


@dataclass(frozen=True)
class Tune:
    """Arguments of `pgolf tune`."""

    preset: str = "exp101"
    """Preset at whose shapes kernels are timed."""
    ops: tuple[str, ...] = ()
    """Ops by the beginning of their names; default: all."""
    kernels: tuple[str, ...] = ()
    """Kernels of the launch table by name; default: every kernel that the ops launch."""
    tokens: int | None = None
    """Tokens at once; default: a micro-batch of the preset."""
    candidates: int = 24
    """Rows tried for one kernel at most."""
    minutes: float | None = None
    """Begin no new candidate after this long."""
    out: Path | None = None
    """JSON file for the rows; default: the user's cache, from which training loads them."""


def bench(arguments: Bench) -> tuple[str, int]:
    """Measure (or read, or compare) and describe. Raises PgolfError for unknown names."""
    if arguments.compare is not None:
        return _compare(*arguments.compare, arguments.threshold)
    if arguments.records is not None:
        records = store.read_records(arguments.records)
    else:
        results = store.Store(arguments.out)
        try:
            run.measure(bench_plan(arguments), results.add)
        finally:
            results.close()
        records = results.records
    text = describe(records)
    if arguments.plots is not None:
        for name, plot in (("roofline.png", plots.plot_roofline), ("ratios.png", plots.plot_ratios)):
            plot(records, arguments.plots / name)
            text += f"\nwrote {arguments.plots / name}"
    ours_failed = any("error" in r and r["peer"] == "ours" for r in records)
    return text, 1 if ours_failed else 0


def bench_plan(arguments: Bench) -> run.Plan:
    """The plan that the arguments ask for on this machine."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    config = preset(arguments.preset)
    tokens: tuple[int, ...] = CPU_TOKENS if device is None else GPU_TOKENS
    chosen: tuple[str, ...] = peers.PEERS
    seconds, runs = (2.0 if device is None else 0.5), 20
    if arguments.quick:
        tokens, chosen, seconds, runs = QUICK_TOKENS, peers.QUICK, 0.02, 5
        config = shrink(config, "tiny")
    for name in arguments.peers or ():
        if name not in peers.PEERS:
            raise PgolfError(f"unknown peer {name!r}: peers are {', '.join(peers.PEERS)}")
    for count in arguments.tokens:
        if count < 1:
            raise PgolfError(f"--tokens has {count}; it must be positive")
    if device is not None and tuned.load_tuned(device) and not arguments.quick:
        console.logger.info("set PGOLF_FAST_TUNE=off to measure the launch table as it is written")
    return run.Plan(
        config=config,
        ops=registry.select(arguments.ops),
        tokens=arguments.tokens or tokens,
        peers=chosen if arguments.peers is None else arguments.peers,
        dtype=_dtype(arguments.dtype, device),
        device=device or torch.device("cpu"),
        modes=[mode for mode in MODES if mode in arguments.modes],
        seconds=seconds,
        runs=runs,
        deadline=_deadline(arguments.minutes),
    )


def _dtype(
    name: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device | None
) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device is None else resolve_dtype("auto", device)


def _deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + 60 * minutes


def describe(records: list[store.Record]) -> str:
    """The summary table, and what has no time with its reason."""
    parts = []
    rows = store.summary(records)
    if rows:
        parts.append(console.table(rows, store.SUMMARY_HEADER))
    missing = store.failures(records)
    if missing:
        parts.append(console.table(missing, ("op", "mode", "tokens", "peer", "not measured because")))
    return "\n\n".join(parts) or "nothing was measured"


def _compare(before: Path, after: Path, threshold: float) -> tuple[str, int]:
    found = store.compare(store.read_records(before), store.read_records(after), threshold)
    text = console.table(found.rows, ("op, mode, tokens, peer", before.name, after.name, "ratio"))
    if found.slower:
        text += "\n\nslower than allowed:\n" + "\n".join(found.slower)
    return text, 1 if found.slower else 0


def tune_kernels(arguments: Tune) -> tuple[str, int]:
    """Measure launch rows on this GPU and keep them. Raises PgolfError without a GPU."""
    if not torch.cuda.is_available():
        raise PgolfError("pgolf tune measures kernels on a GPU, and PyTorch sees none on this machine")
    config = preset(arguments.preset)
    device = torch.device("cuda", torch.cuda.current_device())
    plan = tune.TunePlan(
        config=config,
        ops=registry.select(arguments.ops),
        tokens=arguments.tokens or config.train.micro_batch_tokens,
        dtype=resolve_dtype("auto", device),
        device=device,
        kernels=arguments.kernels,
        candidates=arguments.candidates,
        deadline=_deadline(arguments.minutes),
    )
    path = arguments.out or tuned.cache_file()
    found = tune.tune(plan, lambda one: tuned.save_rows(path, [tune.as_tuned(one, plan)]))
    text = tune_table(found)
    return (f"{text}\nwrote {path}", 0) if found else ("no kernel was launched by these ops", 1)


def tune_table(found: list[tune.Found]) -> str:
    """One line a kernel: the times before and after, and the row that won."""
    rows = []
    for one in found:
        row, ratio = one.best, one.table_ms / one.best_ms
        best = (
            f"{row.block_m} x {row.block_n} x {row.block_k}, {row.num_warps} warps, {row.num_stages} stages"
        )
        counts = f"{one.tried} ({one.failed} failed, {one.wrong} wrong)"
        times = (f"{one.table_ms:.4f}", f"{one.best_ms:.4f}", f"{ratio:.3f}")
        rows.append((one.kernel, one.op, one.mode, *times, best, counts))
    header = ("kernel", "timed in", "mode", "table ms", "best ms", "ratio", "best row", "candidates")
    return console.table(rows, header) if rows else "no kernel was tuned"
