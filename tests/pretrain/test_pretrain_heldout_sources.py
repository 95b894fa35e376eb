"""Held-out loss of each source: against the saved model, one document at a time; and windows over chosen documents."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from herd import checkpoint, tokenizer
from herd import model as models
from herd.corpus import Document, EvaluationWindows, TokenShards, read_documents
from herd.corpus.document import write_documents
from herd.pretrain import PretrainConfig, run
from herd.pretrain.data import heldout_parts
from tests.pretrain.little import shape_for, vocabulary

SOURCES = {"code": {"weight": 3, "kind": "code"}, "prose": {"weight": 1, "match": ["notes/*.txt"]}}
ROW = 32


def _document(kind: str, n: int) -> Document:
    if kind == "code":
        return Document(
            "\n".join(f"def f{n + i}(a):\n    return a + {i}\n" for i in range(2 + n % 6)),
            f"lib/{n}.py",
            meta={"kind": "code"},
        )
    text = " ".join(f"The number {n} comes before {n + 1}, and after that {n + i}." for i in range(2 + n % 5))
    return Document(text, f"notes/{n}.txt" if kind == "prose" else f"else/{n}", meta={"kind": "prose"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "train.jsonl", [_document("code" if n % 3 else "prose", n) for n in range(60)])
    held = [_document(("code", "prose", "neither")[n % 3], n) for n in range(100, 121)]
    held.insert(2, Document("", "lib/empty.py", meta={"kind": "code"}))  # not packed, so it must not shift the others
    write_documents(folder / "heldout.jsonl", held)
    return folder


@pytest.fixture(scope="module")
def words(corpus: Path) -> tokenizer.Tokenizer:
    return vocabulary(corpus, 320)


def _trained(corpus: Path, words: tokenizer.Tokenizer, out: Path, **fields: Any) -> dict[str, Any]:
    train = {"steps": 12, "seq_len": ROW, "batch_size": 8, "lr": 0.01, "precision": "fp32", "compile": "off"}
    config = PretrainConfig.model_validate({"evaluations": 0, "train": train} | fields)
    run(config, shape_for(words), corpus, words, out)
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def test_each_sources_loss_is_that_of_its_documents(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    result = _trained(corpus, words, tmp_path, sources=SOURCES)
    llama = models.load(tmp_path / "checkpoint")
    with checkpoint.open_checkpoint(tmp_path / "checkpoint") as saved:
        words = saved.tokenizer
    nats: dict[str, float] = defaultdict(float)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for document in read_documents(corpus / "heldout.jsonl"):
        if not document.text:
            continue
        kind = {"lib": "code", "notes": "prose", "else": "neither"}[document.url.split("/")[0]]
        ids = torch.tensor(words.encode_document(document.text))
        counts[kind][0] += len(ids) - 1
        counts[kind][1] += document.n_bytes
        scored = start = 0
        while scored < len(ids) - 1:  # windows that start half a row apart, each scoring what the one before did not
            end = min(start + ROW, len(ids) - 1)
            with torch.no_grad():
                logits = llama(ids[None, start:end])[0]
            losses = functional.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
            nats[kind] += losses[scored - start :].sum().item()
            scored, start = end, start + ROW // 2
    for name in ("code", "prose"):
        found, (tokens, n_bytes) = result["sources"][name], counts[name]
        assert found["heldout_tokens"] == tokens
        assert found["heldout_loss"] == pytest.approx(nats[name] / tokens, rel=1e-4)
        assert found["heldout_bits_per_byte"] == pytest.approx(nats[name] / math.log(2) / n_bytes, rel=1e-4)
    assert result["sources"]["code"]["heldout_loss"] < result["sources"]["prose"]["heldout_loss"]  # it read more code
    tokens = sum(count for count, _ in counts.values())
    assert result["heldout_loss"] == pytest.approx(sum(nats.values()) / tokens, rel=1e-4)  # with what fits no source
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["heldout_loss"] for line in logged if "heldout_loss" in line] == [result["heldout_loss"]]


def test_without_sources_there_is_one_loss(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    result = _trained(corpus, words, tmp_path)
    assert "heldout_loss" in result and all("heldout_loss" not in part for part in result["sources"].values())


def test_documents_are_told_apart_as_for_training(corpus: Path, words: tokenizer.Tokenizer) -> None:
    sources = PretrainConfig.model_validate({"sources": SOURCES}).sources
    parts = heldout_parts(corpus, sources)
    assert parts == {"code": [2, 5, 8, 11, 14, 17, 20], "prose": [0, 3, 6, 9, 12, 15, 18],
                     None: [1, 4, 7, 10, 13, 16, 19]}  # fmt: skip
    shards = PretrainConfig.model_validate({"sources": {"made": {"weight": 1, "shards": ["somewhere"]}}}).sources
    assert list(heldout_parts(corpus, shards)) == [None] and len(heldout_parts(corpus, shards)[None]) == 21


def test_windows_over_some_documents_score_those_alone(
    corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    from herd.corpus import pack_tokens

    shards: TokenShards = pack_tokens(read_documents(corpus / "heldout.jsonl"), words, tmp_path / "shards")
    chosen = [1, 4, 20]
    windows = EvaluationWindows(shards, ROW, 3, only=chosen)
    scored: dict[int, float] = defaultdict(float)
    for batch, documents in windows:
        for owner in np.unique(documents[documents >= 0]).tolist():
            scored[owner] += float(batch.weights[documents == owner].sum())
    assert scored == {number: shards.lengths[number] - 1 for number in chosen}
    assert windows.n_targets == sum(scored.values()) and windows.n_bytes == shards.text_bytes[chosen].sum()
