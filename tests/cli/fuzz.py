"""Fuzz the command line: `python tests/cli/fuzz.py --minutes 10 --seed 0`.

Commands with odd options, values, orders, environments and files run in this process. Each has to end with a
known status, at most one `pgolf:` line, and no traceback. The examples follow from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runs import make_dataset, run_config, words  # noqa: E402

from pgolf_fast import cli, console  # noqa: E402
from pgolf_fast.cli.commands import COMMANDS  # noqa: E402
from pgolf_fast.config.fields import flatten  # noqa: E402
from pgolf_fast.config.presets import preset  # noqa: E402

SECONDS = 5  # a command that takes longer is interrupted, as by Ctrl-C
MEMORY = 6 * 2**30  # bytes of address space more than at the start
STATUSES = {0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGALRM}
CHECKS = {"audit", "report", "doctor", "bench", "tune", "aot"}  # these return 1 for what does not hold

# Command lines that work, from which most examples start
BASES = """
demo --seconds 1 --out new
train tiny --out new
train tiny --out run --resume
import run/model.safetensors tiny --out new
import weights.pt tiny --out new
quantize run
pack run
pack run --table --measure raw --json new.json
eval run
eval run --weights float
eval run --data data --tokenizer data/tokenizer.model
eval run --estimate
eval exp101 --estimate --data data
submit run
submit run --out new
generate run --tokens 3 --prompt a
config
config exp101 --diff small
config --from-env run.sh
completion bash
data info data
data tokenize docs.jsonl --vocab-size 300 --out new --workers 1
data tokenize text.txt docs.jsonl --tokenizer data/tokenizer.model --out new --workers 1
data download sp1024 --endpoint http://127.0.0.1:9 --out new
audit run --only C10
audit run
report run
report run --out new.html
ablate tiny --steps 1 --flip model.trigram=false --out new
seeds run run2
seeds run run2 --against run3 run4
ttt-sweep run --adapters sgd --stride 64
analyze run --only spectra --out new
analyze run run2 --out new
analyze run/model.pgolf --out new
doctor
bench --records records.jsonl
bench --compare records.jsonl records.jsonl
bench --ops mlp --quick --minutes 0.01
tune --minutes 0.01
aot --arch 90 --out new.json
help train
data
"""
ODD = """
0 1 2 3 -1 7 1e3 1.5 -0.0 nan inf -inf 1e400 1e-400 1_000 0x10 ٣ 2147483648 9223372036854775808 - -- é 日本
true none off a,b = a=b $(id) ' * ~ ../.. %s{} \udcff \x1b[31m
"""
FILES = """
run run2 run3 run.sh docs.jsonl text.txt records.jsonl data data/tokenizer.model run/model.pgolf new . /
run/model.safetensors weights.pt empty binary latin1 nested.json huge.json list.json folder dangling loop fifo
-dash b\udcffd nowhere empty/x folder/x/y locked /dev/null /dev/full /proc/version run/config.json
run/metrics.jsonl
"""
WORDS = """
tiny small exp101 reference rd sgd lora float artifact C1 C10 C99 spectra losses eager mlp bash raw
"""
LONG = ["9" * 30, "9" * 5000, "-" + "9" * 30, "x" * 300, "x" * 100_000, "", " ", "a\nb", "with space"]
VALUES = [None, True, -1, 0, 10**30, 1e308, float("nan"), "abc", "", [], {}, [1], {"a": 1}, "é" * 100, [[]]]
ENVIRONMENTS = """
WORLD_SIZE=2 WORLD_SIZE= RANK=3 LOCAL_RANK=x WORLD_SIZE=0 OMP_NUM_THREADS=abc COLUMNS=1 COLUMNS=x TERM= LANG=C
PGOLF_FAST_CACHE= PGOLF_FAST_CACHE=/dev/null PGOLF_FAST_TUNE=odd PGOLF_TRACEBACK=0 HOME=/nowhere
CUDA_VISIBLE_DEVICES=x XDG_CACHE_HOME=binary TMPDIR=/nowhere
"""


def make_world(place: Path) -> None:
    """Write the files that every example gets a copy of."""
    for maker in (_make_run, _make_files):
        maker(place)


def _call(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = cli.main([str(a) for a in arguments])
    assert status == 0, errors.getvalue()


def _make_run(place: Path) -> None:
    data = make_dataset(place / "data")
    config = run_config(data, train__steps=2, data__val_tokens=400)
    _call("train", "tiny", "--out", place / "run", *words(config))
    _call("quantize", place / "run", "--quant.method", "round")
    _call("pack", place / "run")
    for weights in ("artifact", "float"):
        _call("eval", place / "run", "--weights", weights)
    for name in ("run2", "run3", "run4"):
        shutil.copytree(place / "run", place / name)
    for path in place.rglob("config.json"):  # the copies are read where they are
        path.write_text(path.read_text().replace(str(data), "data"))
    torch.save({"a": torch.zeros(3)}, place / "weights.pt")


def _make_files(place: Path) -> None:
    docs = [json.dumps({"text": f"Document {i} of no importance. " * 20}) for i in range(20)]
    record = {"kind": "bench", "preset": "tiny", "op": "mlp", "peer": "ours", "mode": "fwd", "tokens": 64}
    record |= {
        "dtype": "float32",
        "device": "cpu",
        "median_ms": 1.0,
        "roofline_percent": 3.0,
        "environment": {},
    }
    texts = {
        "run.sh": "export SEED=$SEED ITERATIONS=3\nMATRIX_LR=0.1 python train_gpt.py\n",
        "docs.jsonl": "\n".join(docs),
        "text.txt": "A text of no importance. " * 50,
        "records.jsonl": json.dumps(record),
        "empty": "",
        "nested.json": "[" * 99_999,
        "huge.json": '{"a": ' + "9" * 5000 + "}",
        "list.json": "[1, 2]",
        "-dash": "text",
        "with space": "text",
        "b\udcffd": "text",
        "locked": "text",
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    (place / "binary").write_bytes(bytes(range(256)) * 9)
    (place / "latin1").write_bytes(b"caf\xe9 = 1\n")
    (place / "folder").mkdir()
    (place / "dangling").symlink_to("missing")
    (place / "loop").symlink_to("loop")
    (place / "locked").chmod(0)


def copy_world(world: Path, place: Path) -> None:
    shutil.copytree(world, place, symlinks=True, copy_function=shutil.copy)
    os.mkfifo(place / "fifo")


def option_words() -> dict[str, list[str]]:
    """Return the options of every command, and of their groups of configuration fields."""
    fields = [name for name, _ in flatten(preset("tiny"))]
    found = {}
    for name, command in COMMANDS.items():
        own = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command.load())]
        groups = getattr(_marker(command.load()), "groups", None)
        chosen = [] if groups is None else [f for f in fields if not groups or f.partition(".")[0] in groups]
        found[name] = [*own, *(f"--{f}" for f in chosen)]
    return found


def _marker(kind):
    from pgolf_fast.cli.options import _marker

    return _marker(kind)


def draw_example(draw: random.Random, options: dict[str, list[str]]) -> dict:
    """Draw a command line, files of the run to damage, and variables of the environment."""
    if draw.random() < 0.85:
        start = draw.choice(BASES.strip().splitlines()).split()
    else:
        start = [*draw.choice(list(COMMANDS)).split(), draw.choice((FILES + WORDS).split())]
    name = " ".join(start[: 2 if start[:1] == ["data"] else 1])
    values = [*ODD.split(), *FILES.split(), *WORDS.split(), *LONG]
    argv = start
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        option = draw.choice([*options.get(name, ["--out"]), "--help", "--nonsense", "-x"])
        extra = [option, *draw.choices(values, k=draw.choice((0, 1, 1, 1, 2)))]
        extra = ["=".join(extra)] if len(extra) == 2 and draw.random() < 0.5 else extra
        at = draw.choice([len(argv), min(len(argv), len(name.split()))])
        argv = [*argv[:at], *extra, *argv[at:]]
    if draw.random() < 0.15:
        at = draw.randrange(len(argv))
        argv = [*argv[:at], draw.choice(values), *argv[at + 1 :]]
    damage = [tuple(map(draw.randrange, (99, 16, 9999))) for _ in range(draw.choice((0, 0, 1, 2)))]
    environment = draw.sample(ENVIRONMENTS.split(), draw.choice((0, 0, 0, 1)))
    return {"argv": argv, "damage": damage, "environment": environment}


def damage_file(folder: Path, which: int, how: int, where: int) -> str:
    """Damage a file of a run, and return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[which % len(files)]
    content = path.read_bytes()
    kinds = [
        "cut",
        "empty",
        "delete",
        "folder",
        "link",
        "garbage",
        "latin1",
        "list",
        "object",
        "nested",
        "flip",
    ]
    kind = "json" if how > 10 and path.suffix in (".json", ".jsonl") else kinds[how % len(kinds)]
    if kind in ("delete", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        if kind == "link":
            path.symlink_to("missing")
        return f"{path.name}: {kind}"
    at = where % max(1, len(content))
    new = {
        "cut": content[:at],
        "empty": b"",
        "garbage": bytes(range(256)),
        "latin1": content[:at] + b"\xe9\xff" + content[at:],
        "list": b"[]",
        "object": b"{}",
        "nested": b"[" * 99_999,
        "flip": content[:at] + bytes([content[at] ^ 0xFF] if content else []) + content[at + 1 :],
    }
    if kind == "json":
        with contextlib.suppress(Exception):  # damaged already
            path.write_bytes(_changed_json(content, where))
    else:
        path.write_bytes(new[kind])
    return f"{path.name}: {kind} {at if kind != 'json' else where}"


def _changed_json(content: bytes, where: int) -> bytes:
    """Return JSON lines, or one document, with one value replaced by an odd one."""
    text = content.decode()
    lines = text.splitlines() if "\n{" in text else [text]
    tree = json.loads(lines[where % len(lines)])
    places = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    for node, key in places:
        if isinstance(child := node[key], (dict, list)):
            places += [(child, k) for k in (child if isinstance(child, dict) else range(len(child)))]
    node, key = places[where % len(places)]
    node[key] = VALUES[where % len(VALUES)]
    lines[where % len(lines)] = json.dumps(tree)
    return "\n".join(lines).encode()


def _ends(text):
    """Return whether the last line is the one of the command; `import` shows a table after it."""
    return text.splitlines()[-1].startswith("pgolf: ") or " holds another model, " in text


def outcome(example: dict, world: Path) -> tuple[str | None, str, int]:
    """Run an example; return what is wrong with how it ended, if anything, its output, and the status."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder) / "here"
        copy_world(world, place)
        done = [damage_file(place / "run", *one) for one in example["damage"]]
        before = dict(os.environ)
        os.environ.update(pair.split("=", 1) for pair in example["environment"])
        os.chdir(place)
        out, errors = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, cli._end)
        gc.disable()  # an interrupt in a callback of it, which Hypothesis has, would be printed
        begin = time.process_time()
        signal.alarm(SECONDS)
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(errors),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                status = cli.main(example["argv"])
        except BaseException as error:  # noqa: BLE001 - the worst outcome
            status = 999
            errors.write(f"main raised {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
            busy = time.process_time() - begin
            gc.enable()
            console.close_logging()
            os.environ.clear()
            os.environ.update(before)
            os.chdir("/")
            subprocesses_end()
    text = errors.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("pgolf: ")]
    name = example["argv"][0] if example["argv"] else ""
    wrong = None
    if "Traceback" in text + out.getvalue() or "this is a bug" in text or status == 999:
        wrong = re.sub(
            r"\d+|'[^']*'", "_", re.sub(r".*this is a bug in pgolf_fast", "bug", text[-1500:], flags=re.S)
        )
    elif status not in STATUSES or (status == 1 and name not in CHECKS):
        wrong = f"status {status}"
    elif len(lines) != (status not in (0, 1)) or (lines and not _ends(text)):
        wrong = f"{len(lines)} pgolf lines and status {status}"
    elif status == 128 + signal.SIGALRM and busy < 0.05 * SECONDS and len(text.splitlines()) == 1:
        wrong = f"{name} waits without a word"
    return wrong, f"damage {done}\n{text[-1500:]}", status


def subprocesses_end() -> None:
    """Collect children that an interrupted command left behind."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def fuzz(
    first: int, seconds: float, limit: int | None, world: Path
) -> tuple[int, dict[str, str], dict[int, int]]:
    """Run examples until the time or their number is out; return their count, the failures, the statuses."""
    end, count, failures = time.monotonic() + seconds, 0, dict[str, str]()
    statuses: dict[int, int] = {}
    number, seen, options = 0, set[str](), option_words()
    while time.monotonic() < end and (limit is None or count < limit):

        @seed(first * 1_000_000 + number)
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.randoms(use_true_random=True))
        def batch(draw: random.Random) -> None:
            nonlocal count
            if time.monotonic() > end or (limit is not None and count >= limit):
                return
            example = draw_example(draw, options)
            if str(example) in seen:
                return
            seen.add(str(example))
            count += 1
            begin = time.monotonic()
            wrong, text, status = outcome(example, world)
            statuses[status] = statuses.get(status, 0) + 1
            if os.environ.get("FUZZ_VERBOSE"):
                print(
                    f"{time.monotonic() - begin:.1f}s {status}",
                    str(example)[:300],
                    file=sys.__stdout__,
                    flush=True,
                )
            if wrong is not None and wrong not in failures:
                failures[wrong] = f"{str(example)[:2000]}\n{text}"
                print(f"FAILED {wrong}\n{failures[wrong]}\n", file=sys.__stdout__, flush=True)

        batch()
        number += 1
    return count, failures, statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, help="end after this many, however fast the machine is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        world.mkdir()
        make_world(world)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
        count, failures, statuses = fuzz(options.seed, 60 * options.minutes, options.examples, world)
    ends = ", ".join(f"{n} with status {status}" for status, n in sorted(statuses.items()))
    print(f"seed {options.seed}: {count} examples ({ends}), {len(failures)} kinds of failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
