"""Held-out documents as windows, so that every token is scored exactly once and bits per byte can be computed.

bits per byte = sum of -log2 p(token) over all tokens / UTF-8 bytes of the text. The EOS of each document counts as a
token and not as a byte: a compressor, too, must say where a document ends. BOS is given, not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from herd.corpus.packing import I64, Batch, best_fit
from herd.corpus.shards import TokenShards
from herd.errors import HerdError, UsageError


class EvaluationBatch(NamedTuple):
    """A `Batch`, and for each position the number of its document in the shards (-1 for padding) [B, S]."""

    batch: Batch
    documents: npt.NDArray[np.int32]


class EvaluationWindows:
    """Windows over whole documents, several short ones to a row.

    A document of up to `seq_len` pairs is one window. A longer one has windows of `seq_len` pairs that begin `stride`
    pairs after each other, each scoring what the one before did not: with stride = seq_len / 2 (the default) every
    token but the first ones of a document has at least seq_len / 2 tokens of context. `only`: the numbers of the
    documents to score, each once, instead of all.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        batch_size: int,
        stride: int | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        stride = max(seq_len // 2, 1) if stride is None else stride
        if seq_len < 1 or batch_size < 1 or not 1 <= stride <= seq_len:
            raise UsageError(
                "seq_len, batch_size and stride do not fit", value=(seq_len, batch_size, stride), allowed="1 to seq_len"
            )
        self._shards, self.seq_len, self.batch_size = shards, seq_len, batch_size
        chosen = list(range(len(shards.lengths)) if only is None else only)
        self.n_bytes = int(shards.text_bytes[chosen].sum())
        """UTF-8 bytes of all documents: the denominator of bits per byte."""
        self.n_targets = int((shards.lengths[chosen] - 1).sum())
        """Tokens that are scored."""
        self._windows = [
            (document, start, end, scored)
            for document, pairs in zip(chosen, (shards.lengths[chosen] - 1).tolist(), strict=True)
            for start, end, scored in _windows(pairs, seq_len, stride)
        ]
        lengths = np.array([end - start for _, start, end, _ in self._windows], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        row_of, n_rows = best_fit(lengths[order], seq_len)
        self._rows: list[list[int]] = [[] for _ in range(n_rows)]
        for window, row in zip(order.tolist(), row_of.tolist(), strict=True):
            self._rows[row].append(window)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._rows) // self.batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for first in range(0, len(self._rows), self.batch_size):
            yield self._fill(self._rows[first : first + self.batch_size])

    def _fill(self, rows: Sequence[Sequence[int]]) -> EvaluationBatch:
        shape = (len(rows), self.seq_len)
        tokens: I64 = np.full(shape, self._shards.eos_id, dtype=np.int64)
        targets: I64 = tokens.copy()
        document_ids = np.zeros(shape, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        documents = np.full(shape, -1, dtype=np.int32)
        for b, row in enumerate(rows):
            at = 0
            for count, window in enumerate(row):
                document, start, end, scored = self._windows[window]
                ids = self._shards.slice(document, start, end + 1)
                stop = at + end - start
                tokens[b, at:stop] = ids[:-1]
                targets[b, at:stop] = ids[1:]
                document_ids[b, at:stop] = count
                weights[b, at + scored - start : stop] = 1.0
                documents[b, at:stop] = document
                at = stop
            document_ids[b, at:] = len(row)
        return EvaluationBatch(Batch(tokens, targets, document_ids, weights), documents)

    def bits_per_byte(self, nll: float) -> float:
        """Bits per byte of a total negative log-likelihood in nats, summed over all weighted targets."""
        if not math.isfinite(nll):
            raise HerdError("the likelihood of the held-out text is not a finite number", value=nll)
        return nll / math.log(2) / self.n_bytes


def _windows(pairs: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first pair, end, first scored pair) of each window of a document."""
    scored = start = 0
    while scored < pairs:
        end = min(start + seq_len, pairs)
        yield start, end, scored
        scored, start = end, start + stride
