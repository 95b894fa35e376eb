"""The guide's Python runs as it stands, with the tiny model in the place of runs/pocket."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_guides_examples_run(repository: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    examples = re.findall(r"```python\n(.*?)```", (repository / "docs" / "engine.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        names: dict[str, object] = {}
        exec(example.replace("runs/pocket", str(tiny)), names)
        assert len(names["answers"]) == 2 and len(names["four"]) == 4  # type: ignore[arg-type]
        assert names["vectors"].shape == (2, 48)  # type: ignore[attr-defined]
    assert capsys.readouterr().out


def test_the_guide_names_every_option(repository: Path) -> None:
    from herd.engine import SamplingOptions

    text = (repository / "docs" / "engine.md").read_text()
    assert [name for name in SamplingOptions.__annotations__ if f"`{name}`" not in text] == []
