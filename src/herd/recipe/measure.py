"""What a stage cost: wall and CPU seconds, peak memory; and on which machine with which packages it ran."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from herd.cgroup import usable_cpus

_PACKAGES = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "pydantic")


@dataclass(frozen=True)
class Usage:
    """Seconds on the clock, seconds of all cores together (children included), bytes at the highest point."""

    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


class Meter:
    """Measures from its creation to each `read()`."""

    def __init__(self) -> None:
        self._reset_works = _reset_peak()
        self._wall = time.perf_counter()
        self._cpu = _cpu_seconds()

    def read(self) -> Usage:
        """Usage since the meter was made."""
        peak = _peak_since_reset() if self._reset_works else None
        if peak is None:
            # The process's highest point so far: an upper bound for this stage where the kernel keeps no other figure.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Usage(time.perf_counter() - self._wall, _cpu_seconds() - self._cpu, peak)


def host() -> dict[str, object]:
    """The machine, without names that identify it: CPU, cores this process may use, GPUs, memory, system, Python."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "gpus": gpu_names(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Models of the GPUs that PyTorch sees; none where it is not loaded, as nothing else here computes on one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def packages() -> dict[str, str]:
    """Versions of Herd and of the installed packages that results depend on."""
    from herd import __version__

    versions = {"herd": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _reset_peak() -> bool:
    """Linux: writing 5 to clear_refs sets the process's high-water mark back to what it uses now (man 5 proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _peak_since_reset() is not None


def _peak_since_reset() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
