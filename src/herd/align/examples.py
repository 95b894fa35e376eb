"""What a fine-tuning step learns from: token ids with a mask, from dialogues and from pretraining text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING

from herd.align.dialogs import Dialog

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

Example = tuple[list[int], list[bool]]  # token ids, and which of them are to be learnt


def encode(tokenizer: Tokenizer, dialog: Dialog) -> Example:
    """Ids of a dialogue and its mask: the assistant's words and its end-of-turn tokens are to be learnt."""
    encoded = tokenizer.encode_dialog(dialog)
    return list(encoded.ids), list(encoded.supervised)


def rehearse(
    tokenizer: Tokenizer, texts: Iterable[str], beside: Sequence[Example], share: float, seq_len: int, seed: int
) -> list[Example]:
    """Pieces of documents, all tokens to be learnt, that make up `share` of all tokens together with `beside`.

    Documents come in an order drawn from the seed and are cut into pieces of up to a row; fewer texts give less."""
    budget = share / (1 - share) * sum(len(ids) for ids, _ in beside)
    documents = list(texts) if budget else []
    Random(f"herd rehearsal {seed}").shuffle(documents)
    pieces: list[Example] = []
    for text in documents:
        ids = tokenizer.encode_document(text)
        for start in range(0, len(ids) - 1, seq_len):
            if budget < 1:
                return pieces
            piece = ids[start : start + seq_len + 1]  # one id more than pairs: the last is only a target
            pieces.append((piece, [True] * len(piece)))
            budget -= len(piece)
    return pieces
