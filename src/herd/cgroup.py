"""What this process may use of the machine: processors, and the memory its control groups leave it (Linux).

A group's limit holds for all groups within it, so of the process's own group and those around it the smallest limit
counts. Version 2 has one tree of groups, version 1 one for each controller. In a container the kernel may name a group
that lies outside of what is mounted; the mount's root, which is always looked at, is then the nearest that can be seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62  # version 1 writes the largest whole number of pages


def usable_cpus(membership: Path = MEMBERSHIP, groups: Path = GROUPS) -> int:
    """Processors this process may keep busy: its affinity mask, less where its control groups give less time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cpu_quota(membership, groups)
    return allowed if quota is None else min(allowed, max(1, math.ceil(quota)))


def cpu_quota(membership: Path = MEMBERSHIP, groups: Path = GROUPS) -> float | None:
    """Processors' worth of time that the control groups allow; None without a limit."""
    quotas = []
    for version, group in _groups("cpu", membership, groups):
        if version == 2:
            time, period = _number(group / "cpu.max"), _number(group / "cpu.max", 1)
        else:
            time, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if time is not None and period is not None and time > 0 and period > 0:  # version 1 has -1 for no limit
            quotas.append(time / period)
    return min(quotas, default=None)


def memory_available(membership: Path = MEMBERSHIP, groups: Path = GROUPS) -> int | None:
    """Bytes that the control groups leave; None without a limit.

    File contents that nobody has used lately count as free: the kernel drops them before it refuses anything.
    """
    free = []
    for version, group in _groups("memory", membership, groups):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_number(group / name) for name in names)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            droppable = _statistic(group / "memory.stat", "inactive_file" if version == 2 else "total_inactive_file")
            free.append(max(0, limit - max(0, used - droppable)))
    return min(free, default=None)


def _groups(controller: str, membership: Path, groups: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the process's groups, from its own to the root of what is mounted; some may not exist."""
    for line in _text(membership).splitlines() or ["0::/"]:
        names, _, own = line.partition(":")[2].partition(":")
        if not names:
            version, mounts = 2, [groups, groups / "unified"]  # the second where version 1 has most controllers
        elif controller in names.split(","):
            version, mounts = 1, [groups / name for name in dict.fromkeys((names, controller))]
        else:
            continue
        path = PurePosixPath(own.strip("/"))
        if ".." in path.parts:  # seen from a namespace that the group lies outside of
            path = PurePosixPath()
        for mount in mounts:
            for place in (path, *path.parents):
                yield version, mount / place


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _number(file: Path, index: int = 0) -> int | None:
    """A file's word at `index`; None where it is missing or a word ("max": no limit)."""
    try:
        return int(_text(file).split()[index])
    except (IndexError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    """The number of the line "name number"; 0 where there is none."""
    for line in _text(file).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return 0
