"""The key/value cache for decoding, with a length of its own for every row, so that ragged batches decode together.

Letters: B rows, C capacity, S new tokens, N = longest row after them, G key heads, K head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from herd.architecture import LlamaConfig
from herd.errors import ContextLengthExceeded, UsageError


class KVCache:
    """Keys and values of `batch` sequences of up to `capacity` tokens each.

    `model(tokens_BS, cache=cache)` appends S tokens to every row; with `lengths=[…]` row b appends only its first
    lengths[b] tokens and the rest of it is padding. `select` gives some rows as a cache over the same memory.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise UsageError("a cache needs room", value=(batch, capacity), allowed="batch >= 1 and capacity >= 1")
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        # Zeros, not uninitialised memory: a hidden value is multiplied by 0, and 0 times NaN is NaN.
        self.keys_LBCGK = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBCGK = torch.zeros(shape, dtype=dtype, device=device)
        self._lengths = [0] * batch
        self._rows = list(range(batch))

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys_LBCGK.shape[2]

    @property
    def batch(self) -> int:
        """Rows of this view."""
        return len(self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens that every row holds."""
        return [self._lengths[row] for row in self._rows]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what comes after the first lengths[b] tokens of row b; 0 empties a row."""
        self._check_rows(lengths)
        for row, length in zip(self._rows, lengths, strict=True):
            if not 0 <= length <= self._lengths[row]:
                raise UsageError("cannot truncate", value=length, allowed=f"0 … {self._lengths[row]}")
            self._lengths[row] = length

    def select(self, rows: Sequence[int]) -> KVCache:
        """Rows `rows` (each at most once) of this cache, in that order: same memory, same lengths."""
        if len(set(rows)) != len(rows) or not all(0 <= row < self.batch for row in rows):
            raise UsageError("no such rows of the cache", value=list(rows), allowed=f"distinct, 0 … {self.batch - 1}")
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__)
        view._rows = [self._rows[row] for row in rows]
        return view

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` an independent copy of row `source`."""
        a, b = self._rows[source], self._rows[target]
        length = self._lengths[a]
        self.keys_LBCGK[:, b, :length] = self.keys_LBCGK[:, a, :length]
        self.values_LBCGK[:, b, :length] = self.values_LBCGK[:, a, :length]
        self._lengths[b] = length

    def reserve(self, counts: Sequence[int], width: int) -> CacheWrite:
        """Plan the appending of counts[b] of `width` tokens to row b. Raises ContextLengthExceeded when it is full."""
        self._check_rows(counts)
        if not all(0 <= count <= width for count in counts):
            raise UsageError("wrong number of new tokens", value=list(counts), allowed=f"0 … {width} per row")
        needed = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        if needed > self.capacity:
            raise ContextLengthExceeded(needed, self.capacity)
        return CacheWrite(self, counts, width, needed)

    def _check_rows(self, numbers: Sequence[int]) -> None:
        if len(numbers) != self.batch:
            raise UsageError("one number per row is needed", value=len(numbers), allowed=str(self.batch))


class CacheWrite:
    """One step of appending: `write` for every layer, then `commit`. A failed step leaves the lengths as they were."""

    def __init__(self, cache: KVCache, counts: Sequence[int], width: int, n_keys: int) -> None:
        device = cache.keys_LBCGK.device
        self._cache, self._counts = cache, list(counts)
        self.n_keys = n_keys
        self.before = cache.lengths
        pairs = [(b, s) for b, count in enumerate(counts) for s in range(count)]
        self._from_b = torch.tensor([b for b, _ in pairs], device=device, dtype=torch.long)
        self._from_s = torch.tensor([s for _, s in pairs], device=device, dtype=torch.long)
        self._to_row = torch.tensor([cache._rows[b] for b, _ in pairs], device=device, dtype=torch.long)
        self._to_place = torch.tensor([self.before[b] + s for b, s in pairs], device=device, dtype=torch.long)
        rows = cache._rows
        neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
        self._read = slice(rows[0], rows[0] + len(rows)) if neighbours else torch.tensor(rows, device=device)

    @property
    def from_empty(self) -> bool:
        """True when no row holds anything yet, so that the new tokens are all there is to attend to."""
        return not any(self.before)

    def write(self, layer: int, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; returns all of them, old and new, [B, N, G, K]."""
        new = (self._from_b, self._from_s)
        both = []
        for stored_LBCGK, fresh in ((self._cache.keys_LBCGK, k_BSGK), (self._cache.values_LBCGK, v_BSGK)):
            stored = stored_LBCGK[layer]
            stored[self._to_row, self._to_place] = fresh[new].to(stored.dtype)
            both.append(stored[self._read, : self.n_keys].to(fresh.dtype))
        return both[0], both[1]

    def commit(self) -> None:
        """Count the new tokens."""
        for row, count in zip(self._cache._rows, self._counts, strict=True):
            self._cache._lengths[row] += count
