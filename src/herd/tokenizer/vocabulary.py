"""What a vocabulary must be able to do, whatever file it came from: the seam between files and the Tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# Characters of a token in a file. The longest of Llama 3 has 128; work on splits of tokens grows with the square.
MAX_TOKEN = 4096


class Vocabulary(Protocol):
    """Text ⇄ ids without any dialogue format. Two kinds exist: `ByteLevelVocabulary` and `SentencePieceVocabulary`."""

    @property
    def specials(self) -> dict[str, int]:
        """Control tokens, name to id. No text is ever encoded to one of these."""

    @property
    def table(self) -> Sequence[bytes]:
        """The bytes of every token, by id; a control token stands as its name. Its length is the vocabulary size."""

    @property
    def drops_first_space(self) -> bool:
        """Whether encoding puts a space before a text, so that decoding takes one away (SentencePiece)."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text that stands by itself."""

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after another one: without the space SentencePiece puts first."""


def well_formed(text: str) -> str:
    """Replace what is not Unicode text (lone surrogates) by U+FFFD, as tiktoken does; pairs become their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
