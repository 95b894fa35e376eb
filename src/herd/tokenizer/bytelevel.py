"""Byte-level vocabularies: Llama 3, Llama 4 and the ones trained here.

Text is cut by the split pattern, and within each cut bytes are merged pair by pair, lowest rank first; ranks are ids.
tiktoken does both. Its input is bounded the way Meta's tokenizers bound it, since the ids depend on that: at most
400,000 characters at a time, and cuts inside runs of more than 25,000 characters that are all space or all not space.

A few third-party `tokenizer.json` files hold merges that ranks cannot express; those go through `tokenizers` instead.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from herd.errors import HerdError
from herd.tokenizer.vocabulary import well_formed

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as MergeListTokenizer

MAX_SLICE = 400_000  # characters in one call of tiktoken
MAX_RUN = 25_000  # consecutive characters that are all space, or all not space

_SPACE = re.compile(r"\s")
_NOT_SPACE = re.compile(r"\S")
_RUN = re.compile(r"\s+|\S+")


class ByteLevelVocabulary:
    """Byte pair encoding over bytes.

    Parameters
    ----------
    ranks : bytes of a token -> id; a lower id merges first. All 256 single bytes must be there.
    pattern : the split pattern, one of `herd.tokenizer.specials`.
    specials : control tokens, which no text is encoded to.
    added : further tokens that a text *does* match as a whole, before anything else (rare; from tokenizer.json).
    merges : "left right" pairs in merge order, as text (`bytechars`), only where they say something else than the
        ranks do; `whole_words_first`: whether a whole piece that is a token is taken without merging.
    """

    drops_first_space = False

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        specials: dict[str, int],
        *,
        added: dict[str, int] | None = None,
        merges: list[str] | None = None,
        whole_words_first: bool = True,
    ) -> None:
        self.ranks = ranks
        self.pattern = pattern
        self.specials = specials
        self.added = added or {}
        self.merges = merges
        self.whole_words_first = whole_words_first
        self.table = _table(ranks, {**specials, **self.added})

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        # The control tokens are left out on purpose: what tiktoken does not know, it cannot produce.
        return tiktoken.Encoding("herd", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.added)

    @functools.cached_property
    def _merge_list(self) -> MergeListTokenizer:
        from tokenizers import Tokenizer as MergeListTokenizer

        from herd.tokenizer.hf_write import bytelevel_json

        return MergeListTokenizer.from_str(bytelevel_json(self, with_specials=False))

    def encode(self, text: str) -> list[int]:
        if len(text) <= MAX_RUN:
            return self._encode_slice(text)
        ids: list[int] = []
        for part in bounded_slices(text):
            ids += self._encode_slice(part)
        return ids

    encode_continuation = encode

    def _encode_slice(self, text: str) -> list[int]:
        if self.merges is not None:
            return list(self._merge_list.encode(well_formed(text), add_special_tokens=False).ids)
        if self.added:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        return self._encoding.encode_ordinary(text)


def bounded_slices(text: str) -> Iterator[str]:
    """Cut a text as Meta's tokenizers do: by 400,000 characters, then inside runs of more than 25,000."""
    for start in range(0, len(text), MAX_SLICE):
        part = text[start : start + MAX_SLICE]
        if _has_long_run(part):
            yield from _cut_long_runs(part)
        else:
            yield part


def _has_long_run(text: str) -> bool:
    """A run of more than MAX_RUN characters lies over a multiple of MAX_RUN, so only those places are looked at."""
    for middle in range(MAX_RUN, len(text), MAX_RUN):
        is_space = text[middle].isspace()
        other = (_NOT_SPACE if is_space else _SPACE).search(text, middle)
        end = other.start() if other else len(text)
        start = middle
        while start > 0 and end - start <= MAX_RUN and text[start - 1].isspace() == is_space:
            start -= 1
        if end - start > MAX_RUN:
            return True
    return False


def _cut_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _RUN.finditer(text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _table(ranks: dict[bytes, int], named: dict[str, int]) -> list[bytes]:
    """Bytes by id, after checking that the ids are 0 … n-1, each used once, and that every byte has a token."""
    size = len(ranks) + len(named)
    table: list[bytes | None] = [None] * size
    for token, number in [*ranks.items(), *((name.encode(), number) for name, number in named.items())]:
        if not 0 <= number < size or table[number] is not None:
            raise HerdError(
                "the vocabulary's ids must be 0 to n-1, each for one token",
                value=f"id {number} of token {token!r}",
                allowed=f"0 to {size - 1}, each once",
            )
        table[number] = token
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise HerdError(
            "a byte-level vocabulary needs a token for each of the 256 bytes", value=f"none for byte {missing[0]:#04x}"
        )
    return [token for token in table if token is not None]
