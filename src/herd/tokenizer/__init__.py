"""Text ⇄ token ids, for every Llama: vocabularies from all their file formats, chat formats, training of new ones.

>>> tokenizer = herd.tokenizer.load("tokenizer.model")
>>> tokenizer.decode(tokenizer.encode("hello"))
'hello'
"""

from __future__ import annotations

from collections.abc import Iterable

from herd.tokenizer.chat import (
    CHAT_FORMATS,
    ArgumentsDelta,
    Call,
    CallParser,
    CallStart,
    Delta,
    Encoded,
    Message,
    TextDelta,
    parse_calls,
)
from herd.tokenizer.loading import from_gguf_metadata, load
from herd.tokenizer.stream import StreamDecoder
from herd.tokenizer.tokenizer import Tokenizer

__all__ = [
    "CHAT_FORMATS",
    "ArgumentsDelta",
    "Call",
    "CallParser",
    "CallStart",
    "Delta",
    "Encoded",
    "Message",
    "StreamDecoder",
    "TextDelta",
    "Tokenizer",
    "from_gguf_metadata",
    "load",
    "parse_calls",
    "train",
]


def train(texts: Iterable[str], vocab_size: int, *, n_specials: int | None = None) -> Tokenizer:
    """Train a byte-level tokenizer with Llama 3's split pattern and special tokens.

    Parameters
    ----------
    texts : documents; read once.
    vocab_size : number of ids in the end: 256 bytes + merges + special tokens.
    n_specials : how many of Llama 3.1's 256 special tokens follow the ranks, at least 11. By default all 256, and a
        sixteenth of a vocabulary of less than 4,096.

    The result depends on the multiset of texts only, not on their order, the machine or the number of threads.
    Raises `UsageError` for sizes that do not fit and `HerdError` when the texts are too small for `vocab_size`.
    """
    from herd.tokenizer.training import train as run

    return run(texts, vocab_size, n_specials)
