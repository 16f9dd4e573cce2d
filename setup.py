"""Build steps that pyproject.toml cannot express: kernels/ as a subpackage, and the C++ codecs.

PGOLF_FAST_EXT=auto (default) builds `pgolf_fast._C` if possible, =require fails if it is not, =off skips it.
LZMA_INCLUDE_DIR and LZMA_LIBRARY_DIR say where liblzma is, if the compiler does not find it by itself.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# -Wno-psabi: vectors are passed between inlined functions only, so their calling convention does not matter
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-pthread"]
PROBE = "#include <lzma.h>\nint main() { return lzma_version_number() < 50000000u; }\n"


def lzma_candidates() -> list[tuple[list[str], list[str]]]:
    """Return compile and link flags to try, in order."""
    include, library = os.environ.get("LZMA_INCLUDE_DIR"), os.environ.get("LZMA_LIBRARY_DIR")
    candidates = [([f"-I{include}"] if include else [], [f"-L{library}"] if library else [])]
    for prefix in (os.environ.get("CONDA_PREFIX"), sys.base_prefix, "/opt/homebrew/opt/xz"):
        if prefix and Path(prefix, "include", "lzma.h").is_file():
            candidates.append(([f"-I{prefix}/include"], [f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib"]))
    return [(compile_args, [*link_args, "-llzma"]) for compile_args, link_args in candidates]


def find_lzma() -> tuple[list[str], list[str]] | None:
    """Return the first flags that build a probe; None leaves LZMA to Python's lzma module."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), str(Path(folder, "probe"))
        source.write_text(PROBE)
        for compile_args, link_args in lzma_candidates():
            command = [*compiler, *compile_args, str(source), "-o", program, *link_args]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return compile_args, link_args
    return None


def pybind11_include() -> str | None:
    """Return the folder of pybind11's headers; torch wheels carry a copy, which works without a download."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")  # located, not imported
    include = Path(torch.origin).parent / "include" if torch and torch.origin else None
    return str(include) if include and (include / "pybind11" / "pybind11.h").is_file() else None


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja"):
        import ninja

        program = Path(ninja.BIN_DIR, "ninja")
        if program.is_file():
            return str(program)
    return shutil.which("ninja")


def quoted(words: list[str]) -> str:
    return " ".join(shlex.quote(word).replace("$", "$$") for word in words)


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuildExt(build_ext):
    """Compile with ninja if it is installed: in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        program = find_ninja()
        if program is None or self.compiler.compiler_type != "unix":
            super().build_extension(ext)
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Outside setuptools' temporary folders, so that objects are reused by the next build.
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, folder, output))
        if subprocess.run([program, "-C", str(folder)], check=False).returncode:
            raise CompileError(f"ninja could not build {ext.name}")

    def ninja_file(self, ext: Extension, folder: Path, output: Path) -> str:
        cxx = getattr(self.compiler, "compiler_so_cxx", None) or [os.environ.get("CXX", "c++"), "-fPIC"]
        linker = getattr(self.compiler, "linker_so_cxx", None) or [cxx[0], "-shared"]
        flags = [f"-I{path}" for path in [*ext.include_dirs, *self.include_dirs]]
        flags += [f"-D{name}={value}" for name, value in ext.define_macros] + list(ext.extra_compile_args)
        objects = {source: folder / f"{Path(source).stem}.o" for source in ext.sources}
        lines = [
            "rule cxx",
            f"  command = {quoted([*cxx, *flags])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {quoted(linker)} $in {quoted(list(ext.extra_link_args))} -o $out",
        ]
        lines += [f"build {escaped(obj)}: cxx {escaped(ROOT / source)}" for source, obj in objects.items()]
        lines.append(f"build {escaped(output)}: link {' '.join(map(escaped, objects.values()))}")
        return "\n".join(lines) + "\n"


def extensions() -> list[Extension]:
    """Return the C++ codecs, unless they are switched off or cannot be built here."""
    wanted = os.environ.get("PGOLF_FAST_EXT", "auto")
    if wanted not in {"auto", "require", "off"}:
        sys.exit(f"PGOLF_FAST_EXT is {wanted!r}: use auto, require or off")
    if wanted == "off":
        return []
    include = pybind11_include()
    if include is None:
        if wanted == "require":
            sys.exit("PGOLF_FAST_EXT=require, but pybind11 is not installed: pip install pybind11")
        print("pgolf_fast: pybind11 is not installed, so the C++ codecs are not built", file=sys.stderr)
        return []
    lzma = find_lzma()
    if lzma is None:
        print("pgolf_fast: liblzma cannot be linked; Python's lzma module will be used", file=sys.stderr)
    compile_args, link_args = lzma or ([], [])
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp")}
    return [
        Extension(
            "pgolf_fast._C",
            sorted(sources if lzma else sources - {"csrc/lzma_codec.cpp", "csrc/bind_lzma.cpp"}),
            depends=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.h")),
            include_dirs=[str(ROOT / "csrc"), include],
            define_macros=[] if lzma else [("PGOLF_NO_LZMA", "1")],
            extra_compile_args=[*FLAGS, *compile_args],
            extra_link_args=["-pthread", *link_args],
            language="c++",
            optional=wanted == "auto",
        )
    ]


# kernels/ has no __init__.py (it would hide the PyPI package of that name), so find_packages does not see it.
setup(
    packages=[*find_packages(include=["pgolf_fast", "pgolf_fast.*"]), "pgolf_fast.kernels"],
    package_dir={"pgolf_fast.kernels": "kernels"},
    package_data={"pgolf_fast.kernels": ["README.md"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuildExt},
)
