"""Bits per byte against a loop that asks the model for one token after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from herd import LLM, model
from herd.errors import UsageError
from herd.evaluate import bits_per_byte


@pytest.fixture(scope="module")
def llm(small_models: dict[str, Path]) -> Iterator[LLM]:
    with LLM(small_models["one"], ctx=64, kv="f32") as opened:
        yield opened


@pytest.fixture(scope="module")
def llama(small_models: dict[str, Path]) -> model.Llama:
    return model.load(small_models["one"], dtype=torch.float32).eval()


def _slow_nats(llama: model.Llama, ids: list[int], context: int, overlap: int) -> float:
    """Token t is scored in the first window that holds it; window k begins at k · (context - overlap)."""
    nats = 0.0
    for t in range(1, len(ids)):
        k = 0 if t < context else -(-(t - context + 1) // (context - overlap))
        before = ids[k * (context - overlap) : t]
        with torch.inference_mode():
            logits_V = llama(torch.tensor([before]))[0, -1].double()
        nats -= torch.log_softmax(logits_V, 0)[ids[t]].item()
    return nats


def test_against_one_token_after_the_other(llm: LLM, llama: model.Llama, texts: list[str]) -> None:
    encoded = [llm.tokenizer.encode_document(text) for text in texts]
    assert max(map(len, encoded)) > 2 * llm.context, "some text needs several windows"
    for overlap in (16, 32, 63):
        result = bits_per_byte(llm, texts, overlap=overlap)
        nats = sum(_slow_nats(llama, ids, llm.context, overlap) for ids in encoded)
        size = sum(len(text.encode()) for text in texts)
        assert result.nats == pytest.approx(nats, rel=1e-4)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)
        assert result.tokens == sum(len(ids) - 1 for ids in encoded)
        assert (result.bytes, result.documents, result.overlap) == (size, len(texts), overlap)
        assert result.nats_per_token == pytest.approx(nats / result.tokens, rel=1e-4)


def test_the_context_matters(llm: LLM, texts: list[str]) -> None:
    """The tokens of a text depend on each other: two halves on their own cost something else."""
    text = texts[1]
    whole, halves = bits_per_byte(llm, [text]), bits_per_byte(llm, [text[: len(text) // 2], text[len(text) // 2 :]])
    assert whole.bytes == halves.bytes and abs(whole.nats - halves.nats) > 0.1


def test_documents_in_any_order_and_grouping(llm: LLM, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    together = bits_per_byte(llm, texts)
    monkeypatch.setattr("herd.evaluate.bits._CHUNK_BYTES", 50)
    assert bits_per_byte(llm, texts).tokens == together.tokens
    assert bits_per_byte(llm, texts[::-1]).nats == pytest.approx(together.nats, rel=1e-6)
    assert sum(bits_per_byte(llm, [text]).nats for text in texts) == pytest.approx(together.nats, rel=1e-5)
    assert bits_per_byte(llm, [*texts, ""]).documents == len(texts)


def test_default_overlap_is_half_the_context(llm: LLM, texts: list[str]) -> None:
    assert bits_per_byte(llm, texts).overlap == llm.context // 2


def test_nothing_to_score(llm: LLM) -> None:
    with pytest.raises(UsageError):
        bits_per_byte(llm, ["", ""])
    for overlap in (0, 64):
        with pytest.raises(UsageError, match="1 to 63"):
            bits_per_byte(llm, ["a"], overlap=overlap)
