"""Byte-level tokens as text, and the merges that ranks stand for: what tokenizer.json and GGUF files hold.

Those formats write each byte as one printable character: printable Latin-1 bytes as themselves, the other 68 as
U+0100 upwards, in order (the convention of GPT-2's `bytes_to_unicode`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

# Bytes in Llama 3's order of ranks: printable first.
BYTE_ORDER = [*_PRINTABLE, *_OTHERS]

_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_TO_BYTE = {character: byte for byte, character in _TO_CHARACTER.items()}
# bytes -> Latin-1 text -> mapped text: two calls in C for a whole token
_LATIN1_TO_MAPPED = str.maketrans({chr(byte): character for byte, character in _TO_CHARACTER.items()})
_MAPPED_TO_LATIN1 = str.maketrans({character: chr(byte) for character, byte in _TO_BYTE.items()})
_MAPPED = frozenset(_TO_BYTE)


def to_text(token: bytes) -> str:
    """b" hello" -> "Ġhello"."""
    return token.decode("latin-1").translate(_LATIN1_TO_MAPPED)


def to_bytes(text: str) -> bytes:
    """ "Ġhello" -> b" hello". Raises ValueError for a character that stands for no byte."""
    if not _MAPPED.issuperset(text):
        raise ValueError(f"{text!r} is not a byte-level token")
    return text.translate(_MAPPED_TO_LATIN1).encode("latin-1")


def merges_of(ranks: Mapping[bytes, int]) -> list[str]:
    """Every pair of tokens whose bytes together are a token, as "left right", in the order in which ranks merge them.

    With all of them listed, merging by list and merging by rank is the same: a pair merges if and only if the
    two together are a token, the lowest-ranked first.
    """
    by_text = {to_text(token): rank for token, rank in ranks.items()}
    merges: list[str] = []
    for token in sorted(by_text, key=by_text.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in by_text and pair[1] in by_text]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (by_text[pair[0]], by_text[pair[1]]))
        merges += map(" ".join, pairs)
    return merges


def ranks_say_the_same(ranks: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether merging by rank gives what merging by this list gives: the list is complete, and in order of rank.

    Tokens are given as text, which is as good as bytes here and saves turning each pair into bytes. A released
    vocabulary has some 280,000 merges and is looked at whenever a model is loaded, hence the whole-list operations.
    """
    order = [ranks.get(left + right, -1) for left, right in merges]
    if order != sorted(order) or -1 in order[:1] or not ranks.keys() >= set(chain.from_iterable(merges)):
        return False
    possible = 0
    for token in ranks:
        for i in range(1, len(token)):
            if token[i:] in ranks and token[:i] in ranks:
                possible += 1
    return len(set(merges)) == possible
