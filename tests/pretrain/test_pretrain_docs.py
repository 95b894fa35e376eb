"""What docs/pretrain.md shows is what the code takes and does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from herd.config import parse_config
from herd.pretrain import PretrainConfig


def _blocks(repository: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repository / "docs" / "pretrain.md").read_text(), re.DOTALL)


def test_the_recipe_is_one(repository: Path) -> None:
    (text,) = _blocks(repository, "yaml")
    text = re.sub(r"\b([0-9.]+)e([0-9]+)", lambda m: str(int(float(m[0]))), text)  # YAML 1.1 takes 2e9 for a word
    config = parse_config(PretrainConfig, yaml.safe_load(text.replace("8e-5", "0.00008"))["base"], "docs")
    sizes = config.sizes()
    assert [phase.step_tokens for phase in sizes] == [2**22, 2**23, 2**24]
    assert sizes.tokens_before(1_100_929) >= 15.6e12 > sizes.tokens_before(1_100_928)


def test_the_example_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = _blocks(repository, "python")
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    pages = [set(map(int, re.findall(r"site([0-9])", line))) for line in lines]
    assert sorted(number for page in pages for number in page) == list(range(6))
    assert all(len({number % 2 for number in page}) == 1 for page in pages) and len(pages) < 6
