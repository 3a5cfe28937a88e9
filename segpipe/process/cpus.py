"""CPUs that this process may use: a container's limit counts, and so does an affinity."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

CGROUPS = Path("/sys/fs/cgroup")
GROUP_OF_PROCESS = Path("/proc/self/cgroup")


@cache
def cpu_count() -> int:
    """Return the CPUs of the machine, or fewer where affinity or the quota of a cgroup allows fewer.

    The number is that of ``dask.system.CPU_COUNT``: it is part of the keys of what was predicted before.
    """
    process = psutil.Process()
    affinity = process.cpu_affinity() if hasattr(process, "cpu_affinity") else None
    count = len(affinity) if affinity else psutil.cpu_count() or 1
    quota = cgroup_quota(CGROUPS, GROUP_OF_PROCESS)
    return count if quota is None else min(count, math.ceil(quota))


def cgroup_quota(cgroups: Path, group_of_process: Path) -> float | None:
    """Return how many CPUs the process's cgroup gets, of version 1 or 2; None where nothing limits it.

    Args:
        cgroups: where control groups are mounted.
        group_of_process: the file that names the process's group.
    """
    for folder in ("cpuacct,cpu", "cpu,cpuacct"):
        files = [cgroups / folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
        if all(file.is_file() for file in files):
            quota, period = (int(file.read_text()) for file in files)
            return quota / period if quota > 0 else None
    try:
        group = group_of_process.read_text().strip().split(":")[-1].strip("/")
        quota, period = map(int, (cgroups / group / "cpu.max").read_text().split())
    except (OSError, ValueError):  # other systems; "max": no limit
        return None
    return quota / period
