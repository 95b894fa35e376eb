"""Read `tokenizer.json`, the file of the Hugging Face `tokenizers` library, for the two shapes Llamas come in.

* byte-level: split pattern, then bytes as printable characters, merges over those (Llama 3 and 4);
* metaspace: `▁` for spaces, merges over characters, byte fallback (Llama 1, 2, Code Llama as converted).

Anything else in the file (other patterns, normalisers, models) changes ids, so it is an error and not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from herd.errors import FileFormatError, HerdError
from herd.tokenizer.bytechars import ranks_say_the_same, to_bytes
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.pieces import SPACE, SentencePieceVocabulary
from herd.tokenizer.specials import CONTROLS, LLAMA3_PATTERN, LLAMA4_PATTERN
from herd.tokenizer.spmodel import Piece, PieceType
from herd.tokenizer.vocabulary import MAX_TOKEN, Vocabulary


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json. Raises `FileFormatError` naming the field that is not a Llama's."""
    return _Reader(path).vocabulary()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # `read_json`'s search for repeated keys would take as long as everything else; a repeated token shows
            # up below as a gap in the ids.
            self.data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"not a JSON file ({error})", file=path) from None
        model = self.mapping(self.data, "model")
        if model.get("type", "BPE") != "BPE":
            self.fail("model.type", model.get("type"), "BPE")
        self.model = model
        self.ids = self.mapping(model, "vocab")
        for token, number in self.ids.items():
            if type(number) is not int or number < 0:
                self.fail(f"model.vocab[{token!r}]", number, "an id")
            if len(token) > MAX_TOKEN:
                self.fail("model.vocab", token, f"tokens of at most {MAX_TOKEN:,} characters")
        self.merges = self.read_merges(model.get("merges"))
        self.special, self.added = self.read_added()

    def vocabulary(self) -> Vocabulary:
        steps = self.steps("pre_tokenizer", "pretokenizers")
        try:
            if self.model.get("byte_fallback"):
                return self.metaspace(steps)
            return self.byte_level(steps)
        except FileFormatError:
            raise
        except HerdError as error:
            raise FileFormatError(str(error), file=self.path, field="model.vocab") from None

    def byte_level(self, steps: list[dict[str, Any]]) -> ByteLevelVocabulary:
        if self.steps("normalizer", "normalizers"):
            self.fail("normalizer", self.data["normalizer"], "null")
        kinds = [step.get("type") for step in steps]
        if kinds != ["Split", "ByteLevel"]:
            self.fail("pre_tokenizer", kinds, "Split by the pattern of Llama 3 or 4, then ByteLevel")
        pattern = steps[0].get("pattern")
        pattern = pattern.get("Regex") if isinstance(pattern, dict) else pattern
        if pattern not in (LLAMA3_PATTERN, LLAMA4_PATTERN):
            self.fail("pre_tokenizer.pattern", pattern, "the split pattern of Llama 3 or 4")
        if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
            self.fail("pre_tokenizer.behavior", steps[0].get("behavior"), "Isolated, not inverted")
        if steps[1].get("add_prefix_space", True) or steps[1].get("use_regex", True):
            self.fail("pre_tokenizer.ByteLevel", steps[1], "add_prefix_space and use_regex false")

        others = self.special.keys() | self.added.keys()
        ranks = {token: number for token, number in self.ids.items() if token not in others}
        by_bytes = {self.bytes_of(token): number for token, number in ranks.items()}
        whole_words_first = bool(self.model.get("ignore_merges", False))
        if whole_words_first and ranks_say_the_same(ranks, self.merges):
            return ByteLevelVocabulary(by_bytes, pattern, self.special, added=self.added)
        if self.added:
            self.fail(
                "added_tokens", next(iter(self.added)), "special tokens only, where merges are not those of ranks"
            )
        for pair in self.merges:
            if pair[0] not in ranks or pair[1] not in ranks or "".join(pair) not in ranks:
                self.fail("model.merges", " ".join(pair), "pairs of tokens that together are a token")
        merges = list(map(" ".join, self.merges))
        return ByteLevelVocabulary(by_bytes, pattern, self.special, merges=merges, whole_words_first=whole_words_first)

    def metaspace(self, steps: list[dict[str, Any]]) -> SentencePieceVocabulary:
        unknown = self.model.get("unk_token") or "<unk>"
        by_id: dict[int, str] = {number: token for token, number in self.ids.items()}
        by_id |= {number: token for token, number in (self.special | self.added).items()}
        if sorted(by_id) != list(range(len(by_id))):
            self.fail(
                "model.vocab", f"{len(by_id)} tokens, last id {max(by_id, default=-1)}", "ids 0 to n-1, each once"
            )

        def kind(token: str) -> PieceType:
            if token == unknown:
                return PieceType.UNKNOWN
            if token in self.special or token in CONTROLS:
                return PieceType.CONTROL
            if token in self.added:
                return PieceType.USER_DEFINED
            return PieceType.BYTE if len(token) == 6 and token.startswith("<0x") else PieceType.NORMAL

        types = {token: kind(token) for token in by_id.values()}
        scores = self.scores(types)
        pieces = [Piece(by_id[i], scores.get(by_id[i], 0.0), types[by_id[i]]) for i in range(len(by_id))]
        return SentencePieceVocabulary(pieces, self.dummy_prefix(steps))

    def scores(self, types: Mapping[str, PieceType]) -> dict[str, float]:
        """Scores that merge in the order of the list: Llama's own (first normal id minus id) where ids follow it."""
        normal = {token: self.ids[token] for token, kind in types.items() if kind is PieceType.NORMAL}
        first = min(normal.values(), default=0)
        scores: dict[str, float] = {}
        lowest = 1.0
        # Code Llama's list builds up its marks ("▁<PRE" and ">"); text must not become one.
        merges = [pair for pair in self.merges if types.get("".join(pair)) is not PieceType.CONTROL]
        for left, right in merges:
            token = left + right
            if token not in normal or left not in normal or right not in normal:
                self.fail("model.merges", [left, right], "pairs of tokens that together are a token")
            if token not in scores:
                own = float(first - normal[token])
                scores[token] = lowest = own if own < lowest else lowest - 1
            elif scores[token] != lowest:
                self.fail("model.merges", [left, right], "all merges that make the same token in one place")
        possible = sum(t[:i] in normal and t[i:] in normal for t in normal for i in range(1, len(t)))
        if possible != len(set(merges)):
            self.fail("model.merges", f"{len(merges)} merges", f"the {possible} that the vocabulary allows")
        return {token: float(first - number) for token, number in normal.items()} | scores

    def dummy_prefix(self, steps: list[dict[str, Any]]) -> bool:
        """Whether a `▁` goes before the text. The file says it as a normaliser (old) or a pre-tokenizer (new)."""
        normalizers = self.steps("normalizer", "normalizers")
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        if not steps and normalizers in ([replaces], [{"type": "Prepend", "prepend": SPACE}, replaces]):
            return len(normalizers) == 2
        if not normalizers and [step.get("type") for step in steps] == ["Metaspace"]:
            step = steps[0]
            if step.get("replacement") != SPACE or step.get("split", False):
                self.fail("pre_tokenizer", step, f"replacement {SPACE} without split")
            default = "always" if step.get("add_prefix_space", True) else "never"
            return bool(step.get("prepend_scheme", default) != "never")
        return self.fail("normalizer", self.data.get("normalizer"), f"Prepend {SPACE} and Replace, or Metaspace")

    def read_merges(self, merges: object) -> list[tuple[str, str]]:
        """Pairs, written "left right" in older files and ["left", "right"] in newer ones."""
        if not isinstance(merges, list):
            self.fail("model.merges", merges, "a list")
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else _items(merge)) for merge in merges]
        for index, pair in enumerate(pairs):
            if len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
                self.fail(f"model.merges[{index}]", merges[index], "two tokens")
        return pairs

    def read_added(self) -> tuple[dict[str, int], dict[str, int]]:
        """Control tokens, and added tokens that text may match."""
        special: dict[str, int] = {}
        added: dict[str, int] = {}
        entries = self.data.get("added_tokens") or []
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            where = f"added_tokens[{index}]"
            name, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
            if not isinstance(name, str) or not name or type(number) is not int:
                self.fail(where, entry, '{"id": …, "content": …, "special": …}')
            if self.ids.get(name, number) != number or name in special or name in added:
                self.fail(where, entry, "one id for one token")
            try:
                name.encode()
            except UnicodeEncodeError:
                self.fail(where, name, "Unicode text")
            (special if entry.get("special") or name in CONTROLS else added)[name] = number
        return special, added

    def bytes_of(self, token: str) -> bytes:
        try:
            return to_bytes(token)
        except ValueError:
            return self.fail("model.vocab", token, "byte-level tokens, one character a byte")

    def steps(self, field: str, inner: str) -> list[dict[str, Any]]:
        """A step of the pipeline as a list: absent, alone or a Sequence."""
        step = self.data.get(field)
        if step is None:
            return []
        if isinstance(step, dict):
            found = step.get(inner) if step.get("type") == "Sequence" else [step]
            if isinstance(found, list) and all(isinstance(item, dict) for item in found):
                return found
        return self.fail(field, step, "an object")

    def mapping(self, data: object, key: str) -> dict[str, Any]:
        found = data.get(key) if isinstance(data, dict) else None
        if not isinstance(found, dict):
            self.fail(key, found, "an object")
        return found

    def fail(self, field: str, value: object, allowed: str) -> NoReturn:
        raise FileFormatError(
            "this tokenizer.json is not a Llama's", file=self.path, field=field, value=value, allowed=allowed
        )


def _items(merge: object) -> list[Any]:
    return merge if isinstance(merge, list) else []
