"""A vocabulary with Code Llama's marks for infilling, where it has none."""

from __future__ import annotations

from herd.errors import UsageError
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.tokenizer import Tokenizer

MARKS = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")
N_IDS = 16
"""Ids that Code Llama added to Llama 2's 32,000: the marks, and reserved ones, so that matrices divide evenly."""


def with_infilling(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary and sixteen more control tokens behind it, four of them the marks; itself if it has them.

    Raises UsageError for a SentencePiece vocabulary, whose Code Llama form is to be had as a file.
    """
    if MARKS[0] in tokenizer.specials:
        return tokenizer
    vocabulary = tokenizer.vocabulary
    if not isinstance(vocabulary, ByteLevelVocabulary):
        raise UsageError(
            "marks for infilling cannot be added to a SentencePiece vocabulary",
            allowed="a byte-level vocabulary, or one that has the marks",
            fix="use the tokenizer.model of a Code Llama",
        )
    names = [*MARKS, *(f"<|infilling_reserved_{i}|>" for i in range(N_IDS - len(MARKS)))]
    more = {name: tokenizer.vocab_size + i for i, name in enumerate(names)}
    wider = ByteLevelVocabulary(
        vocabulary.ranks,
        vocabulary.pattern,
        {**vocabulary.specials, **more},
        added=vocabulary.added,
        merges=vocabulary.merges,
        whole_words_first=vocabulary.whole_words_first,
    )
    return Tokenizer(wider, tokenizer.chat_format, source_template=tokenizer.source_template)
