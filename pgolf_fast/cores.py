"""CPU cores of this process, and the variables that tell OpenMP about them. Does not import torch."""

import math
import os
import sys
from pathlib import Path

# Spins of an OpenMP thread at a barrier before it sleeps. libgomp's default, 300,000, takes milliseconds:
# beside busy processes, a thread wastes its time slices waiting for one that is not running. On two cores
# beside two busy loops, test-time training of `tiny` keeps 12 % of its speed with it, 42 % with this
# (load_tiny.json); 1,000 spins keep 52 %, but cost 10 % alone. With none (OMP_WAIT_POLICY=passive), training
# alone is 18 to 35 % slower.
SPIN_COUNT = "3000"
CHOSEN: dict[str, str] = {}
"""Variables that `prepare_openmp` has set in this process."""


def available_cores() -> int:
    """Return the number of CPU cores this process may use: by its affinity and its container's CPU quota."""
    quota = cpu_quota()
    return allowed_cores() if quota is None else max(1, min(allowed_cores(), math.ceil(quota)))


def allowed_cores() -> int:
    """Return the number of CPU cores in this process's affinity, which taskset and cpusets limit."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process's cgroups in cores, or None; `root`: where /proc and /sys are."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers  # version 2 has no controllers here, and no subfolder
        folder = mount / path.lstrip("/")
        # A container may see its own group as the root, but be told the host's path, which is not there
        limits += [_limit(place) for place in (folder, *folder.parents) if place.is_relative_to(mount)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path) -> float | None:
    """Return the quota of one cgroup of either version."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        share = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
    return share if share > 0 else None  # version 1 says -1 for no limit


def threads() -> int:
    """Return the number of threads to compute with: OMP_NUM_THREADS if set, else `available_cores`."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else available_cores()


def prepare_openmp() -> None:
    """Set how long OpenMP's threads spin and, under a CPU quota, their number; child processes inherit both.

    Variables that the user has set win. OpenMP reads them when torch is imported: after that, none are set.
    """
    if "torch" in sys.modules:
        return
    names = os.environ.keys()
    if not names & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} and not any(n.startswith("KMP_") for n in names):
        CHOSEN["GOMP_SPINCOUNT"] = SPIN_COUNT
    limits = {"OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS"}
    # OpenMP respects the affinity, not the quota
    if not names & limits and available_cores() < allowed_cores():
        CHOSEN["OMP_NUM_THREADS"] = str(available_cores())
    os.environ.update(CHOSEN)
