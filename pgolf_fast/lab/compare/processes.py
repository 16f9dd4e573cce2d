"""Run jobs in separate processes, several at a time, so that no run inherits compiled code or memory.

`python -m pgolf_fast.lab.compare.processes FOLDER` is the process of one job.
"""

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from pgolf_fast import console
from pgolf_fast.cores import CHOSEN, available_cores
from pgolf_fast.errors import PgolfError, explain


@dataclass(frozen=True)
class Task:
    """A command that calls `end_with_parent` and prints the reason of a failure to standard output."""

    name: str
    command: tuple[str, ...]
    log: Path  # for standard error when several tasks run at once


Slot = dict[str, str]  # environment variables of the tasks that run there


def job_task(name: str, path: Path) -> Task:
    """Return the task that runs the job in a folder."""
    return Task(name, (sys.executable, "-m", __name__, str(path)), path / "worker.log")


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
    if timed and workers > 1:
        text = f"--workers {workers} would let runs of budget time compete for this CPU"
        raise PgolfError(f"{text}: leave --workers out, or use --budget steps")
    share = {"OMP_NUM_THREADS": str(max(1, available_cores() // workers))}
    by_user = "OMP_NUM_THREADS" in os.environ.keys() - CHOSEN.keys()
    return [{} if workers == 1 or by_user else share] * workers


def run_tasks(tasks: Sequence[Task], slots: Sequence[Slot]) -> dict[str, str]:
    """Run all tasks in order, one per slot at a time; return the reason of each failure by the task's name.

    A log line after each task reports progress. On an interrupt all running processes are terminated.
    """
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)
    running: set[subprocess.Popen[str]] = set()
    begin, failures = time.monotonic(), dict[str, str]()

    def work(task: Task) -> tuple[Task, str | None, float]:
        slot, start = free.get(), time.monotonic()
        try:
            console.logger.info("%s begins", task.name)
            return task, _run(task, slot, running, alone=len(slots) == 1), time.monotonic() - start
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            futures = [pool.submit(work, task) for task in tasks]
            for count, future in enumerate(as_completed(futures), start=1):
                task, reason, seconds = future.result()
                if reason is not None:
                    failures[task.name] = reason
                ended = "done" if reason is None else f"FAILED ({reason})"
                left = console.duration((time.monotonic() - begin) / count * (len(tasks) - count))
                text = f"{task.name} {ended} in {console.duration(seconds)}; about {left} left"
                console.logger.info("%d of %d: %s", count, len(tasks), text)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise
    return failures


def _run(task: Task, slot: Slot, running: set[subprocess.Popen[str]], *, alone: bool) -> str | None:
    """Run a task and return the reason of a failure, or None.

    Its standard input stays open for the lifetime of this process (see `end_with_parent`).
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
    return answer.strip() or f"status {status}" + ("" if alone else f": see {task.log}")


def end_with_parent() -> None:
    """End this process when the holder of its standard input ends for any reason.

    Otherwise a run whose parent was killed would continue next to the one started in its place.
    """

    def watch() -> None:
        # Not sys.stdin: this thread would hold its lock when the interpreter shuts down.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the job in the folder that the command line names; print the reason of a failure."""
    end_with_parent()
    from pgolf_fast.lab.compare.jobs import run_job  # late: its imports take seconds

    try:
        run_job(Path(sys.argv[1]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the parent reports any error in one line
        if os.environ.get("PGOLF_TRACEBACK"):
            traceback.print_exc()
        status, reason = explain(error, "lower train.micro_batch_tokens")
        sys.stdout.write(reason)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
