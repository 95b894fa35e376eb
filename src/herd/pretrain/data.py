"""The stage's token files: training text, all held-out text, and a small probe of it for evaluation along the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from herd.corpus import Document, TokenShards, pack_tokens, read_documents
from herd.errors import FileFormatError, UsageError
from herd.files import read_json, sha256_file, write_json

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenFiles:
    """Opened shards; `heldout` and `probe` are None when nothing was held out."""

    train: TokenShards
    heldout: TokenShards | None
    probe: TokenShards | None

    def scored_tokens(self, probes: int) -> tuple[int, int]:
        """Tokens that go through the model for all probes and at the end; windows overlap by half: each goes twice."""
        full = self.heldout.n_tokens if self.heldout is not None else 0
        return 2 * probes * (self.probe.n_tokens if self.probe is not None else 0), 2 * full


def prepare(corpus: Path, tokenizer: Tokenizer, directory: Path, probe_tokens: int) -> TokenFiles:
    """Tokenise corpus/train.jsonl and heldout.jsonl into `directory`, or open what an earlier call left there.

    Earlier files are used only when they came from the same texts and the same vocabulary. Raises UsageError for a
    folder without train.jsonl.
    """
    train, heldout = corpus / "train.jsonl", corpus / "heldout.jsonl"
    if not train.is_file():
        raise UsageError(
            f"{corpus} has no train.jsonl", allowed="a folder made by curate()", fix="herd corpus SOURCES... --out DIR"
        )
    parts = [("train", train)] + ([("heldout", heldout)] if heldout.is_file() and heldout.stat().st_size else [])
    wanted = {name: sha256_file(file) for name, file in parts}
    wanted |= {"vocabulary": vocabulary_hash(tokenizer), "probe_tokens": str(probe_tokens)}
    stamp = directory / "made_from.json"
    if not _same(stamp, wanted):
        stamp.unlink(missing_ok=True)
        for name, file in parts:
            pack_tokens(read_documents(file), tokenizer, directory / name)
        if "heldout" in wanted:
            shards = TokenShards(directory / "heldout")
            chosen = spread(shards.lengths.tolist(), probe_tokens)
            pack_tokens(_select(heldout, chosen), tokenizer, directory / "probe")
        write_json(stamp, wanted)
    return TokenFiles(
        TokenShards(directory / "train"),
        *(TokenShards(directory / name) if "heldout" in wanted else None for name in ("heldout", "probe")),
    )


def spread(lengths: Sequence[int], tokens: int) -> set[int]:
    """Indices of documents at equal distances over the whole list, together about `tokens` long; all if they are fewer.

    Documents longer than a quarter of the probe are passed over, or one of them would be the probe.
    """
    usable = [i for i, length in enumerate(lengths) if length <= max(tokens // 4, min(lengths))]
    total = sum(lengths[i] for i in usable)
    count = max(1, min(len(usable), round(len(usable) * tokens / total)))
    return {usable[i * len(usable) // count] for i in range(count)}


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 over every token's bytes and every special token's name and id."""
    digest = hashlib.sha256(repr(sorted(tokenizer.specials.items())).encode())
    specials = set(tokenizer.specials.values())
    for token in range(tokenizer.vocab_size):
        content = b"" if token in specials else tokenizer.token_bytes(token)
        digest.update(len(content).to_bytes(4, "little") + content)
    return digest.hexdigest()


def _same(stamp: Path, wanted: dict[str, str]) -> bool:
    try:
        return bool(read_json(stamp) == wanted)
    except FileFormatError:
        return False


def _select(file: Path, chosen: set[int]) -> Iterator[Document]:
    # pack_tokens leaves out documents without text, so they do not count here either.
    documents = (document for document in read_documents(file) if document.text)
    return (document for number, document in enumerate(documents) if number in chosen)
