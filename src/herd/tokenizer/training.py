"""Training a byte-level vocabulary: the `tokenizers` library counts and merges, the result is written as ranks.

Byte pair encoding (Sennrich et al. 2016) over the pieces of Llama 3's split pattern: the most frequent pair of
neighbours becomes a token, again and again. Ranks are ids in order of merging, after the 256 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from herd.errors import HerdError, UsageError
from herd.tokenizer.bytechars import BYTE_ORDER, to_bytes, to_text
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.specials import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIALS,
    N_LLAMA3_SPECIALS,
    SMALLEST_CHAT_SPECIALS,
    numbered,
)
from herd.tokenizer.tokenizer import Tokenizer
from herd.tokenizer.vocabulary import well_formed


def train(texts: Iterable[str], vocab_size: int, n_specials: int | None) -> Tokenizer:
    """See `herd.tokenizer.train`."""
    if n_specials is None:
        n_specials = max(SMALLEST_CHAT_SPECIALS, min(N_LLAMA3_SPECIALS, vocab_size // 16, vocab_size - 256))
    if not SMALLEST_CHAT_SPECIALS <= n_specials <= N_LLAMA3_SPECIALS:
        raise UsageError(
            "wrong number of special tokens",
            value=n_specials,
            allowed=f"{SMALLEST_CHAT_SPECIALS} (what the chat format needs) to {N_LLAMA3_SPECIALS}",
        )
    if vocab_size < 256 + n_specials:
        raise UsageError(
            "the vocabulary is smaller than the 256 bytes and the special tokens",
            value=vocab_size,
            allowed=f"at least {256 + n_specials} with {n_specials} special tokens",
        )
    ranks = _merge(texts, vocab_size - n_specials)
    specials = numbered(LLAMA3_SPECIALS, len(ranks), n_specials)
    return Tokenizer(ByteLevelVocabulary(ranks, LLAMA3_PATTERN, specials))


def _merge(texts: Iterable[str], n_ranks: int) -> dict[bytes, int]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = [to_text(bytes([byte])) for byte in BYTE_ORDER]
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator(map(well_formed, texts), trainer)
    vocabulary: dict[str, int] = trainee.get_vocab(with_added_tokens=False)
    merged = sorted((number, token) for token, number in vocabulary.items())
    if len(merged) < n_ranks:
        raise HerdError(
            f"the texts give only {len(merged):,} tokens besides the special ones: every piece is one token by then",
            value=f"{n_ranks:,} wanted",
            allowed=f"at most {len(merged):,} from these texts",
            fix="lower vocab_size or give more text",
        )
    return {to_bytes(token): rank for rank, (_, token) in enumerate(merged)}
