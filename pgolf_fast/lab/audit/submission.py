"""C10 to C12: size, self-containment and running time of a submission."""

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
from pgolf_fast.lab.audit.check import AuditFinding, fails, holds, undecided
from pgolf_fast.lab.audit.guard import NETWORK, PROGRAMS, run_guarded

ALLOWED = frozenset({"torch", "numpy", "sentencepiece"})
_SCRIPT = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def within_bytes(artifact: Path | None, limit: int) -> AuditFinding:
    """C10: check the size of the artifact plus its evaluation script, as they would be submitted."""
    if artifact is None:
        return undecided("the run is not packed")
    weights, code = artifact.stat().st_size, len(build_script(sizes(artifact).sha256).wrapped.encode())
    total = weights + code
    text = f"artifact {weights:,} + script {code:,} = {total:,} bytes"
    return (
        holds(f"{text} of {limit:,}")
        if total <= limit
        else fails(f"{text}, {total - limit:,} over {limit:,}")
    )


def self_contained(artifact: Path | None, tokenizer: Path, tokens: np.ndarray) -> AuditFinding:
    """C11: check that the script scores the artifact with only the tokenizer and a validation shard.

    tokens: (N,), the content of the shard. The script runs without this package, network and other programs,
    and may open files only in its own folder, in Python's and in the system's.
    """
    if artifact is None:
        return undecided("the run is not packed")
    script = build_script(sizes(artifact).sha256)
    foreign = sorted(_imported(script.readable) - ALLOWED - sys.stdlib_module_names)
    if foreign:
        return fails(f"the script imports {', '.join(foreign)}")
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
        return fails(f"the script needs {', '.join(dict.fromkeys(seen.refused))}")
    if seen.status:
        return fails(f"the script fails: {seen.output.strip().splitlines()[-1]}")
    if outside:
        return fails(f"the script opens {', '.join(map(str, outside[:3]))}")
    return holds(f"imports {', '.join(sorted(ALLOWED))}; scores, opening {', '.join(own)}")


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
    folder: RunFolder | None, training_limit: float | None, evaluation_limit: float | None
) -> AuditFinding:
    """C12: check, by the run's logs, the seconds of training and of evaluation (all three scores)."""
    if folder is None:
        return undecided("an artifact does not record how long it took")
    training = max((row["elapsed"] for row in folder.history() if row["kind"] == "step"), default=None)
    times = (
        ("training", training, training_limit),
        ("evaluation", _evaluation_seconds(folder), evaluation_limit),
    )
    evidence, limited = [], [(took, limit) for _, took, limit in times if limit is not None]
    for what, took, limit in times:
        of = "" if limit is None else f" of {console.duration(limit)}"
        evidence.append(f"{what} {'not logged' if took is None else console.duration(took)}{of}")
    if not limited:
        return undecided(f"{', '.join(evidence)}; no limit given (--train-limit, --eval-limit)")
    return AuditFinding(
        all(took is not None and took <= limit for took, limit in limited), ", ".join(evidence)
    )


def _evaluation_seconds(folder: RunFolder) -> float | None:
    """Return the seconds of the last evaluation in the log, or None if it is not complete."""
    text = folder.log_file.read_text(encoding="utf-8") if folder.log_file.is_file() else ""
    last = {}
    for name, words in re.findall(r"^(non-overlapping|sliding|sliding \+ TTT): done in (\S+)$", text, re.M):
        last[name] = sum(float(n) * _SECONDS[u] for n, u in re.findall(r"([\d.]+)([hms])", words))
    return sum(last.values()) if len(last) == 3 else None
