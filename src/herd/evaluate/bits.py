"""Bits per byte: how many bits a model needs for each byte of text it has not seen. Independent of the tokenizer.

    bits per byte = -Σ log2 p(token | what stands before it) / Σ bytes

BOS is given, not predicted; EOS counts as a token and not as a byte, as in `herd.corpus.EvaluationWindows`, so that the
figure is a complete code of the documents. A document longer than the context is scored in windows; each further one
repeats at least `overlap` tokens of what came before, and every token counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from herd.errors import UsageError
from herd.progress import track

if TYPE_CHECKING:
    from herd.engine import LLM

_CHUNK_BYTES = 100_000  # text given to the model at once: enough to fill its batches, small enough to show progress


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """The figure over all documents, with what it is made of. nats: the sum of -ln p."""

    bits_per_byte: float
    nats: float
    tokens: int
    bytes: int
    documents: int
    context: int
    overlap: int

    @property
    def nats_per_token(self) -> float:
        """The loss in the unit that training reports."""
        return self.nats / self.tokens


def bits_per_byte(model: LLM, documents: Sequence[str], *, overlap: int | None = None) -> BitsPerByte:
    """Score the documents. overlap: tokens that each further window repeats (None: half the context).

    Empty documents are skipped. Raises UsageError if there is no text or `overlap` is not below the context."""
    texts = [text for text in documents if text]
    if not texts:
        raise UsageError("there is no text to score", value=len(documents), allowed="at least one document with text")
    overlap = model.context // 2 if overlap is None else overlap
    if not 1 <= overlap < model.context:
        raise UsageError("overlap is out of range", value=overlap, allowed=f"1 to {model.context - 1}")
    nats, tokens, size = 0.0, 0, 0
    chunks = list(_chunks(texts))
    for chunk in track(chunks, label="bits per byte"):
        for scored in model.score([model.tokenizer.encode_document(text) for text in chunk], overlap=overlap):
            nats -= math.fsum(scored.logprobs)
            tokens += len(scored.logprobs)
        size += sum(len(text.encode()) for text in chunk)
    return BitsPerByte(nats / math.log(2) / size, nats, tokens, size, len(texts), model.context, overlap)


def first_documents(documents: Sequence[str], limit: int | None) -> list[str]:
    """Whole documents from the start until `limit` bytes are reached or passed; None: all of them."""
    if limit is None:
        return list(documents)
    chosen: list[str] = []
    size = 0
    for text in documents:
        if size >= limit:
            break
        chosen.append(text)
        size += len(text.encode())
    return chosen


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
