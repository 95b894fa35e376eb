"""`herd doctor`: what this machine offers, what is missing, and the command that gets it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import Annotated, Any

import typer

from herd.cli.output import emit

_OPTIONAL = {
    "torch": ("train", "training, and running models until the native engine is here"),
    "matplotlib": ("train", "plots in reports"),
    "huggingface_hub": ("hub", "herd pull"),
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

    advice = []
    native: dict[str, Any] = {"built": importlib.util.find_spec("herd._native") is not None}
    if native["built"]:
        from herd import _native

        native |= {
            "cpu": _native.cpu_name(),
            "cpus": _native.usable_cpus(),
            "instruction_sets": [name for name, present in _native.cpu_features().items() if present],
        }
    else:
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        advice.append(
            "the compiled part is missing: "
            + ("" if compiler else "install a C++20 compiler (apt install g++), then ")
            + "pip install --force-reinstall --no-deps llama-herd"
        )
    packages = {name: _version(name) for name in _OPTIONAL}
    for name, version in packages.items():
        extra, use = _OPTIONAL[name]
        if version is None:
            advice.append(f"{name} is missing ({use}): pip install 'llama-herd[{extra}]'")
    return {
        "herd": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "native": native,
        "packages": packages,
        "advice": advice,
    }


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
    lines += [f"{name:<16}{version or 'not installed'}" for name, version in found["packages"].items()]
    lines += [f"! {advice}" for advice in found["advice"]] or ["all is well"]
    print("\n".join(lines))
