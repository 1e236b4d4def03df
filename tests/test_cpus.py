"""How many CPUs a process may use: its affinity mask, quotas of its cgroups, and $OMP_NUM_THREADS."""

import os

import pytest

from vqvit import cpus


def test_the_environment_lowers_the_default(monkeypatch):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 4)
    for text, wanted in (("1", 1), ("8,2", 4), ("3", 3), ("many", 4), ("0", 4), ("-2", 4), ("", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert cpus.default_threads() == wanted
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpus.default_threads() == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_cpus_of_the_affinity_mask_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


CGROUPS = {
    "v2": ("0::/jobs/app\n", {"jobs/app/cpu.max": "max 100000", "jobs/cpu.max": "150000 100000"}, 1.5),
    "v2_root": ("0::/\n", {"cpu.max": "300000 100000"}, 3.0),
    "v2_of_a_container": ("0::/../../docker/abc\n", {"cpu.max": "50000 100000"}, 0.5),
    "v1": ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000",
                                  "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 4.0),
    "v1_mounted_as_cpu": ("4:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2.0),
    "no_limit": ("0::/a\n4:cpu:/a\n", {"a/cpu.max": "max 100000", "cpu/a/cpu.cfs_quota_us": "-1",
                                       "cpu/a/cpu.cfs_period_us": "100000"}, None),
    "unreadable": ("0::/a\n", {"a/cpu.max": "nonsense"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CGROUPS)
def test_quotas_of_cgroups_count(name, tmp_path, monkeypatch):
    own, contents, wanted = CGROUPS[name]
    for path, text in contents.items():
        (tmp_path / "cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / path).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cpus.cgroup_quota() == wanted
    assert cpus.usable_cpus() == {0.5: 1, 1.5: 2, None: 8}.get(wanted, wanted)
