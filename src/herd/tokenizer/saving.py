"""Write a tokenizer's files into a directory, each atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from herd.errors import HerdError, UsageError
from herd.files import atomic_write, write_json
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.hf_write import tokenizer_config, tokenizer_json
from herd.tokenizer.pieces import SentencePieceVocabulary
from herd.tokenizer.spmodel import write_model
from herd.tokenizer.tiktoken_file import write_ranks

if TYPE_CHECKING:
    from herd.tokenizer.tokenizer import Tokenizer


def save(tokenizer: Tokenizer, directory: str | os.PathLike[str], layout: str) -> None:
    """See `Tokenizer.save`."""
    directory = Path(directory)
    model = _model_file(tokenizer)
    if layout == "meta":
        if model is None:
            raise HerdError("this vocabulary's merges cannot be written as a tokenizer.model; use the hf layout")
        _write(directory / "tokenizer.model", model)
    elif layout == "hf":
        _write(directory / "tokenizer.json", tokenizer_json(tokenizer).encode())
        write_json(directory / "tokenizer_config.json", tokenizer_config(tokenizer))
        if model is not None:
            below = "" if isinstance(tokenizer.vocabulary, SentencePieceVocabulary) else "original"
            _write(directory / below / "tokenizer.model", model)
    else:
        raise UsageError("unknown layout for tokenizer files", value=layout, allowed="hf, meta")


def _model_file(tokenizer: Tokenizer) -> bytes | None:
    """Meta's tokenizer.model, if it can say all of this vocabulary."""
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, SentencePieceVocabulary):
        return write_model(vocabulary.pieces, vocabulary.drops_first_space)
    assert isinstance(vocabulary, ByteLevelVocabulary)
    in_order = max(vocabulary.ranks.values()) == len(vocabulary.ranks) - 1
    if vocabulary.merges is not None or vocabulary.added or not in_order:
        return None
    return write_ranks(vocabulary.ranks)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
