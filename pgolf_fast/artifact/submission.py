"""The evaluation script of a submission as one small file, and its size in bytes."""

from __future__ import annotations

import ast
import base64
import functools
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pgolf_fast
from pgolf_fast.console import logger

_MAIN = "pgolf_fast.artifact.standalone.scores"
_DIGEST = "SHA256"  # the global that holds the artifact's digest
_NO_DIGEST = f'{_DIGEST} = ""'
_WRAP = "import base64,lzma\nexec(lzma.decompress(base64.b85decode({!r})))\n"


@dataclass(frozen=True)
class Script:
    """The evaluation script in three equivalent forms, each a complete Python file.

    readable: the concatenated sources; minified: without comments, docstrings and long names; wrapped: the
    minified one, compressed, which unpacks itself when run.
    """

    readable: str
    minified: str
    wrapped: str


def build_script(sha256: str = "") -> Script:
    """Build the script for the artifact with that digest (64 hexadecimal digits), or for any artifact.

    Deterministic for one version of Python, liblzma and python-minifier.
    """
    readable, minified, packed = _parts()
    digest = f'{_DIGEST} = "{sha256}"'
    line = digest.replace(" ", "") + "\n"
    return Script(readable.replace(_NO_DIGEST, digest, 1), line + minified, line + _WRAP.format(packed))


def code_bytes() -> int:
    """Return the size of the wrapped script, which counts against the limit. The artifact does not matter."""
    return len(build_script("0" * 64).wrapped.encode())


@functools.cache
def _parts() -> tuple[str, str, str]:
    """Return the readable script, the minified one without its digest, and that compressed in base 85."""
    readable = _bundle()
    if readable.count(_NO_DIGEST) != 1:
        raise AssertionError(f"the script must have the line {_NO_DIGEST} exactly once")
    minified = _minify(readable.replace(_NO_DIGEST, "", 1))
    return readable, minified, base64.b85encode(_compress(minified.encode())).decode()


# Concatenation


def _bundle() -> str:
    """Concatenate the script's modules into one readable file, each after those it imports."""
    head: list[str] = []
    imports: set[str] = set()
    bodies: dict[str, str] = {}
    origins: dict[str, str] = {}

    def define(name: str, origin: str) -> None:
        if origins.setdefault(name, origin) != origin:
            raise AssertionError(
                f"{name} comes from {origins[name]} and from {origin}: one file can have only one"
            )

    def add(module: str) -> None:
        path = Path(pgolf_fast.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pgolf_fast."):
                if str(node.module) not in bodies:
                    add(str(node.module))
                for alias in node.names:
                    define(alias.asname or alias.name, str(node.module))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    one = type(node)(**{**vars(node), "names": [alias]})
                    define(alias.asname or alias.name.split(".")[0], ast.unparse(one))
                    imports.add(ast.unparse(one))
            elif module == _MAIN and isinstance(node, ast.Expr) and not head:  # its docstring
                head.append(ast.unparse(node))
            else:
                for name in _names(node):
                    define(name, module)
                continue
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
        bodies[module] = "".join(lines).strip()

    add(_MAIN)
    imports.discard("from __future__ import annotations")
    return "\n\n".join([*head, "\n".join(sorted(imports)), *bodies.values()]) + "\n"


def _names(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a module's statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    for target in (*getattr(node, "targets", ()), *filter(None, (getattr(node, "target", None),))):
        yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


# Size


def _minify(source: str) -> str:
    """Shorten the source with python-minifier if it is installed, else drop comments and docstrings."""
    if find_spec("python_minifier") is not None:
        import python_minifier

        return python_minifier.minify(
            source,
            rename_globals=True,
            preserve_globals=[_DIGEST],
            remove_literal_statements=True,
            hoist_literals=False,  # repeated literals cost nothing once compressed
        )
    logger.warning("python-minifier is not installed (extra 'submit'): the script keeps its long names")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _compress(data: bytes) -> bytes:
    """Compress to the smallest .lzma stream over all settings of the literal and position bits."""
    shared = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 16}
    settings = [{**shared, "lc": lc, "pb": pb} for lc in range(5) for pb in range(3)]
    return min((lzma.compress(data, lzma.FORMAT_ALONE, filters=[f]) for f in settings), key=len)
