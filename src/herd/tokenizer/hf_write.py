"""Write `tokenizer.json` and `tokenizer_config.json`, so that transformers and all that builds on it give equal ids.

One difference is theirs and stays: those tools look for special tokens in content too. Herd never does.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from herd.tokenizer.bytechars import merges_of, to_text
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.pieces import SPACE, SentencePieceVocabulary
from herd.tokenizer.spmodel import PieceType

if TYPE_CHECKING:
    from herd.tokenizer.tokenizer import Tokenizer

# The key in tokenizer_config.json under which Herd finds its chat format again; other tools ignore it.
FORMAT_KEY = "herd_chat_format"


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The content of tokenizer.json; encoding with special tokens puts the beginning-of-text token first."""
    vocabulary = tokenizer.vocabulary
    bos = _name(tokenizer, tokenizer.bos_id)
    if isinstance(vocabulary, ByteLevelVocabulary):
        return bytelevel_json(vocabulary, bos=(bos, tokenizer.bos_id))
    assert isinstance(vocabulary, SentencePieceVocabulary)
    return _metaspace_json(vocabulary, bos=(bos, tokenizer.bos_id))


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": _name(tokenizer, tokenizer.bos_id),
        "eos_token": _name(tokenizer, tokenizer.eos_id),
        "pad_token": _name(tokenizer, tokenizer.pad_id),
        "chat_template": tokenizer.chat_template,
        FORMAT_KEY: tokenizer.chat_format,
    }
    if "<unk>" in tokenizer.specials:
        config["unk_token"] = "<unk>"
    return config


def bytelevel_json(
    vocabulary: ByteLevelVocabulary, *, bos: tuple[str, int] | None = None, with_specials: bool = True
) -> str:
    """tokenizer.json of a byte-level vocabulary; without its specials, text can only become content."""
    return _json(
        added=_added(vocabulary.specials, vocabulary.added) if with_specials else [],
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": vocabulary.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        decoder=_byte_level(),
        bos=bos,
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.whole_words_first,
            "vocab": {to_text(token): rank for token, rank in vocabulary.ranks.items()},
            "merges": merges_of(vocabulary.ranks) if vocabulary.merges is None else vocabulary.merges,
        },
    )


def _metaspace_json(vocabulary: SentencePieceVocabulary, *, bos: tuple[str, int]) -> str:
    types = [piece.type for piece in vocabulary.pieces]
    user = {p.text: i for i, p in enumerate(vocabulary.pieces) if types[i] is PieceType.USER_DEFINED}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = vocabulary.drops_first_space
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _json(
        added=_added(vocabulary.specials, user),
        normalizer={
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), spaces],
        },
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        bos=bos,
        model={
            "unk_token": next(p.text for p in vocabulary.pieces if p.type is PieceType.UNKNOWN),
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": [f"{left} {right}" for left, right in vocabulary.merges()],
        },
    )


def _json(
    *,
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    bos: tuple[str, int] | None,
    model: dict[str, Any],
) -> str:
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else _beginning(*bos),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _added(specials: dict[str, int], content: dict[str, int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [(number, name, True) for name, number in specials.items()]
    tokens += [(number, name, False) for name, number in content.items()]
    return [{"id": number, "content": name, **flags, "special": special} for number, name, special in sorted(tokens)]


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _beginning(name: str, number: int) -> dict[str, Any]:
    def first(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": type_id}}, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": first("A", 0),
        "pair": [*first("A", 0), *first("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode()
