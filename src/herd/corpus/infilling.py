"""Documents as exercises in infilling, as Code Llama was trained (arXiv 2308.12950 §2.3): a text is cut into prefix,
middle and suffix, and the middle is put last, so that a model learns to write what stands between two texts.

    prefix-suffix-middle:  BOS PRE prefix SUF suffix MID middle EOT EOS
    suffix-prefix-middle:  BOS PRE SUF suffix MID prefix middle EOT EOS

Cuts are two characters' places, drawn independently and evenly. Suffix and, in the first order, middle are encoded as
continuations, without SentencePiece's first space; in the second, prefix and middle are encoded as one text. So far the
paper and Meta's code; that EOS follows EOT is a choice, so that documents end as all others do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from herd.corpus.document import Document
from herd.corpus.order import hashed_counters
from herd.corpus.shards import DocumentTokenizer, TokenShards, pack_tokens

_EOT = "▁<EOT>"


class _Continuing(Protocol):
    def encode_continuation(self, text: str) -> list[int]: ...


class InfillTokenizer(DocumentTokenizer, Protocol):
    """What infilling needs of a tokenizer; `herd.tokenizer.Tokenizer` has it."""

    @property
    def specials(self) -> dict[str, int]: ...
    @property
    def vocabulary(self) -> _Continuing: ...
    def encode_infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Infilling:
    """Which documents are cut: a `share` of them, of those a share `suffix_first` into the order that begins so.

    most_tokens: a document that would have more pairs of tokens than this stays as it is: a row would cut it, and its
    pieces would lack what they are to be completed from.
    """

    share: float = 0.9
    suffix_first: float = 0.5
    most_tokens: int | None = None


def infilled(text: str, tokenizer: InfillTokenizer, how: Infilling, seed: int, index: int) -> list[int]:
    """Token ids of document number `index`: cut, or as it is. A function of the arguments alone.

    Raises UsageError for a vocabulary without the marks of infilling.
    """
    if _EOT not in tokenizer.specials:
        tokenizer.encode_infill("", "")  # raises, and says which vocabularies have marks
    chance, order, *places = (int(number) for number in hashed_counters(4, seed, index))
    if chance < how.share * 2**64:
        start, end = sorted(number * (len(text) + 1) >> 64 for number in places)
        ids = _cut(text, start, end, tokenizer, suffix_first=order < how.suffix_first * 2**64)
        if how.most_tokens is None or len(ids) <= how.most_tokens + 1:  # a row has one pair less than tokens
            return ids
    return tokenizer.encode_document(text)


def _cut(text: str, start: int, end: int, tokenizer: InfillTokenizer, *, suffix_first: bool) -> list[int]:
    prefix, middle, suffix = text[:start], text[start:end], text[end:]
    finish = [tokenizer.specials[_EOT], tokenizer.eos_id]
    if suffix_first:
        return tokenizer.encode_infill(prefix + middle, suffix, suffix_first=True) + finish
    return tokenizer.encode_infill(prefix, suffix) + tokenizer.vocabulary.encode_continuation(middle) + finish


def pack_infilled(
    documents: Iterable[Document | str],
    tokenizer: InfillTokenizer,
    path: str | Path,
    how: Infilling,
    seed: int,
) -> TokenShards:
    """As `pack_tokens`, with infilling. Documents without text have no number."""
    return pack_tokens(documents, _Numbering(tokenizer, how, seed), path)


class _Numbering:
    """The tokenizer of one packing, which encodes the documents one after the other."""

    def __init__(self, tokenizer: InfillTokenizer, how: Infilling, seed: int) -> None:
        self._tokenizer, self._how, self._seed = tokenizer, how, seed
        self._indices = itertools.count()
        self.vocab_size, self.bos_id, self.eos_id = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id

    def encode_document(self, text: str) -> list[int]:
        return infilled(text, self._tokenizer, self._how, self._seed, next(self._indices))
