"""Held-out text scored along the way changes nothing of what ranks train: neither the weights nor their average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed")

import torch

from herd import checkpoint, tokenizer
from herd.architecture import LlamaConfig
from herd.corpus import Document, read_documents
from herd.corpus.document import write_documents
from herd.pretrain import PretrainConfig, heldout, run
from herd.train import Trainer
from tests.train.parallel.launch import launch

HERE = "tests.train.parallel.test_parallel_evaluate"
MESHES: list[dict[str, Any]] = [{"shard": True}, {"pp": 2}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, first in (("train", 0), ("heldout", 500)):
        documents = [
            Document(f"page {n} comes after page {n - 1}. " * 6, f"page/{n}") for n in range(first, first + 40)
        ]
        write_documents(folder / f"{name}.jsonl", documents)
    texts = [document.text for document in read_documents(folder / "train.jsonl")]
    tokenizer.train(texts, 300, n_specials=16).save(folder / "words")
    return folder


def train(corpus: Path, out: Path, parallel: dict[str, Any]) -> list[int]:
    """A stage that averages its weights; how many numbers of them this rank has after each score."""
    words, held = tokenizer.load(corpus / "words"), list[int]()
    shape = LlamaConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, ffn_dim=64, context_length=32,
                        vocab_size=304)  # fmt: skip
    loop = {"steps": 6, "seq_len": 32, "batch_size": 4, "micro_batch": 1, "lr": 1e-3, "eps": 1e-6, "average": "ema"}
    loop |= {"ema_decay": 0.5, "precision": "fp32", "compile": "off", "parallel": parallel}
    score = heldout.score

    def counting(trainer: Trainer[Any], windows: Any) -> dict[str, float]:
        found = score(trainer, windows)
        parts = (p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters())
        held.append(sum(part.numel() for part in parts))
        return found

    heldout.score = counting
    run(PretrainConfig.model_validate({"evaluations": 3, "train": loop}), shape, corpus, words, out)
    heldout.score = score
    return held


def go(rank: int, out: Path, corpus: str) -> None:
    for number, mesh in enumerate(MESHES):
        held = train(Path(corpus), out / str(number), mesh)
        (out / f"{number}-{rank}.json").write_text(json.dumps(held))


@pytest.fixture(scope="module")
def ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    launch(2, f"{HERE}:go", out, corpus=str(corpus))
    return out


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    out = tmp_path_factory.mktemp("alone")
    return out, train(corpus, out, {})


@pytest.mark.parametrize("number", range(len(MESHES)), ids=[str(mesh) for mesh in MESHES])
def test_scores_leave_weights_and_their_average_alone(ranks: Path, alone: tuple[Path, list[int]], number: int) -> None:
    one, whole = alone
    for rank in range(2):
        held = json.loads((ranks / f"{number}-{rank}.json").read_text())
        assert len(held) == len(whole) == 3, "at the start and at two of three places: the stage scores the end"
        if "shard" in MESHES[number]:
            assert held == [pytest.approx(n / 2, rel=0.01) for n in whole], "a rank has its part alone again"
    with (
        checkpoint.open_checkpoint(one / "checkpoint") as first,
        checkpoint.open_checkpoint(ranks / str(number) / "checkpoint") as second,
    ):
        for name in first:
            torch.testing.assert_close(torch.tensor(second[name]), torch.tensor(first[name]), atol=2e-5, rtol=1e-3)
