"""Print lines of each part of the repository and functions that are too long: `python tests/sizes.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pgolf_fast"
FOLDERS = ["config", "data", "ops", "model", "optim", "train", "quant", "artifact", "evaluation"]
FUNCTION, KERNEL = 60, 100  # most lines of a function, and of a `@triton.jit` one


def lines(*places: Path) -> int:
    files = [p for place in places for p in (place.rglob("*") if place.is_dir() else [place])]
    code = [p for p in files if p.suffix in {".py", ".cpp", ".h"} or p in places]
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in code if p.is_file())


def parts() -> dict[str, int]:
    """Lines of Python (C++ for csrc, Markdown for the README) of each part."""
    driver = {name: lines(PACKAGE / name) for name in FOLDERS}
    driver["leaves"] = lines(*PACKAGE.glob("*.py"))
    beside = {name: lines(PACKAGE / name) for name in ("lab", "bench", "cli")}
    whole = {"driver": sum(driver.values()), "package": sum(driver.values()) + sum(beside.values())}
    folders = {name: lines(ROOT / name) for name in ("kernels", "csrc", "benchmarks", "tests")}
    return {**driver, **beside, **whole, **folders, "README.md": lines(ROOT / "README.md")}


def long_functions() -> Iterator[tuple[int, str]]:
    """Length and place of every function over its limit, longest first."""
    found = []
    for folder in ("pgolf_fast", "kernels", "benchmarks", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    size = (node.end_lineno or node.lineno) - node.lineno + 1
                    jit = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                    if size > (KERNEL if jit else FUNCTION):
                        found.append((size, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    yield from sorted(found, reverse=True)


if __name__ == "__main__":
    for name, count in parts().items():
        print(f"{name:12}{count:8,}")
    for size, place in long_functions():
        print(f"{size:4} lines: {place}")
