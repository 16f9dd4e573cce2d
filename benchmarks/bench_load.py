"""Measure training, scoring and test-time training on a CPU, alone and beside busy processes.

    python benchmarks/bench_load.py [--preset tiny] [--loads 0 2 6] [--seconds 2] [--json FILE]

"before" lets OpenMP's threads spin for each other as long as libgomp does by default; "after" is what
importing pgolf_fast chooses. Further rows: fewer threads, and one core as by `taskset`. Every setting has a
process of its own, which waits while another one is measured; rounds, loads, jobs and settings take turns.
`kept` is the speed beside the load over the speed alone; `fair` is the share of the CPU that a scheduler
gives to as many threads beside as many busy loops.
"""

import pgolf_fast  # noqa: F401 - first: it sets what torch reads when it is imported

# isort: split
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cpu_jobs import JOBS, run_for

from pgolf_fast import console
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.presets import preset
from pgolf_fast.cores import available_cores
from pgolf_fast.io import write_text

LIBGOMP_SPINS = "300000"  # its default: libgomp/env.c of GCC
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


@dataclass(frozen=True)
class Setting:
    """How a process computes."""

    name: str
    threads: int
    variables: dict[str, str] = field(default_factory=dict)
    one_core: bool = False


def settings(cores: int) -> list[Setting]:
    fewer = [n for n in (2**k for k in range(16)) if n < cores]
    return [
        Setting("before", cores, {"GOMP_SPINCOUNT": LIBGOMP_SPINS}),
        Setting("after", cores),
        *(Setting(f"{n} thread{'s' * (n > 1)}", n, {"OMP_NUM_THREADS": str(n)}) for n in fewer),
        Setting("one core", 1, one_core=True),
    ]


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run that many endless loops beside the block; they also end with this process."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class Worker:
    """A process that measures when it is told to."""

    def __init__(self, setting: Setting, name: str, jobs: Sequence[str]):
        self.setting = setting
        cores = os.sched_getaffinity(0)
        command = [sys.executable, __file__, "--worker", "--preset", name, "--jobs", *jobs]
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
        if setting.one_core:
            os.sched_setaffinity(0, {min(cores)})  # the child inherits it
        try:
            self.process = subprocess.Popen(
                command,
                env=environment | setting.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            os.sched_setaffinity(0, cores)
        self.environment = self._read()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"the process of {self.setting.name!r} ended with status {self.process.wait()}")

    def measure(self, job: str, seconds: float) -> dict:
        assert self.process.stdin is not None
        print(job, seconds, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def work(arguments: argparse.Namespace) -> None:
    """Be a worker: answer each line "JOB SECONDS" with a line of JSON."""
    config = preset(arguments.preset)
    running = {name: JOBS[name](config) for name in arguments.jobs}
    for job in running.values():
        run_for(job, 0.5)  # the first piece sets up libraries
    spins = os.environ.get("GOMP_SPINCOUNT")
    print(json.dumps({"threads": torch.get_num_threads(), "spin_count": spins}), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(json.dumps(run_for(running[name], float(seconds))), flush=True)


def measure(arguments: argparse.Namespace, chosen: Sequence[Setting]) -> list[dict]:
    """Return one record per setting, job and load: tokens per second of every round, and CPU seconds."""
    found: dict[tuple[str, str, int], dict] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for setting in chosen:
            workers.append(Worker(setting, arguments.preset, arguments.jobs))
            stack.callback(workers[-1].close)
            print(f"{setting.name}: {workers[-1].environment}", flush=True)
        end = time.monotonic() + 60 * arguments.minutes
        for number in range(arguments.rounds):
            if number and time.monotonic() > end:
                print(f"stopped after {number} rounds and {arguments.minutes:g} minutes", flush=True)
                break
            for load in arguments.loads:
                with busy_loops(load):
                    for job in arguments.jobs:
                        for worker in workers:
                            name, got = worker.setting.name, worker.measure(job, arguments.seconds)
                            record = {"setting": name, "job": job, "load": load, **worker.environment}
                            record = found.setdefault((name, job, load), {**record, "speeds": [], "cpu": []})
                            record["speeds"].append(got["tokens"] / got["seconds"])
                            record["cpu"].append(got["cpu"] / got["seconds"])
                print(f"round {number + 1} of {arguments.rounds}, {load} busy loops: done", flush=True)
    return list(found.values())


def fair_share(threads: int, load: int, cores: int) -> float:
    """Return the share of its quiet speed that an equal division of the cores leaves."""
    return min(1.0, cores / (min(threads, cores) + load))


def table(records: Sequence[dict], cores: int) -> console.Table:
    speed = {(r["job"], r["setting"], r["load"]): statistics.median(r["speeds"]) for r in records}
    loads = sorted({load for *_, load in speed})
    rows = []
    for job, name in dict.fromkeys((job, name) for job, name, _ in speed):
        threads = next(r["threads"] for r in records if r["setting"] == name)
        quiet = speed[job, name, loads[0]]
        row = [job, name, f"{threads}", f"{quiet:,.0f}"]
        for load in loads[1:]:
            value = speed[job, name, load]
            share = fair_share(threads, load, cores)
            row += [f"{value:,.0f}", f"{value / quiet:.0%}", f"{share:.0%}"]
        rows.append(row)
    head = ["job", "setting", "threads", "quiet tokens/s" if loads[0] == 0 else f"beside {loads[0]}"]
    head += [title for load in loads[1:] for title in (f"beside {load}", "kept", "fair")]
    return console.Table(head, rows)


def cost_when_quiet(records: Sequence[dict]) -> str:
    """Return the speed of "after" over "before" without load, by job."""
    speed = {(r["job"], r["setting"]): statistics.median(r["speeds"]) for r in records if r["load"] == 0}
    jobs = [job for job, name in speed if name == "after" and (job, "before") in speed]
    return ", ".join(f"{job} {speed[job, 'after'] / speed[job, 'before']:.3f}" for job in jobs) + (
        " times as fast when quiet, after over before" if jobs else ""
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    cores = available_cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--loads", nargs="+", type=int, default=[0, cores, 3 * cores], help="busy processes")
    parser.add_argument("--settings", nargs="+", help="some of those in the table; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=2.0, help="start no new round after this long")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    arguments, cores = parse(), available_cores()
    if arguments.worker:
        work(arguments)
        return 0
    chosen = [s for s in settings(cores) if arguments.settings is None or s.name in arguments.settings]
    records = measure(arguments, chosen)
    text = f"{arguments.preset} on {cores} cores\n{table(records, cores).text()}\n{cost_when_quiet(records)}"
    print(text)
    if arguments.json:
        facts = {"preset": arguments.preset, "cores": cores, "seconds": arguments.seconds, **provenance()}
        write_text(
            arguments.json,
            json.dumps({**facts, "records": records, "table": text.splitlines()}, indent=1) + "\n",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
