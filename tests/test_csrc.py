"""The C++ codecs under AddressSanitizer and UndefinedBehaviorSanitizer, without Python."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVERS = Path(__file__).parent / "csrc"
# Executions of each driver, and MiB that none of its allocations may exceed (LZMA dictionaries may have 256).
# LZMA is slow, and other people fuzz it. `make fuzz` runs all of them for longer.
TARGETS = {"bits": (430_000, 1), "container": (350_000, 300), "lzma": (40_000, 300), "rans": (180_000, 1)}


def build(folder, *settings):
    """What `make` says of building the drivers, None when it succeeded."""
    command = ["make", "-s", "-j2", "-C", str(DRIVERS), f"BUILD={folder}", "ENGINE=standalone", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


def run(driver, executions, mebibytes=300):
    """(executions, inputs accepted) of a driver that survived."""
    options = f"detect_leaks=1:max_allocation_size_mb={mebibytes}"
    done = subprocess.run(
        [driver, f"-runs={executions}"],
        env={**os.environ, "ASAN_OPTIONS": options},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(map(int, re.findall(r"(\d+) (?:executions|inputs accepted)", done.stdout)))


@pytest.fixture(scope="module")
def compiler():
    """Whether liblzma can be linked, once it is known that sanitized programs can be built."""

    def compiles(program, *flags):
        command = ["g++", "-x", "c++", "-", "-x", "none", *flags, "-o", os.devnull]
        return subprocess.run(command, input=program, capture_output=True, text=True, check=False)

    if not shutil.which("g++") or not shutil.which("make"):
        pytest.skip("no g++ and make to build the sanitized drivers")
    if (probe := compiles("int main() {}", "-fsanitize=address,undefined")).returncode:
        pytest.skip(f"g++ cannot build with sanitizers: {probe.stderr.strip().splitlines()[-1]}")
    return (
        compiles("#include <lzma.h>\nint main() { return !lzma_version_number(); }", "-llzma").returncode == 0
    )


@pytest.fixture(scope="module")
def drivers(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drivers")
    assert build(folder, f"LZMA={'linked' if compiler else 'dlopen'}") is None
    return folder


def test_every_driver_is_run():
    helpers = {"main", "libfuzzer"}
    assert {path.stem.removeprefix("fuzz_") for path in DRIVERS.glob("fuzz_*.cpp")} - helpers == set(TARGETS)
    assert sum(executions for executions, _ in TARGETS.values()) >= 1_000_000


@pytest.mark.parametrize("target", TARGETS)
def test_survives_damaged_input(target, drivers):
    executions, mebibytes = TARGETS[target]
    done, accepted = run(drivers / f"fuzz_{target}", executions, mebibytes)
    assert done == executions
    assert done / 20 < accepted  # deep enough to matter


def test_survives_with_liblzma_opened_at_run_time(compiler, drivers, tmp_path):
    """With dlopen, the structures of liblzma's ABI are our own; only one file is compiled in another way."""
    if not compiler:
        pytest.skip("liblzma cannot be linked here, so every driver opens it at run time")
    folder = tmp_path / "dlopen"
    shutil.copytree(drivers, folder, ignore=shutil.ignore_patterns("lzma_api.o", "library.a", "fuzz_lzma"))
    assert build(folder, "LZMA=dlopen", str(folder / "fuzz_lzma")) is None
    assert run(folder / "fuzz_lzma", 2000)[0] == 2000


def test_a_crash_leaves_the_input_that_makes_it(compiler, tmp_path):
    """What `make fuzz` promises, on a driver that fails for one input in a thousand."""
    source = """#include "fuzz.h"
namespace fuzz { Bytes make_input(Random& random) { return {uint8_t(random()), uint8_t(random())}; } }
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::require(size != 2 || data[0] != 7 || data[1] > 64, "seven");
    return 0;
}"""
    (tmp_path / "fails.cpp").write_text(source)
    driver = tmp_path / "fails"
    command = [
        "g++",
        "-std=c++17",
        f"-I{DRIVERS}",
        tmp_path / "fails.cpp",
        DRIVERS / "fuzz_main.cpp",
        "-o",
        driver,
    ]
    subprocess.run(command, check=True)
    campaign = subprocess.run([driver, "-runs=100000"], capture_output=True, text=True, check=False)
    assert campaign.returncode == 1
    crash = re.search(r"again: \S+ (\S+)", campaign.stderr)[1]
    assert Path(crash).read_bytes()[0] == 7
    assert (
        "wrong: seven" in subprocess.run([driver, crash], capture_output=True, text=True, check=False).stderr
    )
