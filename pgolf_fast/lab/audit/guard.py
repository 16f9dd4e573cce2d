"""Run a Python program under an audit hook: record the files it opens, and deny files, modules and calls.

The hook (PEP 578) sees what Python opens. It does not see files that a library opens in native code, as
SentencePiece does with its model.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import pgolf_fast

_PROGRAM = """
import atexit, fnmatch, json, os, sys

asked, code = json.loads(sys.argv[1]), sys.argv[2]
seen = {"opened": [], "refused": []}

def refuse(what):
    seen["refused"].append(what)
    raise PermissionError(13, "refused by the audit", what)

def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path != asked["log"]:
            if any(fnmatch.fnmatch(path, pattern) for pattern in asked["files"]):
                refuse(path)
            seen["opened"].append(path)
    elif event == "import" and args[0].split(".")[0] in asked["modules"]:
        refuse("import " + args[0])
    elif event in asked["events"]:
        refuse(event)

def write():
    with open(asked["log"], "w") as file:
        json.dump(seen, file)

atexit.register(write)
del sys.argv[:3]
sys.addaudithook(hook)
exec(compile(code, "<audited>", "exec"), {"__name__": "__main__"})
"""
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto")
_HOMES = ("PYTHONHOME", "PYTHONUSERBASE")  # locations of Python and its packages
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


@dataclass(frozen=True)
class GuardedRun:
    """Exit status and output of a program, the files it opened, and what it was denied."""

    status: int
    output: str
    opened: list[Path]
    refused: list[str]


def run_guarded(
    code: str,
    arguments: Sequence[str | Path] = (),
    *,
    files: Sequence[str] = (),
    modules: Sequence[str] = (),
    events: Sequence[str] = (),
    cwd: Path | None = None,
    needs: Collection[str] = (),
) -> GuardedRun:
    """Run a program in a separate Python process in the folder `cwd`, with `arguments` as sys.argv.

    Deny it paths that match `files`, imports of `modules`, and the Python audit events `events`. With
    `needs`, it can import only those packages and inherits no import path or Python settings, so the
    outcome does not depend on the working directory or PYTHONPATH.
    """
    paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    usable = [p for p in paths if any(Path(p, name).is_dir() for name in needs)]
    paths = usable if needs else [str(Path(pgolf_fast.__file__).parents[1]), *paths]
    kept = {k: v for k, v in os.environ.items() if not (needs and k.startswith("PYTHON")) or k in _HOMES}
    here = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if cwd is not None:
        here["TMPDIR"] = str(cwd)  # PyTorch writes to the temporary folder to test whether it can
    with TemporaryDirectory() as folder:
        log = Path(folder).resolve() / "seen.json"
        asked = {"log": str(log), "files": list(files), "modules": list(modules), "events": list(events)}
        command = [sys.executable, "-c", _PROGRAM, json.dumps(asked), code, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env={**kept, **here}, capture_output=True, text=True)
        seen = json.loads(log.read_text()) if log.is_file() else {"opened": [], "refused": []}
    opened = [Path(path) for path in dict.fromkeys(seen["opened"])]
    return GuardedRun(done.returncode, done.stdout + done.stderr, opened, seen["refused"])
