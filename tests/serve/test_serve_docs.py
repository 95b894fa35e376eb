"""The guide's example for clients runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_the_guides_client_example_runs(
    serving: Any, model_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    (example,) = re.findall("```python\n(.*?)```", (repository / "docs" / "serve.md").read_text(), re.DOTALL)
    with serving({"pocket": model_path}) as served:
        exec(example.replace("http://localhost:8000", served.url), {})
    said = capsys.readouterr().out
    assert said.count("\n") >= 5 and "name='double'" in said
