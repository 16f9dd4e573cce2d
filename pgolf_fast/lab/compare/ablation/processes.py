"""Tasks as processes of their own, several at a time: no run inherits another's compiled code or memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from pgolf_fast import console
from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Task:
    """A command that calls `worker.end_with_parent`, and tells standard output why it fails."""

    name: str
    command: tuple[str, ...]
    log: Path
    """Where its standard error goes if others run at the same time."""


@dataclass(frozen=True)
class Failure:
    """A task that failed, and why."""

    name: str
    reason: str


Slot = dict[str, str]  # what a task that runs there finds changed in its environment


def job_task(name: str, path: Path) -> Task:
    """The task of one run's folder."""
    command = (sys.executable, "-m", "pgolf_fast.lab.compare.ablation.worker", str(path))
    return Task(name, command, path / "worker.log")


def make_slots(workers: int | None, devices: int, *, timed: bool) -> list[Slot]:
    """Where tasks run side by side: on each of `devices` GPUs one; without GPUs, `workers` share the cores.

    `timed` tasks, whose result depends on their speed, never share. Raises PgolfError where they would.
    """
    if workers is not None and workers < 1:
        raise PgolfError(f"--workers is {workers}; it must be at least 1")
    if devices:
        if workers is not None and workers > devices:
            raise PgolfError(f"--workers is {workers}, but there are {devices} GPUs, of one run each")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(devices)]
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: workers or devices]]
    workers = workers or 1
    if workers == 1:
        return [{}]
    if timed:
        raise PgolfError(
            f"--workers {workers} would let runs of budget time compete for this CPU: leave --workers out, "
            "or use --budget steps"
        )
    if "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(workers)]
    return [{"OMP_NUM_THREADS": str(max(1, _cores() // workers))} for _ in range(workers)]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tasks(
    tasks: Sequence[Task], slots: Sequence[Slot], done: Callable[[Task], str] = lambda task: ""
) -> list[Failure]:
    """Run all tasks, in order, one in each slot at a time; those that failed.

    After each a line says how far things are, with what `done` says of it. When this is interrupted, the
    processes are ended.
    """
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)
    running: set[subprocess.Popen[str]] = set()
    begin, failures = time.monotonic(), []

    def work(task: Task) -> tuple[Task, str | None, float]:
        slot, start = free.get(), time.monotonic()
        try:
            return task, _run(task, slot, running, alone=len(slots) == 1), time.monotonic() - start
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            futures = [pool.submit(work, task) for task in tasks]
            for count, future in enumerate(as_completed(futures), start=1):
                task, reason, seconds = future.result()
                left = (time.monotonic() - begin) / count * (len(tasks) - count)
                console.logger.info(
                    "%d of %d: %s %s in %s%s; about %s left",
                    count,
                    len(tasks),
                    task.name,
                    "done" if reason is None else f"FAILED ({reason})",
                    console.duration(seconds),
                    done(task) if reason is None else "",
                    console.duration(left),
                )
                if reason is not None:
                    failures.append(Failure(task.name, reason))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise
    return failures


def _run(task: Task, slot: Slot, running: set[subprocess.Popen[str]], *, alone: bool) -> str | None:
    """Why the task failed, or None. Its standard input stays open as long as this process lives."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(os.devnull if alone else task.log, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            task.command,
            env={**os.environ, **slot},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if alone else log,
            text=True,
        )
        running.add(process)
        try:
            with process:
                assert process.stdout is not None
                answer = process.stdout.read()
                status = process.wait()
        finally:
            running.discard(process)
    if status == 0:
        return None
    if status < 0:
        return f"ended by signal {-status}"
    where = "" if alone else f": see {task.log}"
    return answer.strip() or f"status {status}{where}"
