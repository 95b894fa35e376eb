"""Random numbers as pure functions: the same on every machine, numpy version and number of ranks.

numpy does not promise that `Generator.permutation` stays the same between versions, and a data order must survive an
upgrade in the middle of a run; sorting hashed counters does.
"""

from __future__ import annotations

import numpy as np

from herd.corpus.table import I64, U64, mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hashed_counters(n: int, *key: int) -> U64:
    """n random 64-bit integers that depend on the integers of `key` alone (splitmix64, keyed)."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix((state ^ np.uint64(part % 2**64)) + _GOLDEN)
    return mix((np.arange(1, n + 1, dtype=np.uint64) + state) * _GOLDEN)


def permutation(n: int, *key: int) -> I64:
    """A random order of 0 … n-1 that depends on `key` alone."""
    return np.argsort(hashed_counters(n, *key), kind="stable")
