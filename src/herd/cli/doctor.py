"""`herd doctor`: what this machine offers, what is missing, and the command that gets it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from typing import Annotated, Any

import typer

from herd.cgroup import usable_cpus
from herd.cli.output import emit

_OPTIONAL = {
    "torch": "training, and the torch backend",
    "safetensors": "checkpoints on the way of a training run",
    "matplotlib": "plots in reports",
    "huggingface_hub": "herd pull",
}


def command(as_json: Annotated[bool, typer.Option("--json", help="Print the data as JSON.")] = False) -> None:
    """Check this machine and this installation.

    Examples:

        herd doctor

        herd doctor --json
    """
    found = examine()
    emit(found, as_json, lambda: _show(found))


def examine() -> dict[str, Any]:
    """Facts about the machine and the installation, with one line of advice per problem."""
    from herd import __version__

    native = _native_part()
    advice = [] if native["built"] else [_native_advice(native)]
    packages = {name: _version(name) for name in _OPTIONAL}
    for name, version in packages.items():
        if version is None:
            advice.append(f"{name} is missing ({_OPTIONAL[name]}): pip install {name}")
    return {
        "herd": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "native": native,
        "packages": packages,
        "advice": advice,
    }


def _native_part() -> dict[str, Any]:
    """What the compiled module says about the processor; `built` False, with the reason, when it is not usable."""
    try:
        native = importlib.import_module("herd._native")
    except ImportError as error:  # it was never built, or built for another Python or system
        return {"built": False, "reason": str(error)}
    return {
        "built": True,
        "cpu": native.cpu_name(),
        "cpus": usable_cpus(),
        "isa": native.isa(),
        "instruction_sets": [name for name, present in native.cpu_features().items() if present],
    }


def _native_advice(native: dict[str, Any]) -> str:
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    first = "" if compiler else "install a C++20 compiler (for example: apt install g++), then "
    return (
        f"the compiled part is missing ({native['reason']}), so models run in torch only, none is written in "
        f"k-quants (q4_k_m, …), and training on a CPU is slower: {first}"
        "in Herd's source folder, pip install --force-reinstall --no-deps ."
    )


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _show(found: dict[str, Any]) -> None:
    native = found["native"]
    lines = [
        f"herd {found['herd']} on Python {found['python']}, {found['system']}",
        f"{'memory':<16}{found['memory_bytes'] / 2**30:.1f} GiB",
    ]
    if native["built"]:
        lines.append(f"{'cpu':<16}{native['cpu'] or 'unnamed'}, {native['cpus']} usable")
        lines.append(f"{'sets':<16}{' '.join(native['instruction_sets']) or 'none beyond the baseline'}")
        lines.append(f"{'kernels for':<16}{native['isa']}")
    lines += [f"{name:<16}{version or 'not installed'}" for name, version in found["packages"].items()]
    lines += [f"! {advice}" for advice in found["advice"]] or ["all is well"]
    print("\n".join(lines))
