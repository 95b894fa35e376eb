"""Whose prompts begin from whose: with several keys each has its own, unless they are said to trust each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys, ServeConfig

TEXT = {"prompt": [1 + i % 300 for i in range(200)], "max_tokens": 2, "temperature": 0}


def cached(served: Any, key: str) -> int:
    with served.client(headers={"authorization": f"Bearer {key}"}) as client:
        answer = client.post("/v1/completions", json=TEXT).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("shared", [False, True])
def test_keys_do_not_see_what_another_asked(serving: Any, model_path: Path, shared: bool) -> None:
    config = ServeConfig(port=0, share_beginnings=shared)
    with serving({"tiny": model_path}, config, Keys(["key-of-alice", "key-of-bob"])) as served:
        assert cached(served, "key-of-alice") == 0
        assert (cached(served, "key-of-bob") > 0) == shared
        assert cached(served, "key-of-alice") > 0 and cached(served, "key-of-bob") > 0


def test_one_key_shares_with_itself(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, keys=Keys(["the-only-key"])) as served:
        assert cached(served, "the-only-key") == 0 < cached(served, "the-only-key")
