"""Special tokens and split patterns of every Llama generation, as data.

Sources: meta-llama/llama3 `llama/tokenizer.py` (April 2024: the first Llama 3), meta-llama/llama-models
`models/llama3/tokenizer.py` (3.1 and later) and `models/llama4/tokenizer.py`. A name's position in its list is its
distance from the first special id, which follows the last rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from herd.errors import HerdError

# How text is cut into pieces before byte pairs are merged. Each piece is merged on its own.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LLAMA4_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GGUF names the split pattern in `tokenizer.ggml.pre`; the first name of each row is the one we write.
GGUF_PRE_NAMES = {
    LLAMA3_PATTERN: ("llama-bpe", "llama3", "llama-v3"),
    LLAMA4_PATTERN: ("llama4", "gpt-4o"),
}

N_LLAMA3_SPECIALS = 256
N_LLAMA4_RANKS, N_LLAMA4_SPECIALS = 200_000, 2048

SMALLEST_CHAT_SPECIALS = 11  # Llama 3's list up to and with <|python_tag|>


def _reserved(prefix: str, first: int, count: int) -> list[str]:
    return [f"<|{prefix}reserved_special_token_{i}|>" for i in range(first, first + count)]


def _llama3(names: list[str], first_reserved: int) -> tuple[str, ...]:
    return tuple(names + _reserved("", first_reserved, N_LLAMA3_SPECIALS - len(names)))


# April 2024: no padding, no end-of-message, no tools.
LLAMA3_0_SPECIALS = _llama3(
    [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *_reserved("", 0, 4),
        "<|start_header_id|>",
        "<|end_header_id|>",
        *_reserved("", 4, 1),
        "<|eot_id|>",
    ],
    first_reserved=5,
)

# 3.1, 3.2 and 3.3: the same ids, four of the reserved ones named.
LLAMA3_SPECIALS = _llama3(
    [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *_reserved("", 0, 2),
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
    ],
    first_reserved=2,
)

LLAMA4_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    # text post-training, 200005 to 200079
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    *_reserved("text_post_train_", 0, 6),
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    *_reserved("text_post_train_", 8, 61),
    # vision, 200080 to 201133
    "<|image_start|>",
    "<|image_end|>",
    *_reserved("vision_", 0, 2),
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    *_reserved("vision_", 2, 4),
    "<|image|>",
    *_reserved("vision_", 6, 1),
    "<|patch|>",
    *_reserved("vision_", 7, 1041),
    # reasoning, 201134 to 201143
    *_reserved("reasoning_", 0, 8),
    "<|reasoning_thinking_start|>",
    "<|reasoning_thinking_end|>",
    *_reserved("", 0, 904),
)

# Code Llama's added pieces: infilling marks and the turn mark of the 70B.
_CODE_LLAMA_CONTROLS = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<step>")

CONTROLS = frozenset([*LLAMA3_0_SPECIALS, *LLAMA3_SPECIALS, *LLAMA4_SPECIALS, *_CODE_LLAMA_CONTROLS])
"""Control tokens whatever type or flag a file gives them: no content may become one."""

# Which special token plays which part: the first name of a row that the vocabulary has.
_BOS = ("<|begin_of_text|>", "<s>")
_EOS = ("<|end_of_text|>", "</s>")
# Llama 2 and the first Llama 3 have no padding token. We take one that no text or model produces: <unk>, or the
# reserved token that 3.1 later made its padding. Never end-of-text, which training must be able to learn.
_PAD = ("<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<|reserved_special_token_2|>", "<unk>")
_STOPS = (*_EOS, "<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>", "<step>", "▁<EOT>")


class SpecialRoles(NamedTuple):
    """The ids that training and generation need."""

    bos: int
    eos: int
    pad: int
    stops: frozenset[int]


def special_roles(specials: Mapping[str, int]) -> SpecialRoles:
    """Find beginning, end, padding and stop tokens among the specials; `HerdError` without the first two."""
    bos = next((specials[name] for name in _BOS if name in specials), None)
    eos = next((specials[name] for name in _EOS if name in specials), None)
    if bos is None or eos is None:
        raise HerdError(
            "the vocabulary has no token for the beginning or the end of a text, so it is not a Llama vocabulary",
            value=", ".join(list(specials)[:8]) or "no special tokens",
            allowed=f"one of {', '.join(_BOS)} and one of {', '.join(_EOS)}",
        )
    pad = next((specials[name] for name in _PAD if name in specials), eos)
    return SpecialRoles(bos, eos, pad, frozenset(specials[name] for name in _STOPS if name in specials))


def numbered(names: tuple[str, ...], first_id: int, count: int) -> dict[str, int]:
    """The first `count` names of a list with their ids."""
    return {name: first_id + i for i, name in enumerate(names[:count])}
