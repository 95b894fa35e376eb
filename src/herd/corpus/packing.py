"""Documents and dialogues packed into rows of equal length, as a pure function of (seed, step).

A document of n tokens (BOS, content, EOS) gives n - 1 pairs (token, next token). Only pairs are packed: EOS is always
a target and never an input, so no position is wasted on predicting across a border, and no label crosses one by
construction. A document that does not fit is cut; the second piece starts with the token at which the first stopped
predicting, without a new BOS: a BOS always means the true beginning of a document, in training as in use.

Rows are numbered through all epochs; batch `step` consists of rows step*B … step*B + B - 1. Each epoch orders the
documents anew and then its rows, so that the pieces of a long document do not share a batch. Nothing depends on
micro-batches or ranks: those take slices of the same rows.

B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from herd.corpus.order import permutation
from herd.corpus.shards import Ids, TokenShards
from herd.corpus.shuffle import shuffled
from herd.errors import HerdError, UsageError

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
T = TypeVar("T")
AnyInts = npt.NDArray[np.integer[Any]]

# What is drawn from the seed: documents' order, rows' order. Apart, or one would repeat the other.
_DOCUMENTS, _ROWS = 0, 1

LONGEST_TABLE = 1 << 20
"""Rows of an epoch whose order is kept as a table; the order of more is computed row by row."""


class Batch(NamedTuple):
    """Arrays [B, S]: int64 tokens and targets, int32 document_ids, float32 weights.

    Equal neighbours in document_ids are one document; numbers start at 0 in each row. Weight 0 marks targets that do
    not count: padding (which has a document id of its own) and, in dialogues, everything but the answers.
    """

    tokens: I64
    targets: I64
    document_ids: npt.NDArray[np.int32]
    weights: F32


class Piece(NamedTuple):
    """Consecutive tokens of one document: ids[:-1] are inputs, ids[1:] targets, with one weight per target or all 1."""

    ids: AnyInts
    weights: F32 | None


class RowSource(ABC):
    """An endless sequence of rows of pieces, turned into batches; subclasses say which pieces a row has."""

    def __init__(self, seq_len: int, batch_size: int, pad_id: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise UsageError("seq_len and batch_size must be positive", value=(seq_len, batch_size))
        self.seq_len, self.batch_size = seq_len, batch_size
        self.pad_id = pad_id

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or only `rows` of it (a rank's or a micro-batch's share)."""
        if step < 0:
            raise UsageError("a step is counted from 0", value=step)
        start, stop, stride = rows.indices(self.batch_size)
        return self._fill(range(step * self.batch_size + start, step * self.batch_size + stop, stride))

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what a step's rows are."""

    def rows(self, first: int, count: int) -> Batch:
        """Rows first … first + count - 1 of the endless sequence of rows, for batches whose size changes."""
        return self._fill(range(first, first + count))

    @abstractmethod
    def _pieces(self, numbers: range) -> Iterable[Iterable[Piece]]:
        """The pieces of each of these rows, in order; those of a row fit into it together."""

    def _fill(self, numbers: range) -> Batch:
        shape = (len(numbers), self.seq_len)
        tokens = np.full(shape, self.pad_id, dtype=np.int64)
        targets = np.full(shape, self.pad_id, dtype=np.int64)
        document_ids = np.zeros(shape, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        for b, pieces in enumerate(self._pieces(numbers)):
            at = count = 0
            for piece in pieces:
                end = at + len(piece.ids) - 1
                tokens[b, at:end] = piece.ids[:-1]
                targets[b, at:end] = piece.ids[1:]
                document_ids[b, at:end] = count
                weights[b, at:end] = 1.0 if piece.weights is None else piece.weights
                at, count = end, count + 1
            document_ids[b, at:] = count
        return Batch(tokens, targets, document_ids, weights)


class EpochRows(RowSource):
    """Rows numbered through epochs of equal length, each of which has the same pieces in an order of its own."""

    def __init__(self, seq_len: int, batch_size: int, seed: int, rows_per_epoch: int, pad_id: int) -> None:
        super().__init__(seq_len, batch_size, pad_id)
        self.seed, self.rows_per_epoch = seed, rows_per_epoch
        self._row_orders: dict[int, I64] = {}

    @property
    def last_pairs(self) -> int:
        """Pairs before the padding of the row that comes last before rows are put into their order."""
        return self.seq_len

    def place_of_last(self, epoch: int) -> int | None:
        """Where an epoch has that row; None where its order is not kept."""
        if self.rows_per_epoch > LONGEST_TABLE:
            return None
        return int(np.flatnonzero(self._row_order(epoch) == self.rows_per_epoch - 1)[0])

    def row(self, number: int) -> Iterator[Piece]:
        """The pieces of row `number` of the endless sequence."""
        epoch, place = divmod(number, self.rows_per_epoch)
        if self.rows_per_epoch > LONGEST_TABLE:
            row = shuffled(np.array([place]), self.rows_per_epoch, self.seed, epoch, _ROWS)[0]
        else:
            row = self._row_order(epoch)[place]
        return self._row(epoch, int(row))

    @abstractmethod
    def _row(self, epoch: int, row: int) -> Iterator[Piece]:
        """The pieces of a row of an epoch, before the rows are put into their order."""

    def _pieces(self, numbers: range) -> Iterator[Iterator[Piece]]:
        return map(self.row, numbers)

    def _row_order(self, epoch: int) -> I64:
        return _remember(self._row_orders, epoch, lambda: permutation(self.rows_per_epoch, self.seed, epoch, _ROWS))


def row_part(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """Places start … stop - 1 of a row as a row of their own; a piece that a border cuts goes on behind it."""
    at = 0
    for ids, weights in pieces:
        length = len(ids) - 1
        low, high = max(start - at, 0), min(stop - at, length)
        if low < high:
            yield Piece(ids[low : high + 1], None if weights is None else weights[low:high])
        at += length
        if at >= stop:
            return


class PackedDataset(EpochRows):
    """Pretraining batches from token shards.

    "concat" (as Llama 3 is trained) lays the documents of an epoch end to end and cuts the stream every `seq_len`
    pairs: no padding except in the last row, but documents are cut wherever a row ends. "best_fit" cuts only
    documents longer than a row, at multiples of `seq_len`, and fits the pieces into rows (Ding et al. 2024, "Fewer
    truncations improve language modeling"), at the price of some padding.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        packing: Literal["concat", "best_fit"] = "concat",
    ) -> None:
        self._shards = shards
        self._pairs: I64 = shards.lengths - 1
        self.pairs_per_epoch = int(self._pairs.sum())
        """Weighted targets in an epoch: every token of every document but its BOS."""
        self._slots: _Slots | None = None
        self._pieces_of_epoch: dict[int, I64] = {}
        self._streams: dict[int, tuple[I64, I64]] = {}
        if packing == "best_fit":
            self._documents, self._starts, lengths = _cut(self._pairs, seq_len)
            self._slots = _Slots(lengths, seq_len)
            rows = self._slots.n_rows
        elif packing == "concat":
            rows = -(-self.pairs_per_epoch // max(seq_len, 1))
        else:
            raise UsageError("unknown packing", value=packing, allowed="concat, best_fit")
        self._packing = packing
        super().__init__(seq_len, batch_size, seed, rows, shards.eos_id)

    @property
    def last_pairs(self) -> int:
        rest = self.pairs_per_epoch - (self.rows_per_epoch - 1) * self.seq_len
        return rest if self._packing == "concat" else self.seq_len

    def fingerprint(self) -> str:
        made_of = (self._shards.checksums, self._packing, self.seq_len, self.batch_size, self.seed)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def _row(self, epoch: int, row: int) -> Iterator[Piece]:
        slots = self._slots
        if slots is not None:
            dealt = _remember(self._pieces_of_epoch, epoch, lambda: slots.assign(self.seed, epoch))
            for piece, length in slots.row(row, dealt):
                start = int(self._starts[piece])
                yield Piece(self._slice(int(self._documents[piece]), start, length), None)
            return
        order, bounds = _remember(self._streams, epoch, lambda: self._stream(epoch))
        at, end = row * self.seq_len, min((row + 1) * self.seq_len, self.pairs_per_epoch)
        place = int(np.searchsorted(bounds, at, side="right")) - 1
        while at < end:
            stop = min(end, int(bounds[place + 1]))
            yield Piece(self._slice(int(order[place]), at - int(bounds[place]), stop - at), None)
            at, place = stop, place + 1

    def _stream(self, epoch: int) -> tuple[I64, I64]:
        """The epoch's order of documents, and where each one's pairs begin in it."""
        order = permutation(len(self._pairs), self.seed, epoch, _DOCUMENTS)
        return order, np.concatenate(([0], np.cumsum(self._pairs[order])))

    def _slice(self, document: int, start: int, length: int) -> Ids:
        whole = np.asarray(self._shards[document])  # slices of a memmap cost more than what they hold
        return whole[start : start + length + 1]


class PackedExamples(EpochRows):
    """Fine-tuning batches: whole examples in rows by best-fit decreasing. Made by `pack_examples`."""

    def __init__(
        self,
        examples: Sequence[tuple[AnyInts, F32]],
        seq_len: int,
        batch_size: int,
        seed: int,
        pad_id: int,
        dropped: int,
    ) -> None:
        self._examples = examples
        self.dropped = dropped
        """Examples that were longer than a row and left out (with too_long="drop")."""
        self._slots = _Slots(np.array([len(weights) for _, weights in examples], dtype=np.int64), seq_len)
        self._orders: dict[int, I64] = {}
        super().__init__(seq_len, batch_size, seed, self._slots.n_rows, pad_id)

    def fingerprint(self) -> str:
        state = hashlib.sha256(repr((self.seq_len, self.batch_size, self.seed, self.pad_id)).encode())
        for ids, weights in self._examples:
            state.update(len(ids).to_bytes(8) + np.asarray(ids, np.int64).tobytes() + weights.tobytes())
        return state.hexdigest()

    def _row(self, epoch: int, row: int) -> Iterator[Piece]:
        order = _remember(self._orders, epoch, lambda: self._slots.assign(self.seed, epoch))
        for example, _ in self._slots.row(row, order):
            yield Piece(*self._examples[example])


def pack_examples(
    examples: Sequence[tuple[Sequence[int] | AnyInts, Sequence[bool] | npt.NDArray[np.bool_]]],
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    *,
    pad_id: int = 0,
    too_long: Literal["error", "drop"] = "error",
) -> PackedExamples:
    """Pack examples (ids, supervised) into rows of `seq_len` pairs; no example is ever cut.

    `supervised[i]` says that token i is to be learnt: the target at position i - 1 then has weight 1, all others 0.
    An example needs len(ids) - 1 places. Raises HerdError for one that is longer than a row (or counts it as dropped),
    for masks of another length, and when no example with a supervised token is left.
    """
    kept: list[tuple[AnyInts, F32]] = []
    dropped = 0
    for number, (ids, supervised) in enumerate(examples):
        if len(ids) != len(supervised):
            raise HerdError(
                f"example {number} has {len(ids)} tokens and a mask of {len(supervised)}", allowed="equal lengths"
            )
        if len(ids) - 1 > seq_len:
            if too_long == "error":
                raise HerdError(
                    f"example {number} is longer than a row",
                    value=f"{len(ids)} tokens",
                    allowed=f"up to seq_len + 1 = {seq_len + 1} tokens",
                    fix='raise seq_len, or leave such examples out with too_long="drop"',
                )
            dropped += 1
            continue
        weights = np.asarray(supervised, dtype=np.float32)[1:]
        if weights.any():
            kept.append((np.asarray(ids, dtype=np.int64), weights))
    if not kept:
        raise HerdError(
            "no example is left to train on",
            value=f"{len(examples)} examples, {dropped} too long",
            allowed="at least one example with a supervised token",
        )
    return PackedExamples(kept, seq_len, batch_size, seed, pad_id, dropped)


class _Slots:
    """A fixed best-fit plan over lengths; each epoch deals the pieces of one length anew among its slots.

    The plan depends on the lengths alone, so every epoch has the same number of rows, and any step can be computed
    without the ones before.
    """

    def __init__(self, lengths: I64, capacity: int) -> None:
        # Longest first; slot s holds a piece of length self._lengths[s].
        self._by_length = np.argsort(-lengths, kind="stable")
        self._lengths = lengths[self._by_length]
        row_of, self.n_rows = best_fit(self._lengths, capacity)
        self._slots = np.argsort(row_of, kind="stable")
        self._bounds = np.searchsorted(row_of[self._slots], np.arange(self.n_rows + 1))

    def assign(self, seed: int, epoch: int) -> I64:
        """piece[s]: which piece is in slot s in this epoch."""
        shuffled = permutation(len(self._lengths), seed, epoch, _DOCUMENTS)
        return self._by_length[shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]]

    def row(self, row: int, pieces: I64) -> Iterator[tuple[int, int]]:
        """(piece, length) of a row."""
        for slot in self._slots[self._bounds[row] : self._bounds[row + 1]]:
            yield int(pieces[slot]), int(self._lengths[slot])


def best_fit(lengths: I64, capacity: int) -> tuple[I64, int]:
    """Put items, in the order given, each into the fullest row with room: (row of each item, number of rows).

    On lengths in decreasing order this is best-fit decreasing, at most 11/9 of the optimal number of rows + 1
    (Johnson 1974). Items must be at most `capacity` long. Bit c of `free` says that some row has room c.
    """
    rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    row_of = np.empty(len(lengths), dtype=np.int64)
    free = n_rows = 0
    for item, length in enumerate(lengths.tolist()):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows[room].pop()
            if not rows[room]:
                free ^= 1 << room
        else:
            room, row = capacity, n_rows
            n_rows += 1
        row_of[item] = row
        rest = room - length
        if rest:
            rows[rest].append(row)
            free |= 1 << rest
    return row_of, n_rows


def _cut(pairs: I64, seq_len: int) -> tuple[I64, I64, I64]:
    """Pieces of at most seq_len pairs: document, first pair and length of each."""
    counts = -(-pairs // seq_len)
    documents = np.repeat(np.arange(len(pairs)), counts)
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * seq_len
    return documents, starts, np.minimum(pairs[documents] - starts, seq_len)


def _remember(cache: dict[int, T], epoch: int, make: Callable[[], T]) -> T:
    """Two epochs at most: a batch can straddle their border."""
    if epoch not in cache:
        while len(cache) > 1:
            del cache[next(iter(cache))]
        cache[epoch] = make()
    return cache[epoch]
