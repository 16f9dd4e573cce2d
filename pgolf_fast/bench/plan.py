"""Plans of `pgolf bench` and `pgolf tune` for this machine, and their results as text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pgolf_fast import console
from pgolf_fast.bench import peers, registry, run, store, tune
from pgolf_fast.config.presets import preset, shrink
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.ops import tuned
from pgolf_fast.ops.case import MODES, Mode

GPU_TOKENS = (98_304, 32_768, 196_608)
CPU_TOKENS = (2_048,)
QUICK_TOKENS = (128,)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def bench_plan(
    name: str,
    *,
    ops: Sequence[str] = (),
    tokens: Sequence[int] = (),
    modes: Sequence[Mode] = MODES,
    peer_names: Sequence[str] | None = None,
    dtype: Dtype = "auto",
    quick: bool = False,
    minutes: float | None = None,
) -> run.Plan:
    """Return the plan for a preset on this machine; empty `ops` and `tokens` take all and the usual counts.

    quick: shrink the preset and measure little, to see whether everything runs. Raises PgolfError for unknown
    names.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    config = preset(name)
    usual: tuple[int, ...] = CPU_TOKENS if device is None else GPU_TOKENS
    chosen: tuple[str, ...] = peers.PEERS
    seconds, runs = (2.0 if device is None else 0.5), 20
    if quick:
        usual, chosen, seconds, runs = QUICK_TOKENS, peers.QUICK, 0.02, 5
        config = shrink(config, "tiny")
    for peer in peer_names or ():
        if peer not in peers.PEERS:
            raise PgolfError(f"unknown peer {peer!r}: peers are {', '.join(peers.PEERS)}")
    for count in tokens:
        if count < 1:
            raise PgolfError(f"--tokens has {count}; it must be positive")
    if device is not None and tuned.load_tuned(device) and not quick:
        console.logger.info("set PGOLF_FAST_TUNE=off to measure the launch table as it is written")
    return run.Plan(
        config=config,
        ops=registry.select(ops),
        tokens=tokens or usual,
        peers=chosen if peer_names is None else peer_names,
        dtype=_dtype(dtype, device),
        device=device or torch.device("cpu"),
        modes=[mode for mode in MODES if mode in modes],
        seconds=seconds,
        runs=runs,
        deadline=_deadline(minutes),
    )


def _dtype(name: Dtype, device: torch.device | None) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device is None else resolve_dtype("auto", device)


def _deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + 60 * minutes


def describe(records: list[store.Record]) -> str:
    """Return the summary table, and what was not measured with the reason."""
    parts = []
    if rows := store.summary(records):
        parts.append(console.table(rows, store.SUMMARY_HEADER))
    if missing := store.failures(records):
        parts.append(console.table(missing, ("op", "mode", "tokens", "peer", "not measured because")))
    return "\n\n".join(parts) or "nothing was measured"


def compare_files(before: Path, after: Path, threshold: float) -> tuple[str, bool]:
    """Return a table that compares two results files, and whether one of our ops became slower."""
    comparison = store.compare(store.read_records(before), store.read_records(after), threshold)
    text = console.table(comparison.rows, ("op, mode, tokens, peer", before.name, after.name, "ratio"))
    if comparison.slower:
        text += "\n\nslower than allowed:\n" + "\n".join(comparison.slower)
    return text, bool(comparison.slower)


def tune_plan(
    name: str,
    *,
    ops: Sequence[str] = (),
    kernels: Sequence[str] = (),
    tokens: int | None = None,
    candidates: int = 24,
    minutes: float | None = None,
) -> tune.TunePlan:
    """Return the plan for a preset on this GPU. Raises PgolfError without a GPU."""
    if not torch.cuda.is_available():
        raise PgolfError("pgolf tune measures kernels on a GPU, and PyTorch sees none on this machine")
    config = preset(name)
    device = torch.device("cuda", torch.cuda.current_device())
    return tune.TunePlan(
        config=config,
        ops=registry.select(ops),
        tokens=tokens or config.train.micro_batch_tokens,
        dtype=resolve_dtype("auto", device),
        device=device,
        kernels=kernels,
        candidates=candidates,
        deadline=_deadline(minutes),
    )


def tune_table(found: list[tune.Found]) -> str:
    """Return one line per kernel: its times before and after, and the fastest row."""
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
