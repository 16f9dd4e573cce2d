"""Commands about ops and kernels on this machine: doctor, bench, tune, aot."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pgolf_fast.cli.options import Words, pick, wrote
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import need_writable, well_formed


@dataclass(frozen=True)
class Doctor:
    check: bool = False  # Also check every op, forward and backward, against its reference on this machine.
    table: bool = False  # Print only the table of the implementations and tests that each op has.
    # First download the prebuilt FlashAttention 3 (extra fa3); training never downloads it.
    fetch_fa3: bool = False

    def main(self) -> int:
        from pgolf_fast.bench.doctor import examine, fetch_fa3

        if self.fetch_fa3:
            wrote(fetch_fa3())
        text, healthy = examine(check=self.check, table=self.table)
        print(text)
        return 0 if healthy else 1


@dataclass(frozen=True)
class Bench:
    preset: str = "exp101"  # Preset whose shapes are measured.
    ops: Words = ()  # Ops, by the start of their names (mlp, gqa_attention, int6_matmul, ...); default: all.
    tokens: tuple[int, ...] = ()  # Token counts; default: 98304 32768 196608 on a GPU, 2048 on a CPU.
    modes: tuple[Literal["fwd", "fwd+bwd"], ...] = ("fwd", "fwd+bwd")  # Passes to measure.
    peers: Words | None = None  # Other implementations by name; default: all that are installed.
    # Compute dtype; auto is bfloat16 on a GPU and float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    out: Path | None = None  # JSONL file to append records to.
    # Smoke test: shrink the preset to tiny and take few measurements, without torch.compile.
    quick: bool = False
    minutes: float | None = None  # Start no new measurement after this long.
    plots: Path | None = None  # Folder for roofline.png and ratios.png.
    records: Path | None = None  # Print and plot this results file instead of measuring.
    # Compare two results files instead, before and after; exit status 1 if one of our ops became slower.
    compare: tuple[Path, Path] | None = None
    threshold: float = 1.1  # With --compare: largest allowed ratio of times, after to before.

    def main(self) -> int:
        from pgolf_fast.bench import plots, store

        if self.compare is not None:
            with well_formed(self.compare[1]):
                text, slower = store.compare_files(*self.compare, self.threshold)
            print(text)
            return 1 if slower else 0
        records = self._measure() if self.records is None else store.read_records(self.records)
        with well_formed(self.records) if self.records else contextlib.nullcontext():
            print(store.describe(records))
            if self.plots is not None:
                for name, plot in (("roofline.png", plots.plot_roofline), ("ratios.png", plots.plot_ratios)):
                    plot(records, self.plots / name)
                    wrote(self.plots / name)
            return 1 if any("error" in record and record["peer"] == "ours" for record in records) else 0

    def _measure(self) -> list[dict[str, Any]]:
        from pgolf_fast.bench import run, store

        wanted = pick(self, "ops tokens modes dtype quick minutes")
        if self.out is not None:
            need_writable(self.out.parent, "--out FILE")
        with contextlib.closing(store.Store(self.out)) as results:
            run.measure(run.bench_plan(self.preset, peer_names=self.peers, **wanted), results.add)
        return results.records


@dataclass(frozen=True)
class Tune:
    preset: str = "exp101"  # Preset whose shapes are timed.
    ops: Words = ()  # Ops by the start of their names; default: all.
    kernels: Words = ()  # Kernels by name; default: every kernel that the ops launch.
    tokens: int | None = None  # Token count; default: a micro-batch of the preset.
    candidates: int = 24  # Maximum number of candidates tried per kernel.
    minutes: float | None = None  # Start no new candidate after this long.
    out: Path | None = None  # JSON file for the results; default: the user's cache, which training reads.

    def main(self) -> int:
        from pgolf_fast.bench import tune
        from pgolf_fast.ops import tuned

        if self.candidates < 1 or (self.tokens is not None and self.tokens < 1):
            raise PgolfError(f"--candidates {self.candidates}, --tokens {self.tokens}: give at least 1")
        chosen = tune.tune_plan(self.preset, **pick(self, "ops kernels tokens candidates minutes"))
        path = self.out or tuned.cache_file()
        need_writable(path.parent, "--out FILE")
        results = tune.tune(chosen, lambda one: tuned.save_rows(path, [tune.as_tuned(one, chosen)]))
        if not results:
            print("no kernel was launched by these ops")
            return 1
        print(tune.tune_table(results))
        wrote(path)
        return 0


@dataclass(frozen=True)
class Aot:
    # Presets whose shapes are compiled.
    presets: Annotated[Words, Positional, arg(metavar="PRESET ...")] = ("exp101", "exp101_swiglu")
    arch: tuple[int, ...] = (80, 90, 100)  # GPU capabilities: 80 (A100), 86, 89, 90 (H100), 100 (B200), 120.
    out: Path | None = None  # JSON file for the table.

    def main(self) -> int:
        from pgolf_fast.bench import aot

        if self.out is not None:
            need_writable(self.out.parent, "--out FILE")
        rows, misfits = aot.compile_presets(self.presets, self.arch)
        print(aot.table(rows))
        wrong = [*misfits, *aot.problems(rows)]
        if self.out is not None:
            aot.write(self.out, rows, self.presets)
            wrote(self.out)
        for line in (*(f"{name}: not launched at these shapes" for name in aot.unreached(rows)), *wrong):
            print(line)
        return 1 if wrong else 0
