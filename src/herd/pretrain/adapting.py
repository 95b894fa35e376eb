"""A checkpoint made to fit a recipe's shape before training goes on: pruned to it, with rows for new tokens."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from herd import checkpoint
from herd import model as models
from herd.architecture import LlamaConfig
from herd.config import Config
from herd.corpus import read_documents
from herd.errors import FileFormatError, HerdError, UsageError
from herd.files import read_json, write_json
from herd.pretrain.pruning import prune, shrinks
from herd.train.world import World

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

_MARK = "adapted.json"


class AdaptConfig(Config):
    """Text that shows what of the checkpoint can be cut."""

    calibration_rows: int = Field(
        default=64, ge=1, le=65536, description="documents of the corpus that are read for it"
    )
    calibration_tokens: int = Field(default=1024, ge=2, description="most tokens of each")


def adapt(
    config: AdaptConfig,
    init_from: str,
    shape: LlamaConfig,
    corpus: Path,
    tokenizer: Tokenizer,
    out: Path,
    seed: int,
    world: World,
) -> Path:
    """The checkpoint `init_from` in this shape and with this vocabulary, in `out`; what an earlier call made is kept.

    Rank 0 makes it. Raises UsageError for a shape that cannot be cut out of it and for a vocabulary that does not begin
    with the checkpoint's.
    """
    settings = {"from": init_from, "shape": shape.to_dict(), "config": config.model_dump(), "seed": seed}

    def make() -> None:
        if not _is_made(out / _MARK, settings):
            _make(config, checkpoint.continuing(init_from), shape, corpus, tokenizer, out, seed)
            write_json(out / _MARK, settings)

    world.first(make)
    return out


def _is_made(mark: Path, settings: Mapping[str, Any]) -> bool:
    try:
        return bool(read_json(mark) == settings)
    except FileFormatError:
        return False


def _make(
    config: AdaptConfig,
    source: Path,
    shape: LlamaConfig,
    corpus: Path,
    tokenizer: Tokenizer,
    out: Path,
    seed: int,
) -> None:
    (out / _MARK).unlink(missing_ok=True)
    with checkpoint.open_checkpoint(source) as opened:
        _check_vocabulary(str(source), opened, tokenizer)
        model = models.from_arrays(opened.config, opened, dtype=torch.float32)
    rows = calibration(config, corpus, tokenizer, seed) if shrinks(model.config, shape) else []
    smaller = prune(model, shape, rows)
    checkpoint.save(out, shape, models.state_arrays(smaller), format="hf", dtype="f32", tokenizer=tokenizer)


def calibration(config: AdaptConfig, corpus: Path, tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """The beginnings of documents that are drawn evenly from all of corpus/train.jsonl."""

    def draw(url: str) -> bytes:
        return hashlib.sha256(f"{seed}/{url}".encode("utf-8", "surrogatepass")).digest()

    documents = (document for document in read_documents(corpus / "train.jsonl") if document.text)
    drawn = heapq.nsmallest(config.calibration_rows, documents, key=lambda document: draw(document.url))
    return [tokenizer.encode_document(document.text)[: config.calibration_tokens] for document in drawn]


def _check_vocabulary(name: str, opened: checkpoint.Checkpoint, tokenizer: Tokenizer) -> None:
    """The checkpoint's tokens are the first of the vocabulary."""
    try:
        own = opened.tokenizer
    except HerdError:
        return  # it came without one: its user says which
    same = own.vocab_size <= tokenizer.vocab_size and all(
        own.token_bytes(token) == tokenizer.token_bytes(token) for token in range(own.vocab_size)
    )
    if not same or any(tokenizer.specials.get(mark) != token for mark, token in own.specials.items()):
        raise UsageError(
            f"the vocabulary does not begin with that of {name}",
            value=f"{tokenizer.vocab_size:,} tokens",
            allowed=f"its {own.vocab_size:,} tokens, and more behind them",
            fix=f"tokenizer.file={name}",
        )
