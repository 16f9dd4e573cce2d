"""Run tasks in separate processes, several at a time, so that no run inherits compiled code or memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from pgolf_fast import console
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import available_cores


@dataclass(frozen=True)
class Task:
    """A command that calls `worker.end_with_parent` and prints the reason of a failure to standard output."""

    name: str
    command: tuple[str, ...]
    log: Path
    """File for standard error when several tasks run at once."""


@dataclass(frozen=True)
class Failure:
    """A failed task and its reason."""

    name: str
    reason: str


Slot = dict[str, str]  # environment variables of the tasks that run there


def job_task(name: str, path: Path) -> Task:
    """Return the task that runs the job in a folder."""
    command = (sys.executable, "-m", "pgolf_fast.lab.compare.worker", str(path))
    return Task(name, command, path / "worker.log")


def make_slots(workers: int | None, devices: int, *, timed: bool) -> list[Slot]:
    """Return one slot per GPU; without GPUs, `workers` slots that share the CPU's cores.

    The results of `timed` tasks depend on their speed, so they never share. Raises PgolfError if they would.
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
    return [{"OMP_NUM_THREADS": str(max(1, available_cores() // workers))} for _ in range(workers)]


def run_tasks(tasks: Sequence[Task], slots: Sequence[Slot]) -> list[Failure]:
    """Run all tasks in order, one per slot at a time, and return the failures.

    A log line after each task reports progress. On an interrupt all running processes are terminated.
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
                    "%d of %d: %s %s in %s; about %s left",
                    count,
                    len(tasks),
                    task.name,
                    "done" if reason is None else f"FAILED ({reason})",
                    console.duration(seconds),
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
    """Run a task and return the reason of a failure, or None.

    Its standard input stays open for the lifetime of this process (see `worker.end_with_parent`).
    """
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
