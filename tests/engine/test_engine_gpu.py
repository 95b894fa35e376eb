"""The torch backend where there is a GPU: when it is chosen, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from herd.engine import LLM

torch = pytest.importorskip("torch")
pytest.importorskip("herd._native")
TEXTS = ["the first text", "another one, which is longer than the first"]


def backend_of(path: Path, **loading: object) -> str:
    with LLM(path, **loading) as llm:  # type: ignore[arg-type]
        return type(llm.backend).__name__


def test_a_gpu_is_used_where_it_has_what_is_asked_for(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model()
    monkeypatch.setattr("herd.engine.backend._gpu_is_there", lambda: True)
    assert backend_of(path) == backend_of(path, quant="bf16", kv="f32") == "TorchBackend"
    assert backend_of(path, quant="q8_0") == backend_of(path, kv="int8") == "NativeBackend"
    assert backend_of(path, backend="native") == "NativeBackend"
    monkeypatch.setattr("herd.engine.backend._gpu_is_there", lambda: False)
    assert backend_of(path) == "NativeBackend"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_computes_what_the_native_engine_does(make_model: Callable[..., Path]) -> None:
    path = make_model(talkative=True)
    with LLM(path, quant="f32", kv="f32", backend="torch") as gpu, LLM(path, kv="f32", backend="native") as cpu:
        assert next(gpu.backend._model.parameters()).is_cuda  # type: ignore[attr-defined]
        for ours, theirs in zip(gpu.score(TEXTS), cpu.score(TEXTS), strict=True):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-3)
        np.testing.assert_allclose(gpu.embed(TEXTS), cpu.embed(TEXTS), atol=2e-3)
        answers = gpu.generate(TEXTS * 4, max_tokens=24, temperature=0)
        assert [a.token_ids for a in answers[:2]] == [a.token_ids for a in answers[2:4]]
        assert answers[0].token_ids[:4] == cpu.generate(TEXTS[0], max_tokens=4, temperature=0).token_ids
