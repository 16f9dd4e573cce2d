"""Wheels and editable installs, in fresh environments, without downloads.

New environments see this one's torch through a .pth file. Builds run in a copy of the checkout; a later build
reuses the objects that an earlier one compiled there.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = sysconfig.get_path("purelib")
# By metadata: importing the module `pip` would make setuptools' distutils unavailable in this process.
INSTALLED = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None

pytestmark = pytest.mark.skipif(
    not {"pip", "setuptools", "pybind11"} <= INSTALLED,
    reason="building without downloads needs pip, setuptools and pybind11 here: pip install -e '.[test]'",
)

LOOK = """
import pgolf_fast, logging
logging.basicConfig(format="LOG %(message)s")
from pgolf_fast import kernels
from pgolf_fast.kernels import probe_of_packaging
from pgolf_fast.ops import lzma
print("package", pgolf_fast.__path__[0])
print("kernels", probe_of_packaging.VALUE)
print("backend", lzma.backend())
assert lzma.decompress_bytes(lzma.compress_bytes(b"abc"), 3) == b"abc"
"""


def run(*command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_checkout(folder):
    """Copy the sources, and add a kernel file that the tests can look for."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("pgolf_fast", "csrc", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "kernels" / "probe_of_packaging.py").write_text("VALUE = 42\n")
    return folder


def new_environment(folder):
    """Return the Python of a fresh environment that also sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (purelib,) = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).split()
    # A .pth file appends the folder to the path; .pth files inside it are not read.
    Path(purelib, "borrowed.pth").write_text(SITE_PACKAGES + "\n")
    return python


def install(python, *what, cwd):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(*pip, "install", *flags, *what, cwd=cwd)


def look(python, cwd):
    """Return what a fresh Python prints from `cwd`, as a dict."""
    lines = run(python, "-c", LOOK, cwd=cwd).splitlines()
    return dict(
        line.split(" ", 1) for line in lines if line.split(" ")[0] in {"package", "kernels", "backend", "LOG"}
    )


def build_wheel(checkout, folder, extension):
    """Build a wheel of the checkout in `folder`, and return its path."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    settings = {"PGOLF_FAST_EXT": extension}
    run(*command, "--no-build-isolation", "-w", folder, ".", cwd=checkout, **settings)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("packaging") / "checkout")


def test_wheel_contains_every_module(checkout, tmp_path):
    contents = set(zipfile.ZipFile(build_wheel(checkout, tmp_path, "off")).namelist())
    wanted = {p.relative_to(checkout).as_posix() for p in (checkout / "pgolf_fast").rglob("*.py")}
    wanted |= {f"pgolf_fast/kernels/{p.name}" for p in (checkout / "kernels").glob("*.py")}
    wanted |= {"pgolf_fast/py.typed", "pgolf_fast/_C.pyi"}
    assert wanted <= contents, f"missing in the wheel: {sorted(wanted - contents)} (no __init__.py?)"
    assert not [name for name in contents if name.startswith(("kernels/", "tests/", "csrc/"))]


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(checkout, tmp_path):
    path = build_wheel(checkout, tmp_path, "require" if HAS_COMPILER else "auto")
    contents = zipfile.ZipFile(path).namelist()
    assert any(n.startswith("pgolf_fast/_C.") and n.endswith(".so") for n in contents) == HAS_COMPILER
    python = new_environment(tmp_path / "env")
    install(python, path, cwd=tmp_path)
    outside = look(python, tmp_path)
    assert outside["package"].startswith(str(tmp_path))
    assert outside["kernels"] == "42"
    assert outside["backend"].startswith("liblzma") == HAS_COMPILER
    # In the checkout the sources come first, which have no compiled codecs: that works, with a warning.
    inside = look(python, checkout)
    assert inside["package"] == str(checkout / "pgolf_fast")
    assert inside["kernels"] == "42"
    assert inside["backend"] == "Python's lzma module (extension not built)"
    assert "the C++ codecs are not in use" in inside["LOG"]


@pytest.mark.slow
def test_editable_in_a_fresh_environment(checkout, tmp_path):
    python = new_environment(tmp_path / "env")
    try:
        install(python, "-e", checkout, cwd=tmp_path)
        for folder in (tmp_path, checkout):
            seen = look(python, folder)
            assert seen["package"] == str(checkout / "pgolf_fast")
            assert seen["kernels"] == "42"
            assert seen["backend"].startswith("liblzma") == HAS_COMPILER
        assert (tmp_path / "env" / "bin" / "pgolf").is_file()
    finally:
        for built in (checkout / "pgolf_fast").glob("_C*.so"):
            built.unlink()


@pytest.mark.slow
def test_install_without_a_compiler(tmp_path):
    """Without a C++ compiler the package still installs and works, in Python."""
    checkout = copy_checkout(tmp_path / "checkout")
    missing = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **missing)
    seen = look(new_environment(tmp_path / "env"), checkout)
    assert seen["package"] == str(checkout / "pgolf_fast")
    assert seen["backend"] == "Python's lzma module (extension not built)"
