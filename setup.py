"""What pyproject.toml cannot say: where kernels/ goes in the package, and how the C++ codecs are built.

PGOLF_FAST_EXT=auto (default) builds `pgolf_fast._C` if it can, =require fails if it cannot, =off skips it.
PGOLF_LZMA=dlopen opens liblzma at run time even where it could be linked.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PROBE = "#include <lzma.h>\nint main() { return lzma_version_number() < 50000000u; }\n"


class Lzma(NamedTuple):
    """Where liblzma was found and the flags that compile and link with it."""

    place: str
    compile_args: list[str]
    link_args: list[str]


def output_of(*command: str) -> str:
    """What a command prints, or nothing when it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def lzma_candidates() -> Iterator[Lzma]:
    include, library = os.environ.get("LZMA_INCLUDE_DIR"), os.environ.get("LZMA_LIBRARY_DIR")
    if include or library:
        link = [*([f"-L{library}"] if library else []), "-llzma"]
        yield Lzma("environment", [f"-I{include}"] if include else [], link)
    if libs := output_of("pkg-config", "--libs", "liblzma"):
        yield Lzma(
            "pkg-config", shlex.split(output_of("pkg-config", "--cflags", "liblzma")), shlex.split(libs)
        )
    yield Lzma("compiler default", [], ["-llzma"])
    brew = output_of("brew", "--prefix", "xz") if sys.platform == "darwin" else ""
    for prefix in dict.fromkeys(filter(None, [os.environ.get("CONDA_PREFIX"), sys.base_prefix, brew])):
        if Path(prefix, "include", "lzma.h").is_file():
            link = [f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib", "-llzma"]
            yield Lzma(prefix, [f"-I{prefix}/include"], link)


def find_lzma() -> Lzma | None:
    """The first candidate that compiles and links a probe; None: liblzma is opened at run time."""
    if os.environ.get("PGOLF_LZMA") == "dlopen":
        return None
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), str(Path(folder, "probe"))
        source.write_text(PROBE)
        for lzma in lzma_candidates():
            command = [*compiler, *lzma.compile_args, str(source), "-o", program, *lzma.link_args]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return lzma
    return None


def pybind11_include() -> str | None:
    """pybind11's headers; torch wheels carry a copy, which helps where nothing can be downloaded."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")  # found, not imported
    if torch and torch.origin:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").is_file():
            return str(include)
    return None


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
    """Compiles with ninja (in parallel, and again when a header changes) where there is one."""

    def build_extension(self, ext: Extension) -> None:
        program = find_ninja()
        if program is None or self.compiler.compiler_type != "unix":
            super().build_extension(ext)
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Outside setuptools' temporary folders, so that objects survive to the next editable install.
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
        objects = [folder / f"{Path(source).stem}.o" for source in ext.sources]
        return "\n".join(
            [
                "rule cxx",
                f"  command = {quoted([*cxx, *flags])} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                f"  command = {quoted(linker)} $in {quoted(list(ext.extra_link_args))} -o $out",
                *[
                    f"build {escaped(obj)}: cxx {escaped(ROOT / source)}"
                    for obj, source in zip(objects, ext.sources, strict=True)
                ],
                f"build {escaped(output)}: link {' '.join(map(escaped, objects))}",
                "",
            ]
        )


def files(folder: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern))


def extensions() -> list[Extension]:
    """The C++ codecs, unless they are switched off or cannot be built here."""
    wanted = os.environ.get("PGOLF_FAST_EXT", "auto")
    if wanted not in {"auto", "require", "off"}:
        sys.exit(f"PGOLF_FAST_EXT is {wanted!r}: use auto, require or off")
    if wanted == "off":
        return []
    include = pybind11_include()
    if include is None:
        if wanted == "require":
            sys.exit("PGOLF_FAST_EXT=require, but pybind11 is not installed: pip install pybind11")
        print("pgolf_fast: no pybind11, so no C++ codecs; Python's lzma module will serve", file=sys.stderr)
        return []
    lzma = find_lzma()
    print(f"pgolf_fast: liblzma: {lzma.place if lzma else 'opened at run time'}", file=sys.stderr)
    return [
        Extension(
            "pgolf_fast._C",
            files("csrc", "*.cpp"),
            depends=files("csrc", "*.h"),
            include_dirs=[str(ROOT / "csrc"), include],
            define_macros=[] if lzma else [("PGOLF_LZMA_DLOPEN", "1")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-pthread",
                *(lzma.compile_args if lzma else []),
            ],
            extra_link_args=[
                "-pthread",
                *(lzma.link_args if lzma else [] if sys.platform == "darwin" else ["-ldl"]),
            ],
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
