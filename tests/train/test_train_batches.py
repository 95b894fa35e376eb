"""Which rows a step consists of depends on (seed, step) alone: not on micro-batches, not on ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from herd.corpus import Batch as ArrayBatch
from herd.corpus import PackedExamples, pack_examples
from herd.errors import UsageError
from herd.train import PackedSource
from herd.train.world import OneRank


class _Rank(OneRank):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def _rows(batch_size: int = 8) -> PackedExamples:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(200):
        n = int(rng.integers(2, 16))
        examples.append((rng.integers(1, 60, n), rng.random(n) < 0.7))
    return pack_examples(examples, seq_len=16, batch_size=batch_size, seed=3)


def test_micro_batches_are_consecutive_parts_of_the_step() -> None:
    rows = _rows()
    for step in (0, 5, 40):
        whole = rows.batch(step)
        for size in (1, 3, 8, 100):
            parts = PackedSource(rows, size).batch(step)
            assert [len(part.tokens_BS) for part in parts[:-1]] == [size] * (len(parts) - 1)
            for field, array in zip(zip(*parts, strict=True), whole, strict=True):
                assert torch.equal(torch.cat(field), torch.from_numpy(array))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_share_the_same_rows(size: int) -> None:
    rows = _rows()
    one = PackedSource(rows, 8).batch(7)[0]
    shares = [PackedSource(rows, 2, _Rank(rank, size)).batch(7) for rank in range(size)]
    together = [torch.cat([getattr(part, name) for share in shares for part in share]) for name in one._fields]
    for field, expected in zip(together, one, strict=True):
        assert torch.equal(field, expected)


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_size 8 on 3 ranks"):
        PackedSource(_rows(), 2, _Rank(0, 3))


def test_tensors_share_memory_with_the_arrays() -> None:
    arrays: ArrayBatch = _rows().batch(0)
    batch = PackedSource(_rows(), 8).batch(0)[0]
    assert batch.n_tokens == arrays.tokens.size
    assert batch.tokens_BS.dtype == torch.int64 and batch.weights_BS.dtype == torch.float32
