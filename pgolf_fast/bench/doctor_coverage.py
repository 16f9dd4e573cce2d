"""`pgolf doctor --table`: what each op has, read from its registration and from the sources of its tests.

Nothing is declared here. An op has kernels if its source asks the launch table for them; it has a fake and a
gradient if PyTorch's registry says so; it is tested in some way if a test of tests/ops names both the op and
the tool in question, itself or through functions of its file. Where there are no tests, as in an installed
wheel, those columns are "?".
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS

from pgolf_fast import ops  # noqa: F401 - importing them is what registers the ops
from pgolf_fast.ops import muon_update, tiles  # noqa: F401

COLUMNS = (
    "cpu",
    "cuda",
    "fake",
    "autograd",
    "opcheck",
    "gradcheck",
    "compile",
    "strided",
    "interpreter",
    "aot",
)
YES, NO, NOT_MEANT, UNKNOWN = "yes", "no", "-", "?"
# column -> names that give a test of that kind away
_TOOLS = {
    "opcheck": {"opcheck"},
    "gradcheck": {"gradcheck"},
    "compile": {"compile"},
    "strided": {"lay_out", "LAYOUTS", "assert_strides_do_not_matter"},
}
_PACKAGE = Path(__file__).parent
_INTERNAL = "_backward"  # ops that autograd calls belong to the op they are named after


def coverage(tests: Path | None = None) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row of cells for every public op, and notes to print below; `tests` is the folder of op tests."""
    folder = tests or _PACKAGE.parent / "tests" / "ops"
    evidence = [test for path in sorted(folder.glob("test_*.py")) for test in read_tests(path)]
    notes = ['yes / no; "-": not meant to have one']
    if not evidence:
        notes.append(f'"?": the tests are not installed ({folder} has none); run this in a checkout')
    return [(name, *_cells(name, evidence)) for name in public_ops()], notes


def public_ops() -> list[str]:
    """Names of the ops a person may call, in the order of the alphabet."""
    names = (qualified.split("::")[1] for qualified in OPDEFS if qualified.startswith("pgolf::"))
    return sorted(name for name in names if not name.endswith(_INTERNAL))


def _cells(name: str, evidence: list[Test]) -> Iterator[str]:
    definition = OPDEFS[f"pgolf::{name}"]
    kernels, differentiable = kernels_of(name), definition._backward_fn is not None
    yield _said(_serves(name, "CPU"))
    yield tiles.implementation(kernels) if kernels else "torch" if _serves(name, "CUDA") else NOT_MEANT
    yield _said(definition._abstract_fn is not None)
    yield YES if differentiable else NOT_MEANT
    about = [test for test in evidence if name in test.words]
    for column, tools in _TOOLS.items():
        if column == "gradcheck" and not differentiable:
            yield NOT_MEANT
        elif not evidence:
            yield UNKNOWN
        else:
            shown = any(_shows(test, column, tools) for test in about)
            if column == "opcheck" and f"pgolf::{name}{_INTERNAL}" in OPDEFS:  # its backward op needs one too
                shown = shown and any({"opcheck", name + _INTERNAL} <= test.words for test in evidence)
            yield _said(shown)
    if kernels is None:
        yield from (NOT_MEANT, NOT_MEANT)
        return
    yield _said(any(test.interpreted for test in about)) if evidence else UNKNOWN
    yield _said(name in _compiled_ahead())


def _said(truth: bool) -> str:
    return YES if truth else NO


def _serves(name: str, device: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(f"pgolf::{name}", key) for key in (device, "CompositeExplicitAutograd"))


def _shows(test: Test, column: str, tools: set[str]) -> bool:
    if column == "strided":  # opcheck looks at the strides of results, not at their values
        return "opcheck" not in test.words and (bool(tools & test.words) or "strided" in test.name)
    return bool(tools & test.words)


@dataclass(frozen=True)
class Test:
    """A test function: what it names, and whether its kernels run in the interpreter."""

    name: str
    words: frozenset[str]
    interpreted: bool


def read_tests(path: Path) -> list[Test]:
    """Every test function of a file."""
    source = Source(path)
    has_kernels = any(
        isinstance(node, ast.Assign) and ast.unparse(node) == "HAS_KERNELS = True"
        for node in source.tree.body
    )
    return [
        Test(name, frozenset(source.words(name)), has_kernels and "device" in _parameters(function))
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
        """The definition of `name` and those it uses, directly or not."""
        seen, waiting = {name}, [name]
        while waiting:
            node = self.functions[waiting.pop()]
            yield node
            fresh = (_names(node) & self.functions.keys()) - seen
            seen |= fresh
            waiting += sorted(fresh)

    def literal(self, value: ast.expr) -> str:
        """A string, written out or as a constant of the file."""
        if isinstance(value, ast.Name):
            value = self.functions[value.id].value  # type: ignore[attr-defined]  # an assignment
        return ast.literal_eval(value)

    def words(self, name: str) -> set[str]:
        """All names and attributes in what `name` reaches, but for attributes of `reference`."""
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


def kernels_of(name: str) -> str | None:
    """The name under which an op asks the launch table whether to run kernels; None if it never asks."""
    for source in _sources_of_ops():
        for function, node in source.functions.items():
            if f"'pgolf::{name}'" in "".join(map(ast.unparse, getattr(node, "decorator_list", ()))):
                return _asked(source, function)
    return None


@functools.cache
def _sources_of_ops() -> list[Source]:
    return [Source(path) for path in sorted((_PACKAGE / "ops").glob("*.py"))]


def _asked(source: Source, function: str) -> str | None:
    """What `function`, or what it reaches here or in a sibling named *_kernels, passes to uses_kernels."""
    siblings = {
        alias.asname or alias.name: source.path.with_name(f"{alias.name}.py")
        for node in source.tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "pgolf_fast.ops"
        for alias in node.names
        if alias.name.endswith("_kernels")
    }
    for reached in source.reached(function):
        for part in ast.walk(reached):
            if isinstance(part, ast.Call) and ast.unparse(part.func) == "tiles.uses_kernels":
                return source.literal(part.args[0])
            if isinstance(part, ast.Attribute) and (path := siblings.get(ast.unparse(part.value))):
                sibling = next(source for source in _sources_of_ops() if source.path == path)
                if part.attr in sibling.functions and (found := _asked(sibling, part.attr)):
                    return found
    return None


@functools.cache
def _compiled_ahead() -> set[str]:
    """Names that the cases of `pgolf aot` reach; tests/test_aot.py demands all kernels."""
    spec = importlib.util.find_spec("pgolf_fast.bench.aot")
    if spec is None or spec.origin is None:
        return set()
    return Source(Path(spec.origin)).words("CASES")
