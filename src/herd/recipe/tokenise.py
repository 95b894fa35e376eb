"""The tokenizer stage: train a vocabulary on the training part, or take one, and measure how well it compresses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from herd import tokenizer
from herd.config import Config
from herd.corpus import read_documents
from herd.files import write_json
from herd.progress import track
from herd.recipe.earlier import earlier
from herd.tokenizer.infilling import with_infilling

_LONGEST = 24


class TokenizerConfig(Config):
    """A byte-level vocabulary with Llama 3's split rules, or one that is there already."""

    file: str | None = Field(
        default=None,
        min_length=1,
        description="vocabulary to take instead of a new one: a tokenizer's file, a checkpoint or a run",
    )
    vocab_size: int = Field(default=4096, ge=267, le=2**20, description="ids: 256 bytes, merges, special tokens")
    n_specials: int = Field(
        default=16, ge=11, le=256, description="special tokens of Llama 3's list that are kept; its chat needs 11"
    )
    infilling: bool = Field(
        default=False, description="sixteen ids more: Code Llama's four marks for infilling, and reserved ones"
    )


def train_tokenizer(config: TokenizerConfig, corpus: Path, out: Path) -> dict[str, Any]:
    """Train on corpus/train.jsonl, unless the configuration names a file; write the tokenizer's files and results.json
    into `out`, whose data is returned."""
    if config.file is not None:
        trained = tokenizer.load(earlier(config.file))
    else:
        texts = (document.text for document in read_documents(corpus / "train.jsonl"))
        trained = tokenizer.train(texts, config.vocab_size, n_specials=config.n_specials)
    if config.infilling:
        trained = with_infilling(trained)
    trained.save(out)
    special = set(trained.specials.values())
    content = (trained.token_bytes(i) for i in range(trained.vocab_size) if i not in special)
    longest = sorted(content, key=lambda piece: (-len(piece), piece))[:_LONGEST]
    results = {
        "vocab_size": trained.vocab_size,
        "specials": len(trained.specials),
        "longest": [piece.decode("utf-8", errors="replace") for piece in longest],
        **{part: _compression(trained, corpus / f"{part}.jsonl", part) for part in ("train", "heldout")},
    }
    write_json(out / "results.json", results)
    return results


def _compression(trained: tokenizer.Tokenizer, file: Path, part: str) -> dict[str, float]:
    """Bytes and content tokens of all documents of a file."""
    n_bytes = n_tokens = 0
    for document in _tracked(read_documents(file), part):
        n_bytes += document.n_bytes
        n_tokens += len(trained.encode(document.text))
    return {"bytes": n_bytes, "tokens": n_tokens, "bytes_per_token": n_bytes / n_tokens if n_tokens else 0.0}


def _tracked(documents: Iterable[Any], part: str) -> Iterable[Any]:
    return track(documents, label=f"counting tokens, {part}")
