"""C10 to C12: size, self-containment and running time of a submission."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.submission import build_script
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.data.shards import write_shard
from pgolf_fast.lab.audit.check import AuditFinding
from pgolf_fast.lab.audit.guard import NETWORK, PROGRAMS, run_guarded

ALLOWED = frozenset({"torch", "numpy", "sentencepiece"})
_SCRIPT = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def within_bytes(artifact: Path, limit: int) -> AuditFinding:
    """C10: check the size of the artifact plus its evaluation script, as they would be submitted."""
    weights, code = artifact.stat().st_size, len(build_script(sizes(artifact).sha256).wrapped.encode())
    sum_ = f"artifact {weights:,} + script {code:,} = {weights + code:,} bytes"
    over = weights + code - limit
    if over > 0:
        return AuditFinding(False, f"{sum_}, {over:,} over {limit:,}")
    return AuditFinding(True, f"{sum_} of {limit:,}")


def self_contained(artifact: Path, tokenizer: Path, tokens: np.ndarray) -> AuditFinding:
    """C11: check that the script scores the artifact with only the tokenizer and a validation shard.

    tokens: (N,), the content of the shard. The script runs without this package, network and other programs,
    and may open files only in its own folder, in Python's and in the system's.
    """
    script = build_script(sizes(artifact).sha256)
    foreign = sorted(_imported(script.readable) - ALLOWED - sys.stdlib_module_names)
    if foreign:
        return AuditFinding(False, f"the script imports {', '.join(foreign)}")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        (folder / "train_gpt.py").write_text(script.wrapped, encoding="utf-8")
        shutil.copyfile(artifact, folder / "model.pgolf")
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        write_shard(folder / "audit_val_000000.bin", tokens.astype(np.uint16))
        words = (folder / "train_gpt.py", "--data", folder, "--tokenizer", folder / "tokenizer.model")
        events = (*NETWORK, *PROGRAMS)
        seen = run_guarded(_SCRIPT, words, modules=("pgolf_fast",), events=events, cwd=folder)
        own = sorted(path.name for path in seen.opened if path.parent == folder and path.is_file())
        outside = [path for path in seen.opened if folder not in path.parents and not _is_installed(path)]
    if seen.refused:
        return AuditFinding(False, f"the script needs {', '.join(dict.fromkeys(seen.refused))}")
    if seen.status:
        return AuditFinding(False, f"the script fails: {seen.output.strip().splitlines()[-1]}")
    if outside:
        return AuditFinding(False, f"the script opens {', '.join(map(str, outside[:3]))}")
    return AuditFinding(True, f"imports {', '.join(sorted(ALLOWED))}; scores, opening {', '.join(own)}")


def _imported(source: str) -> set[str]:
    """Return the names of the top-level packages that a program imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names


def _is_installed(path: Path) -> bool:
    """Return whether a file belongs to Python, an installed package, or the system."""
    roots = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *_SYSTEM}
    return any(path.is_relative_to(Path(root).resolve()) for root in roots)


def within_time(
    folder: RunFolder, training_limit: float | None, evaluation_limit: float | None
) -> AuditFinding:
    """C12: check, by the run's logs, the seconds of training and of evaluation (all three scores)."""
    training, evaluation = _training_seconds(folder), _evaluation_seconds(folder)
    evidence, passed, limited = [], True, False
    for what, took, limit in (
        ("training", training, training_limit),
        ("evaluation", evaluation, evaluation_limit),
    ):
        evidence.append(f"{what} {'not logged' if took is None else console.duration(took)}")
        if limit is not None:
            limited = True
            evidence[-1] += f" of {console.duration(limit)}"
            passed = passed and took is not None and took <= limit
    if not limited:
        return AuditFinding(None, f"{', '.join(evidence)}; no limit given (--train-limit, --eval-limit)")
    return AuditFinding(passed, ", ".join(evidence))


def _training_seconds(folder: RunFolder) -> float | None:
    return max((row["elapsed"] for row in folder.history() if row["kind"] == "step"), default=None)


def _evaluation_seconds(folder: RunFolder) -> float | None:
    """Return the seconds of the last evaluation in the log, or None if it is not complete."""
    text = folder.log_file.read_text(encoding="utf-8") if folder.log_file.is_file() else ""
    last = {}
    for name, words in re.findall(r"^(non-overlapping|sliding|sliding \+ TTT): done in (\S+)$", text, re.M):
        last[name] = sum(float(n) * _SECONDS[u] for n, u in re.findall(r"([\d.]+)([hms])", words))
    return sum(last.values()) if len(last) == 3 else None
