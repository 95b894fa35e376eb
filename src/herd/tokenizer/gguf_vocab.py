"""The vocabulary inside a GGUF file: `tokenizer.*` metadata ⇄ a vocabulary.

`tokenizer.ggml.model` is "llama" (SentencePiece: pieces, scores, types) or "gpt2" (byte-level: tokens as printable
characters, merges, and in `pre` the name of the split pattern). Token types are those of `PieceType`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from herd.errors import FileFormatError, HerdError
from herd.tokenizer.bytechars import merges_of, ranks_say_the_same, to_bytes, to_text
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.pieces import SentencePieceVocabulary
from herd.tokenizer.specials import CONTROLS, GGUF_PRE_NAMES
from herd.tokenizer.spmodel import Piece, PieceType
from herd.tokenizer.vocabulary import MAX_TOKEN, Vocabulary

if TYPE_CHECKING:
    from herd.tokenizer.tokenizer import Tokenizer

FORMAT_KEY = "herd.chat_format"
TEMPLATE_KEY = "tokenizer.chat_template"
_PREFIX = "tokenizer.ggml."
_CONTROL_TYPES = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.UNUSED)


def read_vocabulary(metadata: Mapping[str, object], path: Path | None) -> Vocabulary:
    """The vocabulary of a GGUF's metadata. Raises `FileFormatError` naming the key that is missing or wrong."""
    return _Reader(metadata, path).vocabulary()


class _Reader:
    def __init__(self, metadata: Mapping[str, object], path: Path | None) -> None:
        self.metadata = metadata
        self.path = path

    def vocabulary(self) -> Vocabulary:
        kind = self.metadata.get(_PREFIX + "model")
        try:
            if kind == "llama":
                return self.sentencepiece()
            if kind == "gpt2":
                return self.byte_level()
        except FileFormatError:
            raise
        except HerdError as error:
            raise FileFormatError(str(error), file=self.path, field=_PREFIX + "tokens") from None
        return self.fail("model", "no Llama vocabulary in this GGUF", kind, "llama or gpt2")

    def sentencepiece(self) -> SentencePieceVocabulary:
        tokens = self.texts("tokens")
        scores = self.numbers("scores", len(tokens))
        types = self.types(len(tokens))
        prefix = self.metadata.get(_PREFIX + "add_space_prefix", True)
        pieces = [Piece(*row) for row in zip(tokens, map(float, scores), types, strict=True)]
        return SentencePieceVocabulary(pieces, bool(prefix))

    def byte_level(self) -> ByteLevelVocabulary:
        pre = self.metadata.get(_PREFIX + "pre")
        pattern = next((pattern for pattern, names in GGUF_PRE_NAMES.items() if pre in names), None)
        if pattern is None:
            names = [name for names in GGUF_PRE_NAMES.values() for name in names]
            self.fail("pre", "the split pattern is not a Llama's", pre, ", ".join(names))
        ranks: dict[str, int] = {}
        specials: dict[str, int] = {}
        added: dict[str, int] = {}
        tokens = self.texts("tokens")
        for number, (token, kind) in enumerate(zip(tokens, self.types(len(tokens)), strict=True)):
            control = kind in _CONTROL_TYPES or token in CONTROLS
            (specials if control else ranks if kind is PieceType.NORMAL else added)[token] = number
        merges = self.merges(ranks)
        if merges is not None and added:
            self.fail("merges", "merges are not those of the ranks", len(merges), "control tokens only beside them")
        by_bytes = {self.bytes_of(token, f"tokens[{number}]"): number for token, number in ranks.items()}
        return ByteLevelVocabulary(by_bytes, pattern, specials, added=added, merges=merges)

    def merges(self, ranks: dict[str, int]) -> list[str] | None:
        """The merge list, if it says something else than the ranks do."""
        if _PREFIX + "merges" not in self.metadata:
            return None
        merges = self.texts("merges")
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        if ranks_say_the_same(ranks, pairs):
            return None
        for index, (left, right) in enumerate(pairs):
            if left not in ranks or right not in ranks or left + right not in ranks:
                self.fail(f"merges[{index}]", "not a merge of two tokens to a third", merges[index], "two tokens")
        return merges

    def texts(self, key: str) -> list[str]:
        found = self.list(key)
        if not found or not all(isinstance(item, str) for item in found):
            self.fail(key, "not a list of texts", type(found[0]).__name__ if found else "an empty list", "texts")
        longest = max(found, key=len)
        if len(longest) > 2 * MAX_TOKEN:  # a merge names two tokens
            self.fail(key, "a text is too long for a token", longest, f"at most {MAX_TOKEN:,} characters")
        return found

    def numbers(self, key: str, count: int) -> list[Any]:
        found = self.list(key)
        if len(found) != count or not all(isinstance(item, (int, float)) for item in found):
            self.fail(key, "not a number for each token", f"{len(found)} items", f"{count} numbers")
        return found

    def types(self, count: int) -> list[PieceType]:
        found = self.numbers("token_type", count)
        try:
            return [PieceType(item) for item in found]
        except ValueError as error:
            self.fail("token_type", "unknown type of token", str(error), "1 to 6")

    def list(self, key: str) -> list[Any]:
        found = self.metadata.get(_PREFIX + key)
        if not isinstance(found, list):
            self.fail(key, "the vocabulary is incomplete", found, "a list")
        return found

    def bytes_of(self, token: str, key: str) -> bytes:
        try:
            return to_bytes(token)
        except ValueError:
            return self.fail(key, "not a byte-level token", token, "one character a byte")

    def fail(self, key: str, what: str, value: object, allowed: str) -> NoReturn:
        raise FileFormatError(what, file=self.path, field=_PREFIX + key, value=value, allowed=allowed)


def to_metadata(tokenizer: Tokenizer) -> dict[str, object]:
    """See `Tokenizer.gguf_metadata`."""
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, SentencePieceVocabulary):
        own = _sentencepiece(vocabulary)
    else:
        assert isinstance(vocabulary, ByteLevelVocabulary)
        own = _byte_level(vocabulary)
    roles = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "padding_token_id": tokenizer.pad_id,
        "unknown_token_id": tokenizer.specials.get("<unk>"),
        "eot_token_id": tokenizer.specials.get("<|eot_id|>", tokenizer.specials.get("<|eot|>")),
        "eom_token_id": tokenizer.specials.get("<|eom_id|>", tokenizer.specials.get("<|eom|>")),
    }
    own |= {key: number for key, number in roles.items() if number is not None}
    own |= {"add_bos_token": True, "add_eos_token": False}
    return {
        **{_PREFIX + key: value for key, value in own.items()},
        TEMPLATE_KEY: tokenizer.chat_template,
        FORMAT_KEY: tokenizer.chat_format,
    }


def _sentencepiece(vocabulary: SentencePieceVocabulary) -> dict[str, object]:
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in vocabulary.pieces],
        "scores": [piece.score for piece in vocabulary.pieces],
        "token_type": [int(piece.type) for piece in vocabulary.pieces],
        "add_space_prefix": vocabulary.drops_first_space,
    }


def _byte_level(vocabulary: ByteLevelVocabulary) -> dict[str, object]:
    tokens = [to_text(token) for token in vocabulary.table]
    types = [int(PieceType.NORMAL)] * len(tokens)
    for kind, named in ((PieceType.CONTROL, vocabulary.specials), (PieceType.USER_DEFINED, vocabulary.added)):
        for name, number in named.items():
            tokens[number], types[number] = name, int(kind)
    return {
        "model": "gpt2",
        "pre": GGUF_PRE_NAMES[vocabulary.pattern][0],
        "tokens": tokens,
        "token_type": types,
        "merges": merges_of(vocabulary.ranks) if vocabulary.merges is None else vocabulary.merges,
    }
