"""What several files need; those with a corpus of their own have fixtures of the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd.architecture import LlamaConfig
from herd.tokenizer import Tokenizer
from tests.pretrain.little import shape_for, trained, vocabulary, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few documents, each longer than a row of 128 tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), count=12, train=60, heldout=6)


@pytest.fixture(scope="session")
def words(corpus: Path) -> Tokenizer:
    return vocabulary(corpus)


@pytest.fixture(scope="session")
def shape(words: Tokenizer) -> LlamaConfig:
    return shape_for(words, context_length=128, rope_theta=1e4)


@pytest.fixture(scope="session")
def short(corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little model that has learnt rows of 32 tokens; its context is 128."""
    return trained(corpus, words, shape, 80, tmp_path_factory.mktemp("short"))
