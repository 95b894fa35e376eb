"""Which source each row of a mixture comes from: exact shares over time, as a formula of the row's number.

Row j gets the number u(j): its 48 bits reversed, and flipped where a hash of the seed has ones (the van der Corput
sequence with a digital shift). Sources own intervals of 0 … 2^48 as long as their weights, and the row belongs to the
source whose interval has u(j). Any 2^b rows that begin at a multiple of 2^b have exactly one u in each of 2^b equal
parts of the range, so that a source's rows among the first n differ from weight · n by less than 2 + log2(n): by less
than 32 in a billion rows, where independent draws would differ by some 30,000. How many rows of a source lie before a
row is a sum over the bits of its number. Rules that carry a deficit along keep within one row, but only by walking
through all rows before, or by rounding the weights to a short cycle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from herd.corpus.order import hashed_counters
from herd.corpus.table import I64, U64
from herd.errors import UsageError

_BITS = 48
_MOST = 1 << _BITS
"""Rows that a mixture can have, and the finest part of a weight."""
_SWAPS = (
    (1, 0x5555555555555555),
    (2, 0x3333333333333333),
    (4, 0x0F0F0F0F0F0F0F0F),
    (8, 0x00FF00FF00FF00FF),
    (16, 0x0000FFFF0000FFFF),
)


class Shares:
    """The sources of rows 0, 1, 2, … for these weights. Raises UsageError for weights that are no shares."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = float(sum(weights))
        if not weights or min(weights) < 0 or not 0 < total < float("inf"):
            raise UsageError("weights must be 0 or more, and not all 0", value=list(weights))
        cumulated = [sum(weights[:k]) / total for k in range(len(weights))]
        self._bounds = [min(round(part * _MOST), _MOST) for part in cumulated] + [_MOST]
        self._uppers: U64 = np.array(self._bounds[1:], dtype=np.uint64)
        self._flip = int(hashed_counters(1, seed)[0]) >> (64 - _BITS)

    def sources(self, first: int, count: int) -> I64:
        """The source of rows first … first + count - 1."""
        rows = np.arange(first, first + count, dtype=np.uint64)
        found = np.searchsorted(self._uppers, _reversed(rows) ^ np.uint64(self._flip), side="right")
        return found.astype(np.int64)

    def before(self, row: int) -> list[int]:
        """How many of the rows before `row` each source has."""
        below = [self._below(bound, row) for bound in self._bounds]
        return [upper - lower for lower, upper in itertools.pairwise(below)]

    def _below(self, bound: int, row: int) -> int:
        """Rows j < row with u(j) < bound: over the blocks of 2^b rows that the bits of `row` stand for."""
        count = 0
        for b in range(row.bit_length()):
            if row >> b & 1:
                whole = bound >> (_BITS - b)  # parts of size 2^-b that lie below the bound, with one row each
                count += whole
                if whole < 1 << b:  # and the one row of the part that the bound cuts
                    part = (whole << (_BITS - b)) ^ (self._flip >> (_BITS - b) << (_BITS - b))
                    inside = (row >> (b + 1) << (b + 1)) | _reversed_int(part)
                    count += _reversed_int(inside) ^ self._flip < bound
        return count


def _reversed(values: U64) -> U64:
    """The lowest 48 bits in reverse."""
    for shift, mask in _SWAPS:
        s, m = np.uint64(shift), np.uint64(mask)
        values = ((values >> s) & m) | ((values & m) << s)
    return (values >> np.uint64(32) | values << np.uint64(32)) >> np.uint64(64 - _BITS)


def _reversed_int(value: int) -> int:
    return int(f"{value:0{_BITS}b}"[::-1], 2)
