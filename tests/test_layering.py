"""Imports point one way (CONTRIBUTING.md), and importing anything is quiet and needs no GPU."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pgolf_fast"
ALONE = PACKAGE / "artifact" / "standalone"  # becomes a program of its own, which the package never imports
# Every room from the bottom up, and what it may import of pgolf_fast besides itself.
LEAVES = {"errors", "cores", "console", "io", "distributed", "config", "data"}
DRIVER = {"model", "quant", "artifact", "evaluation", "train", "ops"} | LEAVES
MAY_IMPORT = {
    "errors": set(),
    "cores": set(),
    "io": {"errors"},
    "console": {"errors", "io"},
    "distributed": {"errors", "console"},
    "config": {"errors", "io", "console"},
    "data": {"config", "errors", "cores", "io", "console"},
    "kernels": set(),
    "ops": {"kernels", "errors", "io", "console", "_C"},
    "model": {"ops"} | LEAVES,
    "optim": {"ops", "model"} | LEAVES,
    "quant": {"model", "ops"} | LEAVES,
    "artifact": {"quant", "model", "ops", "_C"} | LEAVES,
    "evaluation": {"artifact", "model", "quant", "ops"} | LEAVES,
    "train": {"ops", "model", "optim", "quant", "evaluation"} | LEAVES,
    "bench": {"ops", "model", "optim", "train"} | LEAVES,
    "lab": {"bench", "optim"} | DRIVER,
    "cli": {"bench", "lab"} | DRIVER,
}


def sources() -> dict[str, Path]:
    """Every module of the package by its full name; a package by its own."""
    folders = {"pgolf_fast": PACKAGE, "pgolf_fast.kernels": ROOT / "kernels"}
    found = {}
    for name, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


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


def imports(texts: dict[str, str], others: Iterable[str] = ()) -> dict[str, set[str]]:
    """The modules among `texts` and `others` that each module of `texts` imports."""
    known = {*texts, *others}
    packages = {name.rpartition(".")[0] for name in known}
    graph = {}
    for name, text in texts.items():
        package = name if name in packages else name.rpartition(".")[0]
        graph[name] = set()
        for wanted in modules_named(ast.parse(text), package):
            while wanted not in known and "." in wanted:
                wanted = wanted.rpartition(".")[0]  # a name inside a module
            graph[name] |= {wanted} & known - {name, "pgolf_fast"}
    return graph


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Modules in no named room, imports that point up, and import cycles between modules."""
    room = {name: name.split(".")[1] for name in graph if "." in name}
    found = [f"{name} stands in no named room" for name in sorted(room) if room[name] not in MAY_IMPORT]
    for name in sorted(room.keys() & graph):
        for other in sorted(graph[name]):
            if room[name] in MAY_IMPORT and room[other] not in MAY_IMPORT[room[name]] | {room[name]}:
                found.append(f"{name} imports {other}: {room[name]} may not import {room[other]}")
    return found + [f"these import each other: {', '.join(names)}" for names in cycles(graph)]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules each of which reaches the others (strongly connected components), largest first."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [*graph[start]]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    together = {
        tuple(sorted(o for o in reach[name] if name in reach[o])) for name in graph if name in reach[name]
    }
    return sorted(map(list, together), key=len, reverse=True)


@functools.cache
def package_graph() -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports."""
    return imports({name: path.read_text(encoding="utf-8") for name, path in sources().items()})


def test_imports_point_one_way():
    assert violations(package_graph()) == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        (
            {"pgolf_fast.quant.grid": "from pgolf_fast.evaluation import score"},
            "quant.grid imports pgolf_fast.evaluation.score: quant may not import evaluation",
        ),
        (
            {"pgolf_fast.train.loop": "def f():\n    from pgolf_fast.lab.audit import check"},
            "train may not import lab",
        ),
        ({"pgolf_fast.lab.audit.check": "from pgolf_fast.cli import commands"}, "lab may not import cli"),
        (
            {
                "pgolf_fast.model.rope": "from . import bank",
                "pgolf_fast.model.bank": "def f():\n    import pgolf_fast.model.layers",
                "pgolf_fast.model.layers": "from pgolf_fast.model.rope import rotary",
            },
            "import each other: pgolf_fast.model.bank, pgolf_fast.model.layers, pgolf_fast.model.rope",
        ),
        ({"pgolf_fast.extra": ""}, "pgolf_fast.extra stands in no named room"),
        ({"pgolf_fast.attic.junk": ""}, "pgolf_fast.attic.junk stands in no named room"),
    ],
    ids=["up", "driver-to-lab", "lab-to-cli", "cycle", "loose-module", "unnamed-room"],
)
def test_each_violation_is_seen(planted, complaint):
    graph = package_graph()
    found = violations({**graph, **imports(planted, graph)})
    assert any(complaint in line for line in found), found


def test_the_root_holds_leaves_only():
    assert {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".so"} == {
        *("__init__.py", "_C.pyi", "py.typed"),
        *("errors.py", "cores.py", "console.py", "io.py", "distributed.py"),
    }


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
        if not {PACKAGE / "cli", ALONE} & {*path.parents}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing, "use pgolf_fast.console"


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
