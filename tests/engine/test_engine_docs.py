"""The guide's Python runs as it stands, with the tiny model in the place of runs/pocket."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_the_guides_examples_run(repository: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    examples = re.findall(r"```python\n(.*?)```", (repository / "docs" / "engine.md").read_text(), re.DOTALL)
    assert examples
    results: dict[str, Any] = {}
    for example in examples:
        exec(example.replace("runs/pocket", str(tiny)), names := {})
        results.update(names)
    assert len(results["answers"]) == 2 and len(results["four"]) == 4
    assert results["vectors"].shape == (2, 48)
    assert capsys.readouterr().out


def test_the_guide_names_every_option(repository: Path) -> None:
    from herd.engine import SamplingOptions

    text = (repository / "docs" / "engine.md").read_text()
    assert [name for name in SamplingOptions.__annotations__ if f"`{name}`" not in text] == []
