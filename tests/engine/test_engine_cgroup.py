"""Limits of control groups: of both versions, from the process's own group up to the root, as containers show them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from herd import cgroup
from herd.engine import memory
from herd.engine.backend import thread_count

GIB = 1 << 30
Tree = Callable[[str, dict[str, str]], tuple[Path, Path]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write what /proc/self/cgroup says and files below the mounts; returns the places of both."""

    def write(membership: str, files: dict[str, str]) -> tuple[Path, Path]:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return tmp_path / "membership", tmp_path / "groups"

    return write


V1 = "12:memory:/docker/abc\n5:cpu,cpuacct:/docker/abc\n4:cpuset:/\n1:name=systemd:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("0::/a/b\n", {"a/other/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}, None),
        ("0::/a:b\n", {"a:b/cpu.max": "200000 100000"}, 2.0),
        ("0::/outside/pod\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/../pod\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/a\n", {"a/cpu.max": "damaged"}, None),
        ("1:name=systemd:/a\n0::/a\n", {"unified/a/cpu.max": "200000 100000"}, 2.0),
        (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000",
              "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "50000"}, 3.0),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1", "cpu/docker/abc/cpu.cfs_period_us": "100000",
              "cpu/docker/cpu.cfs_quota_us": "400000", "cpu/docker/cpu.cfs_period_us": "100000"}, 4.0),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "cpuset/cpu.max": "1 1"}, None),
    ],
)  # fmt: skip
def test_cpu_quota(tree: Tree, membership: str, files: dict[str, str], expected: float | None) -> None:
    assert cgroup.cpu_quota(*tree(membership, files)) == expected


def v2_memory(group: str, limit: str, used: int, dropped: int = 0) -> dict[str, str]:
    stat = f"anon 77\nfile {2 * dropped}\ninactive_file {dropped}\nactive_file {dropped}"
    return {group + "memory.max": limit, group + "memory.current": str(used), group + "memory.stat": stat}


def v1_memory(group: str, limit: int, used: int, dropped: int = 0) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_cache {2 * dropped}\ntotal_inactive_file {dropped}"
    files = {"limit_in_bytes": str(limit), "usage_in_bytes": str(used), "stat": stat}
    return {f"memory/{group}memory.{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", v2_memory("", "max", GIB), None),
        ("0::/\n", v2_memory("", str(4 * GIB), GIB), 3 * GIB),
        ("0::/\n", v2_memory("", str(4 * GIB), 4 * GIB, 3 * GIB), 3 * GIB),
        ("0::/\n", v2_memory("", str(GIB), 2 * GIB), 0),
        ("0::/\n", v2_memory("", str(GIB), 1, 50), GIB),
        ("0::/\n", {"memory.max": str(GIB), "memory.current": "24"}, GIB - 24),
        ("0::/\n", {"memory.max": str(GIB)}, None),
        # A group with a larger limit may have less left: its other groups use it.
        ("0::/a/b\n", {**v2_memory("a/b/", str(2 * GIB), 0), **v2_memory("a/", str(8 * GIB), 7 * GIB)}, GIB),
        ("0::/a/b\n", {**v2_memory("a/b/", str(2 * GIB), GIB), **v2_memory("a/", "max", 70 * GIB)}, GIB),
        ("0::/outside\n", v2_memory("", str(GIB), 0), GIB),
        (V1, v1_memory("docker/abc/", 3 * GIB, 2 * GIB, GIB), 2 * GIB),
        (V1, {**v1_memory("docker/abc/", (1 << 63) - 4096, 0), **v1_memory("docker/", GIB, 0)}, GIB),
        (V1, v1_memory("", GIB, 24), GIB - 24),
        (V1, v1_memory("", (1 << 63) - 4096, GIB), None),
    ],
)
def test_memory(tree: Tree, membership: str, files: dict[str, str], expected: int | None) -> None:
    assert cgroup.memory_available(*tree(membership, files)) == expected


def test_without_a_list_of_groups_the_mount_counts(tree: Tree, tmp_path: Path) -> None:
    _, groups = tree("", {"cpu.max": "200000 100000", **v2_memory("", str(GIB), 0)})
    assert cgroup.cpu_quota(tmp_path / "none", groups) == 2.0
    assert cgroup.memory_available(tmp_path / "none", groups) == GIB
    assert cgroup.cpu_quota(tmp_path / "none", tmp_path / "nothing") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.1, 1), (1.0, 1), (2.5, 3), (8.0, 8), (64.0, 8)])
def test_usable_cpus(tree: Tree, monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    """Part of a processor's time is worth a thread."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    limit = "max" if quota is None else str(int(quota * 100_000))
    assert cgroup.usable_cpus(*tree("0::/a\n", {"a/cpu.max": f"{limit} 100000"})) == expected


def test_the_engine_keeps_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "cpu_quota", lambda *_: 0.7)
    assert thread_count(None) == thread_count(8) == 1
    monkeypatch.setattr(memory, "memory_available", lambda: 12_345)
    assert memory.available_bytes() == 12_345


def test_this_machine() -> None:
    assert 1 <= cgroup.usable_cpus() <= (os.cpu_count() or 1)
    free = cgroup.memory_available()
    assert free is None or free >= 0
