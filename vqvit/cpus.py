"""How many CPUs this process may use: more threads than that wait for each other."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """CPUs in this process's affinity mask (taskset), fewer where its cgroup's quota (containers) gives less time."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cgroup_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def default_threads() -> int:
    """`usable_cpus`, fewer where $OMP_NUM_THREADS says so."""
    try:
        asked = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    except ValueError:
        return usable_cpus()
    return min(usable_cpus(), asked) if asked > 0 else usable_cpus()


def cgroup_quota() -> float | None:
    """CPUs' worth of time that the tightest of this process's cgroups grants, v2 or v1; None without a limit."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers == "":
            quotas += _quotas(CGROUPS, own, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mounted in {controllers, "cpu"}:
                quotas += _quotas(CGROUPS / mounted, own, _quota_v1)
    return min(quotas, default=None)


def _quotas(mount: Path, own: str, quota_of) -> list[float]:
    """Of a cgroup and all above it. A container often sees its own cgroup as the root, under whatever name."""
    folder = mount / own.strip("/")
    folders = [folder, *folder.parents]
    found = (quota_of(f) for f in folders[: folders.index(mount) + 1] if ".." not in f.parts)
    return [quota for quota in found if quota is not None]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
