"""SentencePiece model files (`tokenizer.model` of Llama 1, 2 and Code Llama): a small reader and writer.

The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto. Only the fields a Llama uses are read, each
bounds-checked, and the SentencePiece library is given a file that *we* wrote from them, never the untrusted one.

Wire format: a message is a sequence of (tag, value), tag = field << 3 | kind, all as varints;
kind 0 = varint, 1 = 8 bytes, 2 = length and bytes, 5 = 4 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from herd.errors import FileFormatError


class PieceType(IntEnum):
    """Types of a piece; the numbers are those of the protocol buffer and of GGUF's token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary. Of two pairs that could merge, the one that makes the higher score does."""

    text: str
    score: float
    type: PieceType


_BPE = 2  # TrainerSpec.ModelType

# Field numbers.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _SUFFIX, _BYTE_FALLBACK = 3, 4, 24, 35
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 1, 2, 3, 4, 5

_Value = int | bytes


def read_model(data: bytes, path: Path) -> tuple[list[Piece], bool]:
    """Read a model file: its pieces by id, and whether a space is put before every text.

    Raises `FileFormatError` for a damaged file and for models that are no Llama's (not BPE, text normalisation).
    """
    pieces: list[Piece] = []
    dummy_prefix = True
    seen: set[int] = set()
    for field, value, offset in _fields(data, 0, len(data), path, "model"):
        if not isinstance(value, bytes):
            continue
        start = offset - len(value)
        seen.add(field)
        if field == _PIECES:
            pieces.append(_piece(value, start, path, len(pieces)))
        elif field == _TRAINER:
            spec = {number: v for number, v, _ in _fields(data, start, offset, path, "trainer_spec")}
            _require(spec.get(_MODEL_TYPE, 1), _BPE, "trainer_spec.model_type", "2 (BPE)", start, path)
            _require(spec.get(_SUFFIX, 0), 0, "trainer_spec.treat_whitespace_as_suffix", "0", start, path)
        elif field == _NORMALIZER:
            spec = {number: v for number, v, _ in _fields(data, start, offset, path, "normalizer_spec")}
            _require(spec.get(_CHARSMAP, b""), b"", "normalizer_spec.precompiled_charsmap", "none", start, path)
            _require(spec.get(_REMOVE_SPACES, 1), 0, "normalizer_spec.remove_extra_whitespaces", "0", start, path)
            dummy_prefix = bool(spec.get(_DUMMY_PREFIX, 1))
    for field, name in ((_PIECES, "pieces"), (_TRAINER, "trainer_spec"), (_NORMALIZER, "normalizer_spec")):
        if field not in seen:
            raise FileFormatError("the file ends without a part of the model", file=path, field=name, offset=len(data))
    return pieces, dummy_prefix


def write_model(pieces: list[Piece], dummy_prefix: bool) -> bytes:
    """The model file of these pieces, as the SentencePiece library and Meta's code read it."""
    entries = [
        _bytes(_TEXT, piece.text.encode()) + _tag(_SCORE, 5) + struct.pack("<f", piece.score) + _int(_TYPE, piece.type)
        for piece in pieces
    ]
    trainer = _int(_MODEL_TYPE, _BPE) + _int(_VOCAB_SIZE, len(pieces)) + _int(_BYTE_FALLBACK, 1)
    normalizer = _bytes(_NAME, b"identity") + _int(_DUMMY_PREFIX, dummy_prefix) + _int(_REMOVE_SPACES, 0)
    normalizer += _int(_ESCAPE, 1)
    return (
        b"".join(_bytes(_PIECES, entry) for entry in entries)
        + _bytes(_TRAINER, trainer)
        + _bytes(_NORMALIZER, normalizer)
    )


def _piece(entry: bytes, start: int, path: Path, index: int) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for field, value, offset in _fields(entry, 0, len(entry), path, f"pieces[{index}]", start):
        if field == _TEXT and isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError:
                raise FileFormatError(
                    "a piece is not UTF-8", file=path, field=f"pieces[{index}]", offset=start + offset - len(value)
                ) from None
        elif field == _SCORE and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif field == _TYPE and isinstance(value, int):
            if value not in _TYPES:
                raise FileFormatError(
                    "unknown type of piece",
                    file=path,
                    field=f"pieces[{index}].type",
                    offset=start + offset,
                    value=value,
                    allowed="1 to 6",
                )
            kind = PieceType(value)
    return Piece(text, score, kind)


_TYPES = frozenset(PieceType)


def _require(value: _Value, wanted: _Value, field: str, allowed: str, offset: int, path: Path) -> None:
    if value != wanted:
        raise FileFormatError(
            "this SentencePiece model is not a Llama's",
            file=path,
            field=field,
            offset=offset,
            value=value,
            allowed=allowed,
        )


def _fields(
    data: bytes, position: int, end: int, path: Path, where: str, base: int = 0
) -> Iterator[tuple[int, _Value, int]]:
    """(field number, value, offset after the value) of a message; fixed-width numbers come as their bytes."""

    def damaged(what: str) -> FileFormatError:
        return FileFormatError(what, file=path, field=where, offset=base + position)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= end:
                raise damaged("the file ends inside a number")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise damaged("a number is longer than 64 bits")

    while position < end:
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint(), position
            continue
        if kind not in (1, 2, 5):
            raise damaged("not a SentencePiece model: unknown kind of field")
        width = varint() if kind == 2 else 8 if kind == 1 else 4
        if width > end - position:
            raise damaged("a field reaches beyond the end of the file")
        position += width
        yield tag >> 3, data[position - width : position], position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _int(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value
