"""Mixtures against a walk through all rows before, one at a time."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import UsageError
from herd.corpus import Batch, PackedDataset, TokenShards, pack_tokens, packing
from herd.corpus.mixture import MixedRows, Mixture, Stretch
from herd.corpus.shares import Shares
from herd.corpus.shuffle import shuffled

BOS, EOS = 256, 257


class ByteTokenizer:
    bos_id, eos_id, vocab_size = BOS, EOS, 258

    def encode_document(self, text: str) -> list[int]:
        return [BOS, *text.encode(), EOS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("mixture")


def shards_of(lengths: list[int], folder: Path, name: str = "s") -> TokenShards:
    """Documents whose bytes tell which one they are."""
    return pack_tokens([chr(33 + i) * length for i, length in enumerate(lengths)], ByteTokenizer(), folder / name)


WEIGHTS = st.lists(st.sampled_from([0.0, 0.001, 0.08, 0.17, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=6).filter(any)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 2**40), st.integers(1, 3000))
def test_shares_are_counted_and_even(weights: list[float], seed: int, n: int) -> None:
    shares = Shares(weights, seed)
    sources = shares.sources(0, n)
    counts = np.cumsum(np.eye(len(weights), dtype=int)[sources], axis=0)
    for row in {1, n // 3, n // 2, n - 1, n} - {0}:
        assert shares.before(row) == counts[row - 1].tolist()
    expected = np.arange(1, n + 1)[:, None] * np.array(weights) / sum(weights)
    assert (np.abs(counts - expected).max(1) < 2 + np.log2(np.arange(1, n + 1))).all()


@pytest.mark.parametrize("first", [10**9 - 7, 2**40 - 5, 2**47 + 12345])
def test_shares_far_out_are_those_of_a_walk(first: int) -> None:
    weights = [0.5, 0.25, 0.17, 0.08]
    shares = Shares(weights, 3)
    walked = Counter(shares.sources(first, 5000).tolist())
    ends = zip(shares.before(first), shares.before(first + 5000), strict=True)
    assert [walked[k] for k in range(4)] == [after - before for before, after in ends]
    total = shares.before(first)
    assert sum(total) == first
    assert all(abs(count - w * first) < 2 + math.log2(first) for count, w in zip(total, weights, strict=True))
    # What independent draws would give is far worse: the rule is exact, not right on average.
    assert max(abs(c - w * first) for c, w in zip(total, weights, strict=True)) < 0.01 * math.sqrt(first)


def test_seeds_draw_other_orders() -> None:
    first, second = (Shares([0.5, 0.5], seed).sources(0, 64).tolist() for seed in (0, 2))
    assert (
        first != second
        or Shares([0.3, 0.7], 0).sources(0, 64).tolist() != Shares([0.3, 0.7], 2).sources(0, 64).tolist()
    )


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.1], [math.inf, 1.0]])
def test_weights_that_are_no_shares(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="weights must be 0 or more"):
        Shares(weights, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_the_computed_order_is_a_permutation(n: int, seed: int) -> None:
    assert sorted(shuffled(np.arange(n), n, seed, 1).tolist()) == list(range(n))


def test_the_computed_order_looks_random() -> None:
    n = 100_000
    order = shuffled(np.arange(n), n, 7, 0, 1)
    other = shuffled(np.arange(n), n, 7, 1, 1)
    assert (order == other).mean() < 1e-3 and (order == np.arange(n)).mean() < 1e-3
    # Neighbours' distance, and how places relate to what stands there: no trend, as of independent uniform numbers.
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.005
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.015
    cells = np.zeros((10, 10))
    np.add.at(cells, (np.arange(n) * 10 // n, order * 10 // n), 1)
    chi2 = ((cells - n / 100) ** 2 / (n / 100)).sum()
    assert chi2 < 81 + 5 * math.sqrt(2 * 81)


def walk(
    sources: dict[str, PackedDataset], stretches: list[Stretch], seed: int, rows: int, concat: bool
) -> list[tuple[str, Batch, int]]:
    """Every row by walking: the source by van der Corput's sequence bit by bit, its text by how much it gave before."""
    names = list(sources)
    place = dict.fromkeys(names, 0)
    flips = {i: Shares([1.0], seed + i)._flip for i in range(len(stretches))}
    texts: dict[tuple[str, int], Batch] = {}
    found = []
    for row in range(rows):
        number = max(i for i, stretch in enumerate(stretches) if stretch.first <= row)
        stretch = stretches[number]
        if row == stretch.first:
            for name in names:  # behind the row of the new length in which the source stands
                place[name] += -place[name] % stretch.seq_len
        u = sum(((row - stretch.first) >> bit & 1) << (47 - bit) for bit in range(48)) ^ flips[number]
        total = sum(stretch.weights.values())
        name = next(
            name
            for i, name in enumerate(names)
            if u < round(sum(stretch.weights.get(n, 0) for n in names[: i + 1]) / total * 2**48)
        )
        source = sources[name]
        while True:
            whole, start = divmod(place[name], source.seq_len)
            if (name, whole) not in texts:
                texts[name, whole] = source.rows(whole, 1)
            part = slice(start, start + stretch.seq_len)
            batch = Batch(*(array[0, part] for array in texts[name, whole]))
            place[name] += stretch.seq_len
            if not concat or batch.weights.any():  # an epoch's last row ends in padding: no row is made of it
                break
        found.append((name, batch, stretch.seq_len))
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 5), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["concat", "best_fit"]),
    st.integers(0, 100),
)
def test_rows_are_those_of_a_walk(
    folder: Path,
    documents: list[list[int]],
    parts: list[tuple[int, int, list[int]]],
    packed: str,
    seed: int,
) -> None:
    sources = {
        f"s{i}": PackedDataset(shards_of(lengths, folder, f"s{i}"), 16, 1, seed + i, packed)  # type: ignore[arg-type]
        for i, lengths in enumerate(documents)
    }
    stretches, first = [], 0
    for length, factor, weights in parts:
        stretches.append(Stretch(first, 4 * factor, dict(zip(sources, weights, strict=False))))
        first += length
    mixture = Mixture(sources, stretches, seed)
    expected = walk(sources, stretches, seed, first, packed == "concat")
    read = Counter(name for name, _, _ in expected)
    assert mixture.rows_read(first) == {name: read[name] for name in sources}
    names = list(sources)
    assert [names[k] for k in mixture.locate(0, first)[0]] == [name for name, _, _ in expected]
    for stretch in reversed(stretches):  # in any order: there is no state
        end = next((s.first for s in stretches if s.first > stretch.first), first)
        rows = MixedRows(mixture, stretch.first, 1, EOS).rows(0, end - stretch.first)
        for row in range(stretch.first, end):
            ours = Batch(*(array[row - stretch.first] for array in rows))
            _, theirs, length = expected[row]
            assert len(ours.tokens) == length
            assert (ours.tokens == theirs.tokens).all() and (ours.targets == theirs.targets).all()
            assert (ours.weights == theirs.weights).all()
            assert (np.diff(ours.document_ids) == np.diff(theirs.document_ids)).all()


def test_a_mixture_of_one_is_that_source(folder: Path) -> None:
    shards = shards_of([50] * 30, folder)
    alone = PackedDataset(shards, 32, 8, 5)
    mixed = MixedRows(Mixture({"a": PackedDataset(shards, 32, 1, 5)}, [Stretch(0, 32, {"a": 1})], 5), 0, 8, EOS)
    for step in (0, 3, 40):
        assert all((a == b).all() for a, b in zip(alone.batch(step), mixed.batch(step), strict=True))
        for rows in (slice(2, 5), slice(1, None, 3)):
            parts = zip(alone.batch(step, rows), mixed.batch(step, rows), strict=True)
            assert all((a == b).all() for a, b in parts)


def test_up_sampling_is_going_through_more_epochs(folder: Path) -> None:
    """A small source at half of the rows: each of its epochs has every pair once, and each has its own order."""
    large, small = shards_of([40] * 60, folder, "large"), shards_of([17, 9, 33, 21, 8], folder, "small")
    sources = {"large": PackedDataset(large, 8, 1, 0), "small": PackedDataset(small, 8, 1, 1)}
    mixture = Mixture(sources, [Stretch(0, 8, {"large": 1, "small": 1})], 0)
    per_epoch = sources["small"].rows_per_epoch
    rows = 12 * per_epoch
    batch = MixedRows(mixture, 0, 1, EOS).rows(0, rows)
    mine = np.flatnonzero(mixture.locate(0, rows)[0] == 1)
    assert len(mine) == pytest.approx(rows / 2, abs=4)
    expected = Counter(pair for ids in small for pair in pairwise(ids.tolist()))
    texts = []
    for epoch in range(len(mine) // per_epoch):
        chosen = mine[epoch * per_epoch : (epoch + 1) * per_epoch]
        weighted = batch.weights[chosen] > 0
        pairs = zip(batch.tokens[chosen][weighted].tolist(), batch.targets[chosen][weighted].tolist(), strict=True)
        assert Counter(pairs) == expected
        texts.append(batch.tokens[chosen].tobytes())
    assert len(set(texts)) == len(texts) > 4
    assert mixture.epochs(rows)["small"] == len(mine) / per_epoch


def test_longer_rows_leave_out_less_than_a_row(folder: Path) -> None:
    """Every pair of an epoch is read once, whenever lengths change, but for less than one row at each lengthening."""
    shards = shards_of([70] * 40, folder)
    source = PackedDataset(shards, 32, 1, 0)
    stretches = [Stretch(0, 8, {"a": 1}), Stretch(21, 16, {"a": 1}), Stretch(31, 32, {"a": 1})]
    mixture = Mixture({"a": source}, stretches, 0)
    end = next(row for row in range(32, 200) if mixture.epochs(row)["a"] >= 1)
    read: Counter[tuple[int, int]] = Counter()
    for first, count in ((0, 21), (21, 10), (31, end - 31)):
        batch = MixedRows(mixture, first, 1, EOS).rows(0, count)
        read.update(
            zip(batch.tokens[batch.weights > 0].tolist(), batch.targets[batch.weights > 0].tolist(), strict=True)
        )
    whole = Counter(pair for ids in shards for pair in pairwise(ids.tolist()))
    assert not read - whole
    assert sum((whole - read).values()) == 8 + 16  # 21 rows of 8 end within a row of 16; 10 of 16 within one of 32


def test_a_billion_rows_need_no_table(tmp_path: Path) -> None:
    """A source of 10^9 rows (a file of holes), and a small one at half of the rows."""
    documents, length = 1000, 4_000_001
    big = tmp_path / "big"
    big.mkdir()
    with open(big / "tokens.bin", "wb") as file:
        file.truncate(documents * length * 2)
    offsets = np.arange(documents + 1, dtype="<i8") * length
    (big / "index.bin").write_bytes(offsets.tobytes() + np.ones(documents, dtype="<i8").tobytes())
    manifest = {"format": "herd-token-shard", "version": 1, "dtype": "uint16", "vocab_size": 258, "bos_id": BOS}
    manifest |= {"eos_id": EOS, "n_documents": documents, "n_tokens": documents * length, "n_bytes": documents}
    (big / "manifest.json").write_text(json.dumps(manifest))
    shards = TokenShards(big)
    small = shards_of([100] * 20, tmp_path)
    tracemalloc.start()
    sources = {"big": PackedDataset(shards, 4, 1, 0), "small": PackedDataset(small, 4, 1, 1)}
    assert sources["big"].rows_per_epoch == 10**9
    mixture = Mixture(sources, [Stretch(0, 4, {"big": 0.5, "small": 0.5})], 0)
    rows = MixedRows(mixture, 0, 256, EOS)
    for step in (0, 2**20, 10**9 // 256):
        batch = rows.batch(step)
        mine = mixture.locate(step * 256, 256)[0] == 0
        assert mine.sum() == 128 and (batch.tokens[mine] == 0).all() and (batch.tokens[~mine] > 0).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, "a table of a byte a row would be a gigabyte"
    assert mixture.epochs(2 * 10**9)["big"] == pytest.approx(1, abs=1e-7)


def test_the_order_of_a_long_epoch_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders that are computed instead of kept: every row of an epoch once, epochs differ."""
    monkeypatch.setattr(packing, "LONGEST_TABLE", 10)
    dataset = PackedDataset(shards_of([60] * 50, folder), 8, 4, 3)
    n = dataset.rows_per_epoch
    epochs = [dataset.rows(epoch * n, n) for epoch in range(2)]
    counts = [
        Counter(zip(e.tokens[e.weights > 0].tolist(), e.targets[e.weights > 0].tolist(), strict=True)) for e in epochs
    ]
    assert counts[0] == counts[1] and sum(counts[0].values()) == dataset.pairs_per_epoch
    assert (epochs[0].tokens != epochs[1].tokens).any()


def test_what_does_not_fit_is_named(folder: Path) -> None:
    shards = shards_of([20], folder)
    sources = {"a": PackedDataset(shards, 8, 1), "b": PackedDataset(shards, 8, 1)}
    for stretches, said in (
        ([Stretch(1, 8, {"a": 1})], "begin at row 0"),
        ([Stretch(0, 8, {"a": 1}), Stretch(0, 4, {"a": 1})], "after one another"),
        ([Stretch(0, 3, {"a": 1})], "divide the longest, 8"),
        ([Stretch(0, 8, {"c": 1})], "no such source; got c; allowed: a, b"),
    ):
        with pytest.raises(UsageError, match=said):
            Mixture(sources, stretches, 0)
    with pytest.raises(UsageError, match="one length"):
        Mixture({**sources, "c": PackedDataset(shards, 4, 1)}, [Stretch(0, 4, {"a": 1})], 0)
    made = {
        Mixture(sources, [Stretch(0, 8, {"a": 1, "b": w}), Stretch(n, 4, {"b": 1})], s).fingerprint()
        for w, n, s in ((1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))
    }
    assert len(made) == 4
