"""What a server unloads is gone: no model, tokenizer or thread's object of it stays in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

from herd.serve import ServeConfig
from tests.serve.live_server import memory_for


def test_unloaded_models_leave_nothing(serving: Any, model_path: Path, other_path: Path) -> None:
    """Two models take turns in memory for one."""
    config = ServeConfig(port=0, memory=int(1.5 * memory_for(model_path)))
    with serving({"tiny": model_path, "other": other_path}, config) as served, served.client() as client:
        seen = []
        for name in ("other", "tiny") * 3:
            answer = client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2})
            assert answer.status_code == 200
            parts = (served.llm, served.llm.backend, served.llm.tokenizer, served.driver)
            seen.append([weakref.ref(part) for part in parts])
            del parts
        gc.collect()
        assert [[part() is None for part in parts] for parts in seen] == [[True] * 4] * 5 + [[False] * 4]
