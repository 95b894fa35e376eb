"""SentencePiece vocabularies: Llama 1, Llama 2 and Code Llama.

Merging starts from characters and follows scores; characters without a piece fall back to byte pieces `<0x00>` …
`<0xFF>`; a space is written `▁`, and one is put before every text.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from herd.errors import HerdError
from herd.tokenizer.specials import CONTROLS
from herd.tokenizer.spmodel import Piece, PieceType, write_model
from herd.tokenizer.vocabulary import well_formed

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST_SCORE = 3e38  # model files hold 32-bit floats
_CONTROLS = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.UNUSED)


class SentencePieceVocabulary:
    """Byte pair encoding by scores.

    Parameters
    ----------
    pieces : the vocabulary by id. Code Llama's marks become control pieces here, whatever the file calls them, so
        that no text is encoded to them.
    dummy_prefix : whether a space is put before every text (true in every Llama).
    """

    def __init__(self, pieces: list[Piece], dummy_prefix: bool = True) -> None:
        self.pieces = [replace(piece, type=PieceType.CONTROL) if piece.text in CONTROLS else piece for piece in pieces]
        _check(self.pieces)
        self.drops_first_space = dummy_prefix
        self.specials = {piece.text: i for i, piece in enumerate(self.pieces) if piece.type in _CONTROLS}
        self.table = [_bytes(piece) for piece in self.pieces]

    @functools.cached_property
    def _processor(self) -> SentencePieceProcessor:
        return _processor(self.pieces, self.drops_first_space)

    @functools.cached_property
    def _continuing(self) -> SentencePieceProcessor:
        return _processor(self.pieces, False)

    def encode(self, text: str) -> list[int]:
        return _ids(self._processor, text)

    def encode_continuation(self, text: str) -> list[int]:
        return _ids(self._continuing, text)

    def merges(self) -> list[tuple[str, str]]:
        """Every pair of normal pieces that together are one, best score first: what tokenizer.json lists."""
        normal = {piece.text: piece.score for piece in self.pieces if piece.type is PieceType.NORMAL}
        order = sorted(normal, key=lambda text: -normal[text])  # equal scores stay in order of id
        return [
            (text[:i], text[i:])
            for text in order
            for i in range(1, len(text))
            if text[:i] in normal and text[i:] in normal
        ]


def _processor(pieces: list[Piece], dummy_prefix: bool) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=write_model(pieces, dummy_prefix))
    except RuntimeError as error:
        raise HerdError(f"SentencePiece refuses this vocabulary ({error})", value=f"{len(pieces)} pieces") from None


def _ids(processor: SentencePieceProcessor, text: str) -> list[int]:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = well_formed(text).encode()
    ids: list[int] = processor.encode(data, out_type=int)
    return ids


def _bytes(piece: Piece) -> bytes:
    if piece.type is PieceType.BYTE:
        return bytes([int(piece.text[3:5], 16)])
    if piece.type in _CONTROLS:
        return piece.text.encode()
    return piece.text.replace(SPACE, " ").encode()


def _check(pieces: list[Piece]) -> None:
    """What the library would abort on, or what would make a text impossible to encode."""
    seen: set[str] = set()
    for index, piece in enumerate(pieces):
        problem = ""
        if not piece.text or "\0" in piece.text or _SURROGATE.search(piece.text):
            problem = "is empty or holds a character that is no text"
        elif piece.text in seen:
            problem = "occurs twice"
        elif not abs(piece.score) <= _LARGEST_SCORE:  # so written, not-a-number is refused as well
            problem = "has a score that is not a number"
        elif piece.type is PieceType.BYTE and not _BYTE.fullmatch(piece.text):
            problem = "is called a byte, but is not written <0xHH>"
        if problem:
            raise HerdError(f"piece {index} of the vocabulary {problem}", value=piece.text)
        seen.add(piece.text)
    n_unknown = sum(piece.type is PieceType.UNKNOWN for piece in pieces)
    if n_unknown != 1:
        raise HerdError("a SentencePiece vocabulary needs one unknown piece", value=n_unknown, allowed="1")
    n_bytes = sum(piece.type is PieceType.BYTE for piece in pieces)
    if n_bytes != 256:
        raise HerdError("a Llama's vocabulary has a piece for each of the 256 bytes", value=n_bytes, allowed="256")
