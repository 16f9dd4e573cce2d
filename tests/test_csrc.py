"""The C++ codecs under AddressSanitizer and UndefinedBehaviorSanitizer, without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODECS = ("bits", "bits_avx2", "lzma_api", "lzma_codec")
SOURCES = ["tests/csrc/fuzz_codec.cpp", *(f"csrc/{name}.cpp" for name in CODECS)]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


def compile_with(*flags, output):
    """Standard error of g++, None when it succeeded."""
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """Flags that work here: g++ may lack the sanitizers' libraries."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the sanitized test driver")
    folder = tmp_path_factory.mktemp("probe")
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    if (problem := compile_with(*SANITIZE, str(source), output=folder / "empty")) is not None:
        pytest.skip(f"g++ cannot build with sanitizers: {problem.strip().splitlines()[-1]}")
    source.write_text("#include <lzma.h>\nint main() { return lzma_version_number() == 0; }\n")
    return SANITIZE, compile_with(str(source), "-llzma", output=folder / "lzma") is None


@pytest.mark.parametrize("way", ["linked", "dlopen"])
def test_survives_random_bytes(way, sanitizers, tmp_path):
    flags, can_link = sanitizers
    if way == "linked" and not can_link:
        pytest.skip("no liblzma to link with (on Debian: liblzma-dev)")
    library = ["-llzma"] if way == "linked" else ["-DPGOLF_LZMA_DLOPEN", "-ldl"]
    driver = tmp_path / "fuzz_codec"
    assert compile_with(*flags, "-Icsrc", "-pthread", *SOURCES, *library, output=driver) is None
    iterations = "20000" if way == "linked" or not can_link else "1000"
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1"}
    done = subprocess.run(
        [driver, iterations], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{iterations} iterations" in done.stdout
