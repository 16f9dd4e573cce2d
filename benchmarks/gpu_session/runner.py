"""Run the parts of a GPU session, each in a separate process with its share of the time."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import torch

from benchmarks import gpu_session
from pgolf_fast import console
from pgolf_fast.bench.store import provenance
from pgolf_fast.io import write_text

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu_session"
# part -> its share of the time, in the order they run
PARTS = {"correct": 0.15, "ops": 0.25, "step": 0.3, "eval": 0.2, "tune": 0.1}
# The same for a GPU that has never run this: right in bfloat16, a first number, then what costs more time
FIRST = {"correct": 0.12, "step": 0.45, "ops": 0.15, "tune": 0.13, "eval": 0.15}
FIRST_MINUTES = 40.0
CACHE = ROOT / "build" / "gpu_session"  # of Inductor and Triton: one process compiles, the next loads
GRACE = 15.0  # seconds between the end of a part's time and its end by force
DRY_PRESET = "tiny"


def main() -> int:
    arguments = parse()
    out = arguments.out
    if arguments.worker is not None:
        return work(arguments, out)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_session: this machine has no CUDA GPU; rehearse with --dry-run", file=sys.stderr)
        return 2
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(CACHE / name.split("_")[0].lower()))
    shares = FIRST if arguments.first else PARTS
    end = time.monotonic() + 60 * arguments.minutes
    summary: dict[str, object] = {"build": None if arguments.dry_run else build_extension(), "parts": {}}
    waiting = [part for part in shares if part in arguments.parts]
    states = {}
    while waiting:
        part = waiting.pop(0)
        left = end - time.monotonic() - GRACE
        seconds = left * shares[part] / (shares[part] + sum(shares[p] for p in waiting))
        states[part] = run_part(part, seconds, arguments, out)
        summary |= {**provenance(), "parts": states, "text": describe(out, states).splitlines()}
        write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(describe(out, states))
    return 0 if all(state["ok"] for state in states.values()) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=gpu_session.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, help="for all parts together (default 9; --first: 40)")
    text = "first contact with a GPU: bfloat16 only, the step before the ops, tiles of attention and MLP"
    parser.add_argument("--first", action="store_true", help=text)
    out = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / time.strftime("session-%Y%m%d-%H%M%S")
    text = "folder; default $OUT or benchmarks/results/session-<date>"
    parser.add_argument("--out", type=Path, default=out, help=text)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--preset", default="exp101")
    parser.add_argument("--ops", nargs="*", default=[], help="ops by the beginning of their names")
    parser.add_argument("--tokens", nargs="*", type=int, default=[], help="of part ops")
    parser.add_argument("--peers", nargs="*", default=[], help="of part ops")
    parser.add_argument("--contenders", nargs="*", default=[], help="of part step, by parts of their names")
    parser.add_argument("--steps", type=int, default=200, help="of part step, at most")
    parser.add_argument("--worker", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--slow", default="", help=argparse.SUPPRESS)
    parser.add_argument("--way-seconds", type=float, default=240.0, help="for one contender, at most")
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = FIRST_MINUTES if arguments.first else 9.0
    if arguments.minutes <= 0.5:
        parser.error(f"--minutes is {arguments.minutes}; give at least 1")
    return arguments


def build_extension() -> str:
    """Compile the C++ extension in place if it is missing; without it the Python codecs are used."""
    if list((ROOT / "pgolf_fast").glob("_C.*")):
        return "already built"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return "built" if done.returncode == 0 else f"failed: {(done.stderr or done.stdout)[-500:]}"


def run_part(part: str, seconds: float, arguments: argparse.Namespace, out: Path) -> dict[str, object]:
    """Run a part in its own process, end it in time, and return its state."""
    print(f"--- {part}: {seconds:.0f} s", flush=True)
    (out / f"{part}.json").unlink(missing_ok=True)
    if seconds < 5:
        return finish_part(out, part, "skipped: out of time", 0.0, None, [])
    command = [sys.executable, str(PROGRAM), "--worker", part, "--seconds", str(seconds)]
    command += ["--out", str(out), "--preset", arguments.preset, "--steps", str(arguments.steps)]
    command += ["--way-seconds", str(arguments.way_seconds), "--slow", arguments.slow]
    command += [f"--{name.replace('_', '-')}" for name in ("dry_run", "first") if getattr(arguments, name)]
    for name in ("ops", "tokens", "peers", "contenders"):
        values = getattr(arguments, name)
        command += [f"--{name}", *map(str, values)] if values else []
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that its compiler processes end with it
    )
    tail: deque[str] = deque(maxlen=60)
    reader = threading.Thread(target=echo, args=(process, tail), daemon=True)
    reader.start()
    status = "done"
    try:
        process.wait(timeout=seconds + GRACE / 2)
    except subprocess.TimeoutExpired:
        status = "stopped: out of time"
    finally:
        end_group(process)
    reader.join(timeout=5)
    if process.stdout is not None and not reader.is_alive():
        process.stdout.close()
    if status == "done" and process.returncode not in (0, 1):
        status = f"crashed with exit status {process.returncode}"
    return finish_part(out, part, status, time.monotonic() - start, process.returncode, list(tail))


def echo(process: subprocess.Popen[str], tail: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        tail.append(line.rstrip("\n"))
        print(line, end="", flush=True)


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill the part and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish_part(
    out: Path, part: str, status: str, seconds: float, code: int | None, tail: list[str]
) -> dict[str, object]:
    """Record in the part's file how it ended, keeping what it had written."""
    path = out / f"{part}.json"
    content = json.loads(path.read_text()) if path.is_file() else {"part": part}
    ok = status == "done" and code == 0 and content.get("status") == "done"
    if status == "done" and content.get("status") != "done":
        status = "crashed"
    if not ok:
        content["output_tail"] = tail
    content.update(status=status, ok=ok, exit_status=code, seconds=round(seconds, 1))
    write_text(path, json.dumps(content, indent=1) + "\n")
    return {"status": status, "ok": ok, "seconds": round(seconds, 1)}


def describe(out: Path, states: dict[str, dict[str, object]]) -> str:
    """Summarize the session: states of the parts, ops against their best peers, the training step."""
    rows = [(part, state["status"], state["ok"], state["seconds"]) for part, state in states.items()]
    parts = [console.Table(("part", "status", "ok", "seconds"), rows).text()]
    found = {part: json.loads((out / f"{part}.json").read_text()) for part in states}
    wrong = [r for r in found.get("correct", {}).get("checks", []) if r["ok"] is False]
    parts += (
        [console.Table(("wrong", "why"), [(r["what"], r["verdict"]) for r in wrong]).text()] if wrong else []
    )
    parts += found.get("ops", {}).get("table", [])
    for part, name, columns in (("step", "T1", STEPS), ("step", "T2", STEPS), ("eval", "E1", CHUNKS)):
        if records := found.get(part, {}).get(name):
            values = [(r["contender"], *(shown(r[column]) for column in columns)) for r in records]
            parts.append(console.Table((name, *columns), values).text())
    parts += found.get("tune", {}).get("table", [])
    return "\n\n".join(parts)


CHUNKS = ("chunk_ms", "score_ms", "adapt_ms", "plain_eager_over_this", "plain_compile_over_this")
STEPS = (
    "micro_batch_tokens",
    "median_ms",
    "tokens_per_second",
    "mfu_percent",
    "peak_gib",
    "best_plain_over_this",
)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def work(arguments: argparse.Namespace, out: Path) -> int:
    """Run one part, in its own process."""
    started = time.monotonic()
    if arguments.dry_run:
        torch.set_num_threads(1)
    from benchmarks.gpu_session import correct, evaluate, ops, step
    from benchmarks.gpu_session.session import Session

    console.setup_logging()
    session = Session(
        out=out,
        seconds=arguments.seconds,
        started=started,
        dry=arguments.dry_run,
        preset=DRY_PRESET if arguments.dry_run else arguments.preset,
        ops=tuple(arguments.ops),
        tokens=tuple(arguments.tokens),
        steps=4 if arguments.dry_run else arguments.steps,
        peers=tuple(arguments.peers),
        contenders=tuple(arguments.contenders),
        first=arguments.first,
        command=tuple(sys.argv[1:]),
        way=arguments.way,
        micro=arguments.micro,
        slow=arguments.slow,
        way_seconds=arguments.way_seconds,
    )
    parts = {
        "correct": correct.run,
        "ops": ops.run_ops,
        "step": step.run,
        "eval": evaluate.run,
        "tune": ops.run_tune,
    }
    return 0 if parts[arguments.worker](session) else 1
