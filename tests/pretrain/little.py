"""A little corpus, and a model that has learnt rows of 32 tokens of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from herd import tokenizer
from herd.architecture import LlamaConfig
from herd.corpus import Document, read_documents
from herd.corpus.document import write_documents
from herd.pretrain import PretrainConfig, run

LOOP = {"seq_len": 32, "compile": "off", "checkpoint_seconds": 0, "precision": "fp32"}


def functions(n: int, count: int) -> str:
    """Text that gets shorter rows to say what longer ones need: names come back later."""
    return "\n".join(f"def add_{n}_{i}(a):\n    return a + {i}\n" for i in range(count))


def write_corpus(folder: Path, count: int, train: int, heldout: int) -> Path:
    """Documents of so many functions each; in the training text of five packages."""
    learnt = [Document(functions(n, count), f"lib{n % 5}/{n}.py") for n in range(train)]
    held = [Document(functions(n, count), f"heldout/{n}") for n in range(200, 200 + heldout)]
    write_documents(folder / "train.jsonl", learnt)
    write_documents(folder / "heldout.jsonl", held)
    return folder


def vocabulary(corpus: Path, size: int = 300) -> tokenizer.Tokenizer:
    """A tokenizer of the corpus's training text."""
    texts = [document.text for document in read_documents(corpus / "train.jsonl")]
    return tokenizer.train(texts, size, n_specials=16)


def shape_for(words: tokenizer.Tokenizer, **more: Any) -> LlamaConfig:
    """Two layers of 32 dimensions."""
    shape: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 64}
    return LlamaConfig(**shape | {"vocab_size": words.vocab_size, "context_length": 64} | more)


def trained(corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, steps: int, out: Path) -> Path:
    """The checkpoint of a model after so many steps of 16 rows."""
    train = LOOP | {"steps": steps, "batch_size": 16, "lr": 0.01}
    run(PretrainConfig.model_validate({"evaluations": 0, "train": train}), shape, corpus, words, out)
    return out / "checkpoint"
