"""The C++ codecs under AddressSanitizer and UndefinedBehaviorSanitizer, without Python."""

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVERS = Path(__file__).parent / "csrc"
# Executions of each driver, and the MiB that no allocation may exceed (LZMA dictionaries may have 256).
# LZMA is slow, and liblzma is fuzzed elsewhere. `make fuzz` runs longer.
TARGETS = {
    "attention": (1_000, 8),
    "bits": (30_000, 1),
    "int6": (4_000, 1),
    "lzma": (2_000, 300),
    "passes": (4_000, 8),
    "rans": (18_000, 1),
    "symmetric": (10_000, 1),
}
LONG = {
    "attention": 10_000,
    "bits": 600_000,
    "int6": 60_000,
    "lzma": 50_000,
    "passes": 50_000,
    "rans": 400_000,
    "symmetric": 100_000,
}


def run(driver, executions, mebibytes):
    """Return (executions, inputs accepted) of a driver that survived."""
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
def drivers():
    """Build the drivers where `make fuzz` does, so that unchanged objects are reused; return their folder."""

    def compiles(program, *flags):
        command = ["g++", "-x", "c++", "-", "-x", "none", *flags, "-o", os.devnull]
        return subprocess.run(command, input=program, capture_output=True, text=True, check=False)

    if not shutil.which("g++") or not shutil.which("make"):
        pytest.skip("no g++ and make to build the sanitized drivers")
    if (probe := compiles("int main() {}", "-fsanitize=address,undefined")).returncode:
        pytest.skip(f"g++ cannot build with sanitizers: {probe.stderr.strip().splitlines()[-1]}")
    linked = compiles("#include <lzma.h>\nint main() { return !lzma_version_number(); }", "-llzma")
    lzma = "off" if linked.returncode else "on"
    folder = DRIVERS.parents[1] / "build" / f"fuzz-standalone-{lzma}"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-j2", "-C", str(DRIVERS), "ENGINE=standalone", f"LZMA={lzma}"]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_driver_is_run():
    helpers = {"main", "libfuzzer"}
    drivers = {path.stem.removeprefix("fuzz_") for path in DRIVERS.glob("fuzz_*.cpp")} - helpers
    assert drivers == set(TARGETS) == set(LONG)
    assert sum(executions for executions, _ in TARGETS.values()) >= 50_000
    assert sum(LONG.values()) >= 1_000_000


def check_survival(driver, executions, mebibytes):
    if not driver.is_file():
        pytest.skip("liblzma cannot be linked here")
    done, accepted = run(driver, executions, mebibytes)
    assert done == executions
    assert done / 20 < accepted  # inputs must get past the first checks to be worth running


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_survives_damaged_input(target, drivers):
    check_survival(drivers / f"fuzz_{target}", *TARGETS[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", LONG)
def test_survives_a_million_damaged_inputs(target, drivers):
    check_survival(drivers / f"fuzz_{target}", LONG[target], TARGETS[target][1])


@pytest.mark.usefixtures("drivers")
def test_a_crash_leaves_the_input_that_reproduces_it(tmp_path):
    """Run a driver that fails for one input in a thousand, as `make fuzz` would."""
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
