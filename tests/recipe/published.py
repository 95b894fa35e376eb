"""The recipes that ship and a folder in which all of them are valid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

RECIPES = Path(__file__).parents[2] / "recipes"


def names() -> list[str]:
    """Every recipe that pretrains, by the name under which `herd run` knows it, sizes one by one."""
    found = []
    for file in sorted(RECIPES.glob("*.yaml")):
        data = yaml.safe_load(file.read_text())
        sizes = data.get("sizes")
        if "base" not in data["stages"]:
            continue
        found += [f"{file.stem}-{size}" for size in sizes] if sizes else [file.stem]
    return found


NAMES = names()


def recipes_at(folder: Path) -> Path:
    """A folder with the recipes, as a user has it."""
    shutil.copytree(RECIPES, folder / "recipes")
    return folder


def everything_at(folder: Path) -> Path:
    """The same, with the text that the recipes ask for (one file a source) and empty runs of all of them."""
    recipes_at(folder)
    for file in RECIPES.glob("*.yaml"):
        for source in yaml.safe_load(file.read_text())["stages"]["corpus"]["sources"]:
            if "/" in source:
                (folder / source).mkdir(parents=True, exist_ok=True)
                (folder / source / "text.txt").write_text("Text.\n")
    for name in NAMES:
        base = folder / "runs" / name / "base-00000000"
        (base / "checkpoint").mkdir(parents=True)
        (base.parent / "run.json").write_text(json.dumps({"stages": {"base": {"directory": base.name}}}))
    return folder
