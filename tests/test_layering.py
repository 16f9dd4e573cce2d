"""Imports point one way (CONTRIBUTING.md), and importing anything is quiet and needs no GPU."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pgolf_fast"
ALONE = PACKAGE / "artifact" / "standalone"  # becomes a program of its own, which the package never imports
LEAVES = {"errors", "files", "report", "config", "data", "tensor_file", "html_page", "drawing"}
# What each room may import of pgolf_fast, besides itself. Rooms that are not named may import anything.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "report": {"errors", "files"},
    "html_page": set(),
    "drawing": {"errors", "files", "html_page", "report"},
    "tensor_file": {"errors", "files"},
    "config": {"errors"},
    "data": {"config", "errors", "files", "report"},
    "kernels": set(),
    "ops": {"kernels", "errors", "files", "report", "_C"},
    "model": {"ops", "config", "errors", "report"},
    "optim": {"ops", "model", "config", "errors"},
    "quant": {"model", "ops"} | LEAVES,
    "evaluation": {"model", "quant", "ops"} | LEAVES,
    "artifact": {"quant", "model", "ops", "_C"} | LEAVES,
    "bench": {"ops", "model", "optim", "train"} | LEAVES,
    "train": {"ops", "model", "optim", "quant", "evaluation"} | LEAVES,
    "loss_curve": {"train"} | LEAVES,
    "reporting": {"artifact", "evaluation", "train", "loss_curve"} | LEAVES,
    "pipeline": {"model", "quant", "evaluation", "artifact", "train"} | LEAVES,
    "analysis": {"model", "ops", "quant", "evaluation", "artifact", "train"} | LEAVES,
    "ablation": {"evaluation", "artifact", "bench", "train", "pipeline"} | LEAVES,
    "audit": {"model", "quant", "evaluation", "artifact", "train", "pipeline"} | LEAVES,
}


def sources(room: str) -> list[Path]:
    """The files of a room: a folder, or a module of that name; none where it does not exist yet."""
    folder = ROOT / room if room == "kernels" else PACKAGE / room
    module = PACKAGE / f"{room}.py"
    return sorted(folder.rglob("*.py")) + ([module] if module.exists() else [])


def modules_named(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all that a module imports, in functions too; `package` resolves leading dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def rooms_imported(path: Path) -> set[str]:
    home = path.relative_to(ROOT).parent.parts
    package = ".".join(home if home[0] == "pgolf_fast" else ("pgolf_fast", *home))
    names = modules_named(ast.parse(path.read_text(encoding="utf-8")), package)
    return {name.split(".")[1] for name in names if name.startswith("pgolf_fast.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    wrong = {
        str(path.relative_to(ROOT)): sorted(outside)
        for path in sources(room)
        if (outside := rooms_imported(path) - MAY_IMPORT[room] - {room, "__version__"})
    }
    assert not wrong, f"{room} may import only {sorted(MAY_IMPORT[room]) or 'itself'}"


def test_rule_sees_every_kind_of_import():
    """The rule above is worth what its reader sees."""
    code = """
import pgolf_fast.train.loop
from pgolf_fast import evaluation
from pgolf_fast.quant import gptq as g
def later():
    from ..artifact import pack
    from . import gpt
    importlib.import_module("pgolf_fast.cli")
"""
    found = {n.split(".")[1] for n in modules_named(ast.parse(code), "pgolf_fast.model")}
    assert found == {"train", "evaluation", "quant", "artifact", "model", "cli"}


def test_rule_has_no_circle():
    seen: set[str] = set()
    while ready := {room for room, below in MAY_IMPORT.items() if below - {"_C"} <= seen} - seen:
        seen |= ready
    assert seen == set(MAY_IMPORT)


def module_names() -> list[str]:
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts if p[-1] != "__main__"]
    return sorted(names)


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": "",
        "PYTHONWARNINGS": "error::DeprecationWarning:pgolf_fast",
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_module_imports_without_triton_or_gpu():
    """`sys.modules[name] = None` makes `import name` raise ImportError."""
    code = f"""
import sys
sys.modules["triton"] = None
import importlib
for name in {module_names()!r}:
    importlib.import_module(name)
assert not any(name.startswith("pgolf_fast.kernels.") for name in sys.modules), "kernels were imported"
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_package_import_is_light():
    done = run("import pgolf_fast, sys; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_print_only_in_the_command_line():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "cli.py" and not {PACKAGE / "cli", ALONE} & {*path.parents}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing, "use pgolf_fast.report"


def test_nothing_imports_the_script_of_a_submission():
    importing = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if ALONE not in path.parents
        for name in modules_named(ast.parse(path.read_text(encoding="utf-8")), "pgolf_fast")
        if "standalone" in name.split(".")
    }
    assert not importing


def test_files_stay_readable():
    places = [(PACKAGE, "*.py"), (ROOT / "kernels", "*.py"), (ROOT / "csrc", "*.*"), (ROOT / "tests", "*.py")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder, pattern in places
        for path in folder.rglob(pattern)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}
