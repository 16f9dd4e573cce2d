"""Cores by affinity and CPU quota, and the variables that OpenMP reads when torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_fast import cores
from pgolf_fast.artifact import codecs
from pgolf_fast.bench.doctor import cpu_cores

ROOT = Path(__file__).parent.parent
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")


@needs_affinity
def test_available_cores_respects_the_affinity(monkeypatch):
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    allowed = os.sched_getaffinity(0)
    assert cores.available_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("quota", "cores_allowed", "want"), [(None, 64, 64), (1.5, 64, 2), (0.2, 64, 1), (8.0, 4, 4), (3.0, 4, 3)]
)
def test_available_cores_respects_the_quota(monkeypatch, quota, cores_allowed, want):
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "allowed_cores", lambda: cores_allowed)
    assert cores.available_cores() == want


V1 = "11:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n0::/\n"
V2 = "0::/user.slice/job\n"
CPU = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "files", "want"),
    [
        (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n"}, None),
        (V2, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),  # a container that sees its group as the root
        (
            V2,
            {
                "sys/fs/cgroup/user.slice/job/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        (
            V1,
            {f"{CPU}/docker/a/cpu.cfs_quota_us": "250000\n", f"{CPU}/docker/a/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (V1, {f"{CPU}/cpu.cfs_quota_us": "150000\n", f"{CPU}/cpu.cfs_period_us": "100000\n"}, 1.5),
        (
            V1,
            {f"{CPU}/docker/a/cpu.cfs_quota_us": "-1\n", f"{CPU}/docker/a/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        (V1, {f"{CPU}/cpu.cfs_quota_us": "150000\n", f"{CPU}/cpu.cfs_period_us": "0\n"}, None),
        (V2, {"sys/fs/cgroup/cpu.max": "nonsense"}, None),
        (V2, {}, None),
        (None, {}, None),  # no /proc
    ],
    ids=[
        "v2",
        "v2 max",
        "v2 namespace",
        "v2 parent",
        "v1",
        "v1 namespace",
        "v1 none",
        "v1 zero",
        "bad",
        "0",
        "no",
    ],
)
def test_quota(tmp_path, groups, files, want):
    written = {**files, **({"proc/self/cgroup": groups} if groups else {})}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.cpu_quota(tmp_path) == want


@pytest.mark.parametrize(("value", "want"), [("3", 3), ("4,2", 4), ("", 7), ("0", 7), ("many", 7)])
def test_threads(monkeypatch, value, want):
    monkeypatch.setattr(cores, "available_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores.threads() == want


def test_codecs_use_these_threads(monkeypatch):
    """Without a number of their own, the C++ coders do not take every core of the machine."""
    asked = []

    class Extension:
        def rans_encode(self, data, shapes, threads):
            asked.append(threads)
            return data

        def rans_decode(self, stored, shapes, size, threads):
            asked.append(threads)
            return stored

    monkeypatch.setattr(codecs.native, "extension", Extension)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shapes = [(2, 2, 1)]
    codecs.encode("rans", b"abcd", shapes)
    codecs.decode("rans", b"abcd", 4, shapes)
    assert asked == [3, 3]


CODE = """
import os, sys
import pgolf_fast.cores as cores
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"), sorted(cores.CHOSEN))
"""
LIMITED = """
import sys
sys.modules["pgolf_fast"] = type(sys)("pgolf_fast")
sys.modules["pgolf_fast"].__path__ = ["pgolf_fast"]
from pgolf_fast import cores
cores.cpu_quota, cores.allowed_cores = lambda: 1.5, lambda: 64
cores.prepare_openmp()
import os, torch
print(os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads())
"""


def run(code, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_sets_the_spin_count_before_torch():
    spins, threads, chosen = run(CODE).split(" ", 2)
    assert spins == cores.SPIN_COUNT
    limited = cores.available_cores() < cores.allowed_cores()
    assert threads == (str(cores.available_cores()) if limited else "None")
    assert chosen == str(["GOMP_SPINCOUNT", *(["OMP_NUM_THREADS"] if limited else [])])


@pytest.mark.parametrize(
    ("variables", "spins"),
    [
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
        ({"KMP_BLOCKTIME": "0"}, "None"),
    ],
)
def test_variables_of_the_user_win(variables, spins):
    assert run(CODE, OMP_NUM_THREADS="1", **variables) == f"{spins} 1 []"


def test_nothing_is_set_after_torch():
    code = CODE.replace('assert "torch" not in sys.modules\n', "")
    assert run("import torch\n" + code) == "None None []"


def test_torch_takes_the_threads_of_a_quota():
    """A container with 1.5 CPUs on a machine with 64 cores: two threads, unless the user says otherwise."""
    assert run(LIMITED) == "2 2"
    assert run(LIMITED, OMP_NUM_THREADS="1") == "1 1"


@needs_affinity
def test_openmp_reads_the_spin_count():
    """libgomp shows the variable that it has read; nothing else in this file proves that it arrives."""
    code = "import pgolf_fast, torch; torch.ones(1)"
    command = [sys.executable, "-c", code]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = {**clean, "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has another OpenMP")
    assert f"GOMP_SPINCOUNT = '{cores.SPIN_COUNT}'" in done.stderr


def test_description_names_limits_and_threads(monkeypatch):
    monkeypatch.setattr(cores, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(cores, "allowed_cores", lambda: 64)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line = cpu_cores()
    assert line.endswith("64 by affinity, a CPU quota of 1.5: 2 threads; GOMP_SPINCOUNT 1000")
