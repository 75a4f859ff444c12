"""How many workers a process may have."""

import math
import os
from pathlib import Path

from data_prep.pool import available_cores, cgroup_cores, cgroup_memory_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_cgroup_limits_of_version_2_are_the_smallest_up_to_the_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/pod/container",
            "root/memory.max": "max",
            "root/pod/memory.max": "4294967296",
            "root/pod/container/memory.max": "8589934592",
            "root/pod/cpu.max": "max 100000",
            "root/pod/container/cpu.max": "150000 100000",
        },
    )
    where = {"root": str(tmp_path / "root"), "membership": str(tmp_path / "membership")}
    assert cgroup_memory_bytes(**where) == 4 * 2**30  # the pod's, not the container's
    assert cgroup_cores(**where) == 1.5  # 150000 of 100000 microseconds


def test_cgroup_limits_of_version_1_are_read_from_the_controllers(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "4:memory:/box\n1:cpu,cpuacct:/box\n0::/",
            "root/memory/box/memory.limit_in_bytes": "1073741824",
            "root/cpu/box/cpu.cfs_quota_us": "50000",
            "root/cpu/box/cpu.cfs_period_us": "100000",
            "root/cpu/cpu.cfs_quota_us": "-1",
            "root/cpu/cpu.cfs_period_us": "100000",
        },
    )
    where = {"root": str(tmp_path / "root"), "membership": str(tmp_path / "membership")}
    assert cgroup_memory_bytes(**where) == 2**30
    assert cgroup_cores(**where) == 0.5


def test_cgroup_limits_without_cgroups_are_infinite(tmp_path: Path) -> None:
    where = {"root": str(tmp_path), "membership": str(tmp_path / "missing")}
    assert cgroup_memory_bytes(**where) == math.inf
    assert cgroup_cores(**where) == math.inf


def test_available_cores_follows_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= available_cores() <= len(before)
