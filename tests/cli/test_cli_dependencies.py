"""What the sources import is what an installation brings: with `make setup`, and with the extras from a registry."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

SHIPPED = ("train", "serve", "hub")
"""The extras that `make setup` brings; of the others a message says how to get them."""
WITH_ANOTHER = {"pydantic-core": "pydantic"}  # of one exact version each


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    found = [re.match(r"[A-Za-z0-9._-]+", line) for line in requirements]
    return {canonical(match[0]) for match in found if match} - {"llama-herd"}


def imported(sources: Path) -> dict[str, Path]:
    """Modules of other projects, each with a file that imports it."""
    found: dict[str, Path] = {}
    for file in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [str(node.module)]
            else:
                continue
            found |= {module.partition(".")[0]: file for module in modules}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names | {"herd"}}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, set[str]]:
    data = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    return {"": names(data["dependencies"])} | {k: names(v) for k, v in data["optional-dependencies"].items()}


def test_every_import_is_of_a_declared_dependency(repository: Path, project: dict[str, set[str]]) -> None:
    declared = set[str]().union(*(project[extra] for extra in project if extra not in ("test", "bench")))
    distributions = metadata.packages_distributions()
    modules = imported(repository / "src/herd")
    assert len(modules) > 15
    for module, file in modules.items():
        owners = {canonical(name) for name in distributions.get(module, [module])}
        assert {WITH_ANOTHER.get(name, name) for name in owners} & declared, f"{module}, imported by {file}"


def test_setup_brings_every_extra_that_it_promises(repository: Path, project: dict[str, set[str]]) -> None:
    pinned = names((repository / "requirements.txt").read_text().splitlines()) | {"torch"}
    for extra in ("", *SHIPPED):
        assert project[extra] <= pinned, extra
