"""Measure training, scoring and test-time training on a CPU, alone and beside busy processes.

    python benchmarks/bench_load.py [--preset tiny] [--loads 0 2 6] [--seconds 2] [--json FILE]

"before" lets OpenMP's threads spin for each other as long as libgomp does by default, and trains each
micro-batch as one; "after" is what pgolf_fast chooses. Further rows: train.cpu_shares 1, fewer threads, and
one core as by `taskset`. Every setting has a process of its own, which waits while another one is measured;
rounds, loads, jobs and settings take turns.
`kept` is the speed beside the load, divided by the speed alone; `fair` is the share that would be kept if
the threads and the busy loops divided the cores equally.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cpu_jobs  # before torch, so that OpenMP is set up
import torch

from pgolf_fast import console
from pgolf_fast.bench.doctor import cpu_cores
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.presets import preset
from pgolf_fast.cores import available_cores
from pgolf_fast.io import write_text

LIBGOMP_SPINS = "300000"  # its default: libgomp/env.c of GCC
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6): pass"


@dataclass(frozen=True)
class Setting:
    name: str
    threads: int
    variables: dict[str, str] = field(default_factory=dict)
    one_share: bool = False


def settings(cores: int) -> list[Setting]:
    fewer = [n for n in (2**k for k in range(16)) if n < cores]
    return [
        Setting("before", cores, {"GOMP_SPINCOUNT": LIBGOMP_SPINS}, one_share=True),
        Setting("after", cores),
        Setting("one share", cores, one_share=True),
        *(Setting(f"{n} of {cores} threads", n, {"OMP_NUM_THREADS": str(n)}) for n in fewer),
        Setting("one core", 1),
    ]


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run that many endless loops beside the block; they also end with this process."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class Worker:
    """A process with one setting, which measures a job when told to."""

    def __init__(self, setting: Setting, name: str, jobs: Sequence[str]):
        self.setting, cores = setting, os.sched_getaffinity(0)
        self.jobs = [job for job in jobs if setting.name != "one share" or job == "train"]
        command = [sys.executable, __file__, "--worker", "--preset", name]
        command += ["--one-share"] if setting.one_share else []
        command += ["--jobs", *self.jobs]
        clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if setting.name == "one core":
            os.sched_setaffinity(0, {min(cores)})  # the child inherits it
        self.process = subprocess.Popen(command, env=clean | setting.variables, text=True, **pipes)
        os.sched_setaffinity(0, cores)
        self.environment = self._read()

    def _read(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"the process of {self.setting.name!r} ended with status {self.process.wait()}")

    def measure(self, job: str, seconds: float) -> dict:
        print(job, seconds, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def work(arguments: argparse.Namespace) -> None:
    """Be a worker: answer each line "JOB SECONDS" with a line of JSON."""
    config = preset(arguments.preset)
    if arguments.one_share:
        config = replace(config, train=replace(config.train, cpu_shares=1))
    running = {name: cpu_jobs.JOBS[name](config) for name in arguments.jobs}
    for job in running.values():
        cpu_jobs.run_for(job, 0.5)  # the first piece sets up libraries
    spins = os.environ.get("GOMP_SPINCOUNT")
    print(json.dumps({"threads": torch.get_num_threads(), "spin_count": spins}), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(json.dumps(cpu_jobs.run_for(running[name], float(seconds))), flush=True)


def measure(arguments: argparse.Namespace, chosen: Sequence[Setting]) -> Iterator[list[dict]]:
    """Yield, after each load, a record per job, setting and load so far: speeds and cores of every round."""
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
                    turns = ((job, w) for job in arguments.jobs for w in workers if job in w.jobs)
                    for job, worker in turns:
                        name, got = worker.setting.name, worker.measure(job, arguments.seconds)
                        facts = {"job": job, "setting": name, "load": load, **worker.environment}
                        record = found.setdefault((job, name, load), {**facts, "speeds": [], "cores": []})
                        record["speeds"].append(got["tokens"] / got["seconds"])
                        record["cores"].append(got["cpu"] / got["seconds"])
                print(f"round {number + 1} of {arguments.rounds}, {load} busy loops: done", flush=True)
                yield list(found.values())


def describe_speeds(records: Sequence[dict], cores: int) -> str:
    """Return the table of medians, and the speed of "after" over "before" without load."""
    speed = {(r["job"], r["setting"], r["load"]): statistics.median(r["speeds"]) for r in records}
    first, *loads = sorted({load for *_, load in speed})
    threads, rows = {r["setting"]: r["threads"] for r in records}, []
    for job, name in dict.fromkeys((job, name) for job, name, _ in speed):
        row = [job, name, f"{threads[name]}", f"{speed[job, name, first]:,.0f}"]
        for load in loads:
            kept = speed[job, name, load] / speed[job, name, first]
            fair = min(1.0, cores / (min(threads[name], cores) + load))
            row += [f"{speed[job, name, load]:,.0f}", f"{kept:.0%}", f"{fair:.0%}"]
        rows.append(row)
    titles = [title for load in loads for title in (f"beside {load}", "kept", "fair")]
    text = console.Table(["job", "setting", "threads", f"tokens/s beside {first}", *titles], rows).text()
    ratios = [
        f"{job} {value / speed[job, 'before', first]:.3f}"
        for (job, name, load), value in speed.items()
        if (name, load) == ("after", first) and (job, "before", first) in speed
    ]
    return text + (f"\nafter / before, beside {first}: {', '.join(ratios)}" if ratios else "")


def main() -> int:
    cores = available_cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--jobs", nargs="+", default=list(cpu_jobs.JOBS), choices=list(cpu_jobs.JOBS))
    parser.add_argument("--loads", nargs="+", type=int, default=[0, cores, 3 * cores], help="busy processes")
    parser.add_argument("--settings", nargs="+", help="some of those in the table; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=2.0, help="start no new round after this long")
    parser.add_argument("--json", type=Path, help="file for the figures, rewritten after each load")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one-share", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return 0
    chosen = [s for s in settings(cores) if arguments.settings is None or s.name in arguments.settings]
    facts = {"preset": arguments.preset, "seconds": arguments.seconds, "cores": cores, **provenance()}
    text = "no load was measured"
    for records in measure(arguments, chosen):
        text = f"{arguments.preset}; {cpu_cores()}\n{describe_speeds(records, cores)}"
        if arguments.json:
            found = {**facts, "records": records, "table": text.splitlines()}
            write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
