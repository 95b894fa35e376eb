"""A random order of any length without a table: where each place goes is computed, not looked up.

A Feistel network permutes the integers of w bits: it is a bijection whatever its round function is. Numbers that it
throws beyond n are sent through again until they fall below n (cycle walking), which keeps it a bijection of 0 … n-1;
as 2^w < 2n, that takes less than two passes on average. Memory is that of the places asked for.
"""

from __future__ import annotations

import numpy as np

from herd.corpus.order import hashed_counters
from herd.corpus.table import I64, U64, mix

_ROUNDS = 8


def shuffled(places: I64, n: int, *key: int) -> I64:
    """Which of 0 … n-1 stands at each of `places` in a random order that depends on `key` alone; n up to 2^62.

    For n of some thousands or more: with few bits a network has few keys, and `order.permutation` is the better order.
    """
    bits = max(n - 1, 0).bit_length()
    keys = hashed_counters(_ROUNDS, *key)
    values = places.astype(np.uint64)
    if not bits:
        return values.astype(np.int64)
    values = _network(values, bits, keys)
    while (beyond := values >= np.uint64(n)).any():
        values[beyond] = _network(values[beyond], bits, keys)
    return values.astype(np.int64)


def _network(values: U64, bits: int, keys: U64) -> U64:
    """One pass: each half is changed in turn by a hash of the other. The halves may differ by one bit."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            low ^= mix(high ^ key) & low_mask
        else:
            high ^= mix(low ^ key) & high_mask
    return (high << low_bits) | low
