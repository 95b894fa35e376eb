"""lm-eval measures a served model through /v1/completions: what it gets is what the engine says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.peer
NOT_THERE = "lm-eval is not installed: pip install 'lm_eval[api]'"
completions = pytest.importorskip("lm_eval.models.openai_completions", reason=NOT_THERE)
instances = pytest.importorskip("lm_eval.api.instance", reason=NOT_THERE)

PAIRS = [("def f(x):\n    return", " x"), ("import", " os\nimport sys"), ("class A", ":\n    pass"), ("a", "b")]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [instances.Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.fixture
def measured(served: Any, model_path: Path) -> Any:
    return completions.LocalCompletionsAPI(
        model="tiny",
        base_url=f"{served.url}/v1/completions",
        tokenizer=str(model_path),
        tokenizer_backend="huggingface",
        max_length=512,
    )


def test_scores(measured: Any, served: Any) -> None:
    llm = served.llm
    found = measured.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        ids, kept = measured._encode_pair(context, continuation)
        own = llm.score(ids + kept).logprobs[len(ids) - 1 :]
        assert logprob == pytest.approx(sum(own), abs=1e-5)
        choice = llm.generate(ids, max_tokens=len(kept), temperature=0).token_ids
        assert greedy == (choice == kept)
    texts = ["def f(x):\n    return x\n" * 3, "import os"]
    rolling = measured.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    expected = [sum(llm.score([llm.tokenizer.bos_id, *llm.tokenizer.encode(text)]).logprobs) for text in texts]
    assert rolling == pytest.approx(expected, abs=1e-5)


def test_texts(measured: Any, served: Any) -> None:
    llm = served.llm
    options = {"until": ["\n\n\n"], "max_gen_toks": 12, "temperature": 0}
    (text,) = measured.generate_until(requests("generate_until", [("def f(", options)]))
    ids = measured.tok_encode("def f(")
    own = llm.generate(ids, max_tokens=12, temperature=0, stop="\n\n\n", skip_specials=True)
    assert text == own.text
