"""Rows from several sources in given shares, as a pure function of (seed, number of the row).

Which source a row comes from is `Shares`' rule. A source's rows are those of its own epochs, each in a new order:
up-sampling a source is nothing but going through more of its epochs. Rows may become longer or shorter on the way, and
shares may change: a run is a list of stretches, and where a source stands at the beginning of one is computed from the
stretches before, so there is nothing to remember.

Sources are packed into rows of the longest length that the run will have; a shorter row is a part of such a row, and
the parts follow each other. So the text of an epoch does not depend on when lengths change. Where rows become longer, a
source that stands inside a row of the new length goes on behind it: less than one row of each source is left out.

K sources.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from herd.corpus import packing
from herd.corpus.packing import I64, EpochRows, Piece, RowSource, row_part
from herd.corpus.shares import Shares
from herd.errors import UsageError


@dataclass(frozen=True)
class Stretch:
    """From row `first` on: rows of `seq_len` pairs, from the sources in these shares (weights by name; others 0)."""

    first: int
    seq_len: int
    weights: Mapping[str, float]


class _Track:
    """A source's epochs as rows of any length that divides its own: row numbers, and places in pairs of an epoch.

    Of an epoch's last row only what has text is taken. (Where the order of the rows is not kept, all of it: one row
    in a million.)
    """

    def __init__(self, rows: EpochRows) -> None:
        self._rows, self._whole = rows, rows.seq_len
        self._places: dict[int, int | None] = {}

    def per_epoch(self, length: int) -> int:
        """Rows of `length` pairs in an epoch."""
        return self._rows.rows_per_epoch * (self._whole // length) - self._missing(length)

    def locate(self, row: int, length: int) -> tuple[int, int]:
        """(epoch, pairs of the epoch before the row)."""
        epoch, row = divmod(row, self.per_epoch(length))
        last = self._place(epoch)
        if last is not None and row * length >= last * self._whole + self._filled(length) * length:
            row += self._missing(length)
        return epoch, row * length

    def number(self, epoch: int, place: int, length: int) -> int:
        """The first row of `length` pairs that begins at or behind a place of an epoch."""
        row, last = -(-place // length), self._place(epoch)
        if last is not None:
            begin = last * (self._whole // length)
            row -= min(max(row - begin - self._filled(length), 0), self._missing(length))
        return epoch * self.per_epoch(length) + row

    def pieces(self, row: int, length: int) -> Iterator[Piece]:
        """What a row of `length` pairs has."""
        epoch, place = self.locate(row, length)
        number, start = divmod(place, self._whole)
        return row_part(self._rows.row(epoch * self._rows.rows_per_epoch + number), start, start + length)

    def _filled(self, length: int) -> int:
        """Rows of `length` pairs that the last row gives."""
        return -(-self._rows.last_pairs // length)

    def _missing(self, length: int) -> int:
        if self._rows.rows_per_epoch > packing.LONGEST_TABLE:
            return 0
        return self._whole // length - self._filled(length)

    def _place(self, epoch: int) -> int | None:
        if epoch not in self._places:
            if len(self._places) > 1:  # a batch can straddle the border of two epochs
                del self._places[next(iter(self._places))]
            self._places[epoch] = self._rows.place_of_last(epoch)
        return self._places[epoch]


class _Begun(NamedTuple):
    """A stretch, and how many rows of its length each source has before it."""

    first: int
    seq_len: int
    shares: Shares
    starts: list[int]

    def numbers(self, row: int) -> list[int]:
        """Each source's number of the row that it gives next, at `row` of this stretch."""
        counts = self.shares.before(row - self.first)
        return [start + count for start, count in zip(self.starts, counts, strict=True)]


class Mixture:
    """Where every row comes from. `sources` by name, all packed into rows of one length, of which `stretches`' are
    whole parts. Raises UsageError for stretches that do not follow each other or name no source."""

    def __init__(self, sources: Mapping[str, EpochRows], stretches: Sequence[Stretch], seed: int) -> None:
        lengths = {rows.seq_len for rows in sources.values()}
        if len(lengths) != 1:
            raise UsageError("sources must be packed into rows of one length", value=sorted(lengths))
        self.names, self._sources, self._seed = list(sources), list(sources.values()), seed
        self._tracks = [_Track(rows) for rows in self._sources]
        self.row_pairs = lengths.pop()
        """Pairs of a source's own row."""
        self._stretches = list(stretches)
        firsts = [stretch.first for stretch in stretches]
        if not firsts or firsts[0] != 0 or any(a >= b for a, b in itertools.pairwise(firsts)):
            raise UsageError("stretches must begin at row 0 and after one another", value=firsts)
        self._begun: list[_Begun] = []
        for number, stretch in enumerate(stretches):
            self._begun.append(self._begin(number, stretch))

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what a row is."""
        stretches = [(s.first, s.seq_len, sorted(s.weights.items())) for s in self._stretches]
        sources = [(name, rows.fingerprint()) for name, rows in zip(self.names, self._sources, strict=True)]
        return hashlib.sha256(repr((sources, stretches, self._seed)).encode()).hexdigest()

    def seq_len(self, row: int) -> int:
        """Pairs of a row."""
        return self._at(row).seq_len

    def locate(self, first: int, count: int) -> tuple[I64, I64]:
        """For rows first … first + count - 1: the source, and which of the source's rows of that length it is."""
        sources, numbers = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        while count:
            stretch, following = self._at(first), self._after(first)
            here = count if following is None else min(count, following - first)
            source_of = stretch.shares.sources(first - stretch.first, here)
            rank = np.empty(here, dtype=np.int64)  # of each row among those of its source
            for k in range(len(self._sources)):
                mine = source_of == k
                rank[mine] = np.arange(np.count_nonzero(mine))
            sources.append(source_of)
            numbers.append(np.array(stretch.numbers(first))[source_of] + rank)
            first, count = first + here, count - here
        return np.concatenate(sources), np.concatenate(numbers)

    def pieces(self, first: int, count: int) -> Iterator[Iterator[Piece]]:
        """The pieces of rows first … first + count - 1, which are all of one length."""
        sources, numbers = self.locate(first, count)
        length = self.seq_len(first)
        for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
            yield self._tracks[source].pieces(number, length)

    def rows_read(self, row: int) -> dict[str, int]:
        """How many of the rows before `row` each source has."""
        totals = [0] * len(self._sources)
        for stretch, end in zip(self._begun, [*(s.first for s in self._begun[1:]), row], strict=True):
            counts = stretch.shares.before(max(min(end, row) - stretch.first, 0))
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
        return dict(zip(self.names, totals, strict=True))

    def epochs(self, row: int) -> dict[str, float]:
        """How often each source has been gone through before `row`."""
        stretch = self._at(row)
        numbers = zip(self.names, self._tracks, stretch.numbers(row), strict=True)
        return {name: number / track.per_epoch(stretch.seq_len) for name, track, number in numbers}

    def _begin(self, number: int, stretch: Stretch) -> _Begun:
        if self.row_pairs % stretch.seq_len:
            allowed = f"lengths that divide the longest, {self.row_pairs}"
            raise UsageError(
                "rows of this length are no parts of the longest rows", value=stretch.seq_len, allowed=allowed
            )
        if unknown := sorted(set(stretch.weights) - set(self.names)):
            raise UsageError("there is no such source", value=unknown[0], allowed=", ".join(self.names))
        shares = Shares([float(stretch.weights.get(name, 0)) for name in self.names], self._seed + number)
        starts = [0] * len(self._sources)
        if self._begun:
            before, length = self._begun[-1], stretch.seq_len
            reached = zip(self._tracks, before.numbers(stretch.first), strict=True)
            starts = [track.number(*track.locate(row, before.seq_len), length) for track, row in reached]
        return _Begun(stretch.first, stretch.seq_len, shares, starts)

    def _at(self, row: int) -> _Begun:
        return self._begun[bisect.bisect_right(self._begun, row, key=lambda stretch: stretch.first) - 1]

    def _after(self, row: int) -> int | None:
        """Where the next stretch begins."""
        place = bisect.bisect_right(self._begun, row, key=lambda stretch: stretch.first)
        return self._begun[place].first if place < len(self._begun) else None


class MixedRows(RowSource):
    """The rows of a mixture from row `first` on, all of one length, in steps of `batch_size` rows."""

    def __init__(self, mixture: Mixture, first: int, batch_size: int, pad_id: int) -> None:
        super().__init__(mixture.seq_len(first), batch_size, pad_id)
        self._mixture, self._first = mixture, first

    def fingerprint(self) -> str:
        made_of = (self._mixture.fingerprint(), self._first, self.batch_size)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def _pieces(self, numbers: range) -> Iterator[Iterator[Piece]]:
        if numbers.step == 1:
            return self._mixture.pieces(self._first + numbers.start, len(numbers))
        return itertools.chain.from_iterable(self._mixture.pieces(self._first + number, 1) for number in numbers)
