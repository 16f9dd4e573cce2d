"""The package as people install it: a wheel and an editable install, each in a fresh environment.

Nothing is downloaded: the new environments see this one's torch through a .pth file. The builds run in a copy
of the checkout, so that they neither see nor change what lies in it.
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
# by metadata: looking for the module `pip` would make setuptools' distutils unavailable in this process
INSTALLED = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not {"pip", "setuptools", "pybind11"} <= INSTALLED,
        reason="building without downloads needs pip, setuptools and pybind11 here: pip install -e '.[test]'",
    ),
]

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
    """The sources alone, with a kernel file of which this test knows the contents."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("pgolf_fast", "csrc", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "kernels" / "probe_of_packaging.py").write_text("VALUE = 42\n")
    return folder


def new_environment(folder):
    """Python of a fresh environment that also sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (purelib,) = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).split()
    # A .pth file adds the folder behind the new environment's own and reads no .pth files in it.
    Path(purelib, "borrowed.pth").write_text(SITE_PACKAGES + "\n")
    return python


def install(python, *what, cwd):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(*pip, "install", *flags, *what, cwd=cwd)


def look(python, cwd):
    """What a fresh Python sees from `cwd`, as a dict of the lines it printed."""
    lines = run(python, "-c", LOOK, cwd=cwd).splitlines()
    return dict(
        line.split(" ", 1) for line in lines if line.split(" ")[0] in {"package", "kernels", "backend", "LOG"}
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(checkout, wheel file built from it)."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_checkout(folder / "checkout")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    strict = {"PGOLF_FAST_EXT": "require"} if HAS_COMPILER else {}
    run(*command, "--no-build-isolation", "-w", folder, ".", cwd=checkout, **strict)
    (path,) = folder.glob("*.whl")
    return checkout, path


def test_wheel_holds_every_module(wheel):
    checkout, path = wheel
    held = set(zipfile.ZipFile(path).namelist())
    wanted = {p.relative_to(checkout).as_posix() for p in (checkout / "pgolf_fast").rglob("*.py")}
    wanted |= {f"pgolf_fast/kernels/{p.name}" for p in (checkout / "kernels").glob("*.py")}
    wanted |= {"pgolf_fast/py.typed", "pgolf_fast/_C.pyi"}
    assert wanted <= held, f"missing in the wheel: {sorted(wanted - held)} (an __init__.py forgotten?)"
    assert not [name for name in held if name.startswith(("kernels/", "tests/", "csrc/"))]
    assert any(name.startswith("pgolf_fast/_C.") and name.endswith(".so") for name in held) == HAS_COMPILER


def test_wheel_in_a_fresh_environment(wheel, tmp_path):
    checkout, path = wheel
    python = new_environment(tmp_path / "env")
    install(python, path, cwd=tmp_path)
    outside = look(python, tmp_path)
    assert outside["package"].startswith(str(tmp_path))
    assert outside["kernels"] == "42"
    assert ("liblzma" in outside["backend"]) == HAS_COMPILER
    # In the checkout the sources come first, which have no compiled codecs: that works, and says so.
    inside = look(python, checkout)
    assert inside["package"] == str(checkout / "pgolf_fast")
    assert inside["kernels"] == "42"
    assert inside["backend"] == "Python's lzma module (extension not built)"
    assert "the C++ codecs are not in use" in inside["LOG"]


def test_editable_in_a_fresh_environment(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    python = new_environment(tmp_path / "env")
    install(python, "-e", checkout, cwd=tmp_path)
    for folder in (tmp_path, checkout):
        seen = look(python, folder)
        assert seen["package"] == str(checkout / "pgolf_fast")
        assert seen["kernels"] == "42"
        assert ("liblzma" in seen["backend"]) == HAS_COMPILER
    assert (tmp_path / "env" / "bin" / "pgolf").is_file()


def test_install_without_a_compiler(tmp_path):
    """No C++ compiler: the package still installs and works, in Python."""
    checkout = copy_checkout(tmp_path / "checkout")
    missing = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **missing)
    seen = look(new_environment(tmp_path / "env"), checkout)
    assert seen["package"] == str(checkout / "pgolf_fast")
    assert seen["backend"] == "Python's lzma module (extension not built)"
