"""Every op has every kind of test: opcheck, gradcheck, compile, strided and, with kernels, interpreted.

An op has a test of a kind if a test of this folder names both the op and the tool in question, itself or
through functions of its file.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch._library.custom_ops import OPDEFS

from pgolf_fast.bench.doctor import kernels_of, public_ops

TESTS = Path(__file__).parent
COLUMNS = ("opcheck", "gradcheck", "compile", "strided", "interpreter")
# column -> names that reveal a test of that kind
TOOLS = {
    "opcheck": {"opcheck"},
    "gradcheck": {"gradcheck"},
    "compile": {"compile"},
    "strided": {"lay_out", "LAYOUTS", "assert_strides_do_not_matter"},
}


@dataclass(frozen=True)
class TestSource:
    """A test function: the names in it, and True if it runs kernels in the interpreter."""

    __test__ = False  # not for pytest

    name: str
    words: frozenset[str]
    interpreted: bool


def read_tests(path: Path) -> list[TestSource]:
    """Return every test function of a file."""
    source = Source(path)
    has_kernels = any(
        isinstance(node, ast.Assign) and ast.unparse(node) == "HAS_KERNELS = True"
        for node in source.tree.body
    )
    return [
        TestSource(name, frozenset(source.words(name)), has_kernels and "device" in _parameters(function))
        for name, function in source.functions.items()
        if name.startswith("test_") and isinstance(function, ast.FunctionDef)
    ]


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


@dataclass
class Source:
    """A Python file whose top-level definitions can be followed."""

    path: Path
    tree: ast.Module = field(init=False)
    functions: Mapping[str, ast.stmt] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_text(encoding="utf-8"))
        self.functions = {name: node for node in self.tree.body for name in _defined(node)}

    def reached(self, name: str) -> Iterator[ast.stmt]:
        """Yield the definition of `name` and those it uses, directly or not."""
        seen, waiting = {name}, [name]
        while waiting:
            node = self.functions[waiting.pop()]
            yield node
            fresh = (_names(node) & self.functions.keys()) - seen
            seen |= fresh
            waiting += sorted(fresh)

    def words(self, name: str) -> set[str]:
        """Return all names and attributes that `name` reaches, without attributes of `reference`."""
        return {word for node in self.reached(name) for word in _names(node)}


def _defined(node: ast.stmt) -> Iterable[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _names(node: ast.AST) -> set[str]:
    words = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            words.add(part.id)
        elif isinstance(part, ast.arg):
            words.add(part.arg)
        elif isinstance(part, ast.Attribute) and ast.unparse(part.value) not in ("reference", "tl"):
            words.add(part.attr)
    return words


def shows(test: TestSource, column: str) -> bool:
    """True if a test is of that column's kind."""
    if column == "interpreter":
        return test.interpreted
    if column == "strided":  # opcheck looks at the strides of results, not at their values
        return "opcheck" not in test.words and (bool(TOOLS[column] & test.words) or "strided" in test.name)
    return bool(TOOLS[column] & test.words)


def needed(op: str) -> list[str]:
    """Return the columns that an op must have."""
    definition, kernels = OPDEFS.get(f"pgolf::{op}"), kernels_of(op)
    differentiable = definition is not None and definition._backward_fn is not None
    unneeded = {"gradcheck": not differentiable, "interpreter": kernels is None}
    return [column for column in COLUMNS if not unneeded.get(column)]


def missing(folder: Path) -> set[tuple[str, str]]:
    """Return (op, column) for every kind of test that an op does not have."""
    evidence = [test for path in sorted(folder.glob("test_*.py")) for test in read_tests(path)]
    holes = set()
    for op in public_ops():
        about = [test for test in evidence if op in test.words]
        holes |= {(op, column) for column in needed(op) if not any(shows(test, column) for test in about)}
        backward = f"{op}_backward"  # a backward op needs an opcheck too
        if f"pgolf::{backward}" in OPDEFS and not any({"opcheck", backward} <= t.words for t in evidence):
            holes.add((op, "opcheck"))
    return holes


def test_every_op_is_covered():
    assert missing(TESTS) == set()


@pytest.mark.parametrize(
    ("file", "test", "op", "column"),
    [
        ("test_mlp.py", "test_gradcheck", "mlp", "gradcheck"),
        ("test_mlp.py", "test_opcheck", "mlp", "opcheck"),
        ("test_residual_norm.py", "test_smear_opcheck", "smear_gate", "opcheck"),
        ("test_newton_schulz.py", "test_compiles_without_graph_break", "newton_schulz", "compile"),
        ("test_muon_update.py", "test_strided_inputs", "muon_apply", "strided"),
    ],
)
def test_a_removed_test_is_missed(file, test, op, column, tmp_path):
    folder = shutil.copytree(TESTS, tmp_path / "ops")
    path = folder / file
    tree = ast.parse(path.read_text())
    kept = [node for node in tree.body if getattr(node, "name", None) != test]
    assert len(kept) == len(tree.body) - 1
    path.write_text(ast.unparse(ast.Module(kept, [])))
    holes = missing(folder)
    assert (op, column) in holes
    assert all(c == column for _, c in holes)


def test_interpreter_needs_the_flag_and_the_fixture(tmp_path):
    text = "HAS_KERNELS = True\n\ndef test_a(device):\n    mlp()\n\ndef test_b():\n    mlp()\n"
    path = tmp_path / "test_x.py"
    path.write_text(text)
    assert [(t.name, t.interpreted) for t in read_tests(path)] == [("test_a", True), ("test_b", False)]
    path.write_text(text.replace("True", "False"))
    assert not any(t.interpreted for t in read_tests(path))


def test_calls_are_followed_through_the_file_and_references_do_not_count(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        "def op(t):\n    return mlp(t)\n\nRUN = op\n\n"
        "def test_a():\n    torch.library.opcheck(RUN)\n\ndef test_b():\n    opcheck(reference.mlp)\n"
    )
    through, reference = read_tests(path)
    assert {"mlp", "opcheck"} <= through.words
    assert "mlp" not in reference.words
