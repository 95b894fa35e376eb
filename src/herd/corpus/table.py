"""The words and lines of many texts as arrays, so that no filter loops over characters in Python.

A table holds a block of texts as one byte array. Any span of it hashes in O(1) by differences of prefix sums: with
S[i] = sum_{j<i} (b_j + 1) P^j (mod 2^64), the span [s, e) has hash (S[e] - S[s]) P^{-s}, which depends on its bytes
alone (Rabin-Karp with an odd multiplier, which has an inverse mod 2^64). A finaliser then mixes all bits into all.
Letters: N bytes, W words, D documents of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 2**64)
_BLOCK_BYTES = 2**21  # tables of this size keep the 8-byte work arrays near the caches

_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[ord("A") : ord("Z") + 1] += 32
_IS_WORD = np.zeros(256, dtype=bool)
_IS_WORD[[*range(48, 58), *range(65, 91), ord("_"), *range(97, 123)]] = True
_IS_WORD[128:] = True


def mix(values: U64) -> U64:
    """Finaliser of splitmix64: a bijection of 64-bit integers in which every output bit depends on every input bit."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=2)
def _powers(base: int, count: int) -> U64:
    """base^0 … base^(count-1) mod 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


@dataclass(frozen=True)
class Spans:
    """Half-open byte spans [start, end) in text order; those of document d are the rows bounds[d]:bounds[d + 1]."""

    starts: I64
    ends: I64
    bounds: I64

    @property
    def lengths(self) -> I64:
        """Bytes in each span."""
        return self.ends - self.starts

    @cached_property
    def documents(self) -> I64:
        """The document of each span."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))


class TextTable:
    """A block of texts with its words, its lines and their hashes (64 bits; equal bytes have equal hashes)."""

    def __init__(self, texts: Sequence[str]) -> None:
        # A newline closes each text, so neither words nor lines run from one into the next.
        pieces = [text.encode("utf-8") + b"\n" for text in texts]
        self.bounds: I64 = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        self.bytes_N: Bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def words(self) -> Spans:
        """Maximal runs of ASCII letters, digits, "_" and non-ASCII characters. A character of three or more UTF-8
        bytes begins a word of its own, as Chinese, Japanese and Thai are written without spaces."""
        inside = _IS_WORD[self.bytes_N]
        before = np.concatenate(([False], inside[:-1]))
        begins = inside & (~before | (self.bytes_N >= 0xE0))
        starts = np.flatnonzero(begins)
        after = np.concatenate((begins[1:] | ~inside[1:], [True]))
        ends = np.flatnonzero(inside & after) + 1
        return Spans(starts, ends, np.searchsorted(starts, self.bounds))

    @cached_property
    def lines(self) -> Spans:
        """Lines with something in them, without surrounding spaces and tabs."""
        solid = (self.bytes_N != 10) & (self.bytes_N != 32) & (self.bytes_N != 9)
        newlines = np.flatnonzero(self.bytes_N == 10)
        where = np.flatnonzero(solid)
        line_of = np.searchsorted(newlines, where)
        first = np.flatnonzero(np.diff(line_of, prepend=-1))
        last = np.append(first[1:] - 1, len(where) - 1) if len(where) else first
        starts, ends = where[first], where[last] + 1
        return Spans(starts, ends, np.searchsorted(starts, self.bounds))

    @cached_property
    def word_hashes(self) -> U64:
        """Hash of each word, letters A–Z taken as a–z."""
        return self._hash(self.words, fold_case=True)

    @cached_property
    def line_hashes(self) -> U64:
        """Hash of each line."""
        return self._hash(self.lines, fold_case=False)

    def _hash(self, spans: Spans, fold_case: bool) -> U64:
        n = len(self.bytes_N)
        size = max(n, _BLOCK_BYTES) + 1  # one cached power table serves all blocks of usual size
        values = (_LOWER[self.bytes_N] if fold_case else self.bytes_N).astype(np.uint64)
        values += np.uint64(1)
        values *= _powers(_MULTIPLIER, size)[:n]
        sums = np.zeros(n + 1, dtype=np.uint64)
        np.cumsum(values, out=sums[1:])
        return mix((sums[spans.ends] - sums[spans.starts]) * _powers(_INVERSE, size)[spans.starts])

    def shingles(self, ngram: int) -> tuple[U64, I64]:
        """Hashes of all runs of `ngram` words, and their bounds per document.

        A document with fewer words has one shingle, of all its words; one without words has none.
        """
        hashes, bounds = self.word_hashes, self.words.bounds
        counts = np.diff(bounds)
        kept = np.where(counts == 0, 0, np.maximum(counts - ngram + 1, 1))
        out_bounds: I64 = np.concatenate(([0], np.cumsum(kept)))
        documents = np.repeat(np.arange(len(self)), kept)
        first = bounds[documents] + np.arange(out_bounds[-1]) - out_bounds[documents]
        available = np.minimum(bounds[documents + 1] - first, ngram)
        result = np.zeros(len(first), dtype=np.uint64)
        short = available.min(initial=ngram) < ngram
        for i in range(ngram):
            if short:
                word = np.where(i < available, hashes[np.minimum(first + i, len(hashes) - 1)], np.uint64(0))
            else:
                word = hashes[first + i]
            result *= np.uint64(_MULTIPLIER)
            result += word
        return mix(result), out_bounds


def blocks(texts: Sequence[str], limit: int = _BLOCK_BYTES) -> Iterator[tuple[int, TextTable]]:
    """Cut texts into tables of about `limit` characters: (number of the first text, table)."""
    first, size = 0, 0
    for i, text in enumerate(texts):
        if size and size + len(text) > limit:
            yield first, TextTable(texts[first:i])
            first, size = i, 0
        size += len(text)
    if first < len(texts):
        yield first, TextTable(texts[first:])
