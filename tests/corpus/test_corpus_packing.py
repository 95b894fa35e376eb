"""Token shards, packing and evaluation windows against brute force over the documents themselves."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import FileFormatError, HerdError, UsageError
from herd.corpus import Batch, Document, EvaluationWindows, PackedDataset, TokenShards, pack_examples, pack_tokens
from herd.corpus.order import permutation
from herd.corpus.packing import best_fit

BOS, EOS = 256, 257


class ByteTokenizer:
    """One token per byte: as simple as a real tokenizer can be."""

    bos_id, eos_id = BOS, EOS

    def __init__(self, vocab_size: int = 258) -> None:
        self.vocab_size = vocab_size

    def encode_document(self, text: str) -> list[int]:
        return [BOS, *text.encode(), EOS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("shards")


def shards_of(texts: list[str], folder: Path) -> TokenShards:
    return pack_tokens(texts, ByteTokenizer(), folder / "s")


def distinct(lengths: list[int]) -> list[str]:
    """Texts whose (position, token) pairs tell which document and place they come from, for lengths up to 60."""
    return [chr(33 + i) * length for i, length in enumerate(lengths)]


def pairs_of(batch: Batch) -> list[tuple[int, int, int]]:
    """Weighted (token, target, document's byte) triples; the byte is found on either side of BOS or EOS."""
    found = []
    for token, target in zip(batch.tokens[batch.weights > 0], batch.targets[batch.weights > 0], strict=True):
        found.append((int(token), int(target), int(token if token < BOS else target)))
    return found


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 5), st.integers(0, 9), st.sampled_from(["concat", "best_fit"]))
def test_corpus_every_epoch_has_every_pair_once(
    folder: Path, lengths: list[int], seq_len: int, batch_size: int, seed: int, packing: str
) -> None:
    texts = distinct(lengths)
    dataset = PackedDataset(shards_of(texts, folder), seq_len, batch_size, seed, packing)  # type: ignore[arg-type]
    expected = Counter()
    for text in texts:
        ids = ByteTokenizer().encode_document(text)
        expected.update((a, b, ord(text[0])) for a, b in pairwise(ids))
    for epoch in range(2):
        rows = dataset.rows(epoch * dataset.rows_per_epoch, dataset.rows_per_epoch)
        assert Counter(pairs_of(rows)) == expected
    assert dataset.pairs_per_epoch == sum(expected.values())


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 5), st.integers(0, 9), st.sampled_from(["concat", "best_fit"]))
def test_corpus_no_label_crosses_documents(
    folder: Path, lengths: list[int], seq_len: int, batch_size: int, seed: int, packing: str
) -> None:
    texts = distinct(lengths)
    dataset = PackedDataset(shards_of(texts, folder), seq_len, batch_size, seed, packing)  # type: ignore[arg-type]
    batch = dataset.batch(seed)
    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == batch.weights.shape
    assert batch.tokens.shape == (batch_size, seq_len)
    assert [array.dtype.name for array in batch] == ["int64", "int64", "int32", "float32"]
    for tokens, targets, ids, weights in zip(*batch, strict=True):
        assert ids[0] == 0 and set(np.diff(ids).tolist()) <= {0, 1}
        for number in range(int(ids[-1]) + 1):
            here = ids == number
            piece, wanted = tokens[here], targets[here]
            if not weights[here].any():  # padding stands last and is a document of its own
                assert here[-1] and (piece == EOS).all()
                continue
            assert weights[here].all()
            whole = [*piece.tolist(), int(wanted[-1])]
            assert whole[1:] == wanted.tolist()
            # The piece is a slice of one document: one byte, BOS at most first, EOS at most as the last target.
            assert len({token for token in whole if token < BOS}) == 1
            assert BOS not in whole[1:] and EOS not in whole[:-1]
    if packing == "concat" and dataset.pairs_per_epoch >= seq_len:
        waste = sum(1 for row in dataset.rows(0, dataset.rows_per_epoch).weights if not row.all())
        assert waste <= 1


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 30), st.integers(1, 6), st.integers(0, 50), st.sampled_from(["concat", "best_fit"]))
def test_corpus_batches_are_pure_in_seed_and_step(
    folder: Path, lengths: list[int], seq_len: int, batch_size: int, step: int, packing: str
) -> None:
    shards = shards_of(distinct(lengths), folder)
    whole = PackedDataset(shards, seq_len, batch_size, 3, packing).batch(step)  # type: ignore[arg-type]
    other = PackedDataset(shards, seq_len, batch_size, 3, packing)  # type: ignore[arg-type]
    for before in (step + 7, 0, step // 2):
        other.batch(before)
    for ranks in range(1, batch_size + 1):
        parts = [other.batch(step, rows=slice(rank, None, ranks)) for rank in range(ranks)]
        for i, array in enumerate(whole):
            for rank in range(ranks):
                assert (array[rank::ranks] == parts[rank][i]).all()
    same = PackedDataset(shards, seq_len, 1, 3, packing)  # type: ignore[arg-type]
    for row in range(batch_size):
        assert (same.batch(step * batch_size + row).tokens[0] == whole.tokens[row]).all()


def test_corpus_epochs_and_seeds_differ(folder: Path) -> None:
    shards = shards_of(distinct([20] * 40), folder)
    for packing in ("concat", "best_fit"):
        dataset = PackedDataset(shards, 50, 4, 0, packing)  # type: ignore[arg-type]
        first, second = (
            {tuple(row) for row in dataset.rows(epoch * dataset.rows_per_epoch, dataset.rows_per_epoch).tokens.tolist()}
            for epoch in range(2)
        )
        other = PackedDataset(shards, 50, 4, 1, packing)  # type: ignore[arg-type]
        # Not only the order of rows changes but what is in them.
        assert len(first & second) < len(first) / 2
        assert len(first & {tuple(row) for row in other.rows(0, other.rows_per_epoch).tokens.tolist()}) < len(first) / 2


def test_corpus_pieces_of_a_long_document_are_spread(folder: Path) -> None:
    shards = shards_of(["a" * 20000, "b" * 20000], folder)
    dataset = PackedDataset(shards, 100, 10, 0)
    counts = [sum(row.tolist().count(ord("a")) > 50 for row in dataset.batch(step).tokens) for step in range(30)]
    assert all(0 < count < 10 for count in counts)


def splitmix(value: int) -> int:
    """Steele, Lea and Flood's finaliser, in plain integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize("key", [(0,), (1, 2, 3), (2**63 + 5, 0)])
def test_corpus_order_never_changes(key: tuple[int, ...]) -> None:
    # A run that is resumed with a later version of anything must see the same data.
    state = 0
    for part in key:
        state = splitmix(((state ^ part) + 0x9E3779B97F4A7C15) % 2**64)
    hashes = [splitmix((i + 1 + state) * 0x9E3779B97F4A7C15 % 2**64) for i in range(50)]
    assert permutation(50, *key).tolist() == sorted(range(50), key=lambda i: hashes[i])


@given(st.integers(0, 300), st.integers(0, 2**70))
def test_corpus_permutation_is_one(n: int, seed: int) -> None:
    assert sorted(permutation(n, seed, 1).tolist()) == list(range(n))


def test_corpus_permutation_is_uniform() -> None:
    counts = np.zeros((8, 8))
    for seed in range(8000):
        counts[np.arange(8), permutation(8, seed)] += 1
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 49 + 4 * math.sqrt(2 * 49)  # 49 degrees of freedom; about four standard deviations


EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=20), min_size=1, max_size=15
).filter(lambda e: any(supervised for example in e for _, supervised in example[1:]))


@settings(max_examples=60, deadline=None)
@given(EXAMPLES, st.integers(19, 40), st.integers(1, 4), st.integers(0, 5))
def test_corpus_examples_are_packed_whole(
    raw: list[list[tuple[int, bool]]], seq_len: int, batch_size: int, seed: int
) -> None:
    examples = [([a for a, _ in example], [b for _, b in example]) for example in raw]
    dataset = pack_examples(examples, seq_len, batch_size, seed, pad_id=7)
    expected = Counter(
        (tuple(ids[:-1]), tuple(ids[1:]), tuple(map(float, mask[1:]))) for ids, mask in examples if any(mask[1:])
    )
    for epoch in range(2):
        found: Counter[tuple[tuple[int, ...], ...]] = Counter()
        for tokens, targets, ids, weights in zip(
            *dataset.rows(epoch * dataset.rows_per_epoch, dataset.rows_per_epoch), strict=True
        ):
            for number in range(int(ids[-1]) + 1):
                here = ids == number
                if weights[here].any():
                    found[
                        tuple(tokens[here].tolist()), tuple(targets[here].tolist()), tuple(weights[here].tolist())
                    ] += 1
                else:
                    assert (tokens[here] == 7).all() and here[-1]
        assert found == expected
    again = pack_examples(examples, seq_len, batch_size, seed, pad_id=7)
    again.batch(5)
    assert all((a == b).all() for a, b in zip(dataset.batch(2), again.batch(2), strict=True))


@given(st.lists(st.integers(1, 30), max_size=60))
def test_corpus_best_fit_fits_best(lengths: list[int]) -> None:
    items = np.array(sorted(lengths, reverse=True), dtype=np.int64)
    row_of, n_rows = best_fit(items, 30)
    rooms: list[int] = []
    for item, row in zip(items.tolist(), row_of.tolist(), strict=True):
        fitting = [room for room in rooms if room >= item]
        if row == len(rooms):
            assert not fitting
            rooms.append(30 - item)
        else:
            assert rooms[row] == min(fitting)
            rooms[row] -= item
    assert len(rooms) == n_rows and all(room >= 0 for room in rooms)


def test_corpus_examples_too_long_or_unsupervised() -> None:
    long, fine, mute = ([1] * 12, [True] * 12), ([1, 2], [False, True]), ([1, 2], [True, False])
    with pytest.raises(HerdError, match="longer than a row; got 12 tokens; allowed: up to seq_len"):
        pack_examples([long], 10, 1)
    assert pack_examples([long, fine, mute], 10, 1, too_long="drop").dropped == 1
    with pytest.raises(HerdError, match="no example is left"):
        pack_examples([mute], 10, 1)
    with pytest.raises(HerdError, match="2 tokens and a mask of 3"):
        pack_examples([([1, 2], [True] * 3)], 10, 1)


def test_corpus_shards_hold_the_documents(tmp_path: Path) -> None:
    texts = ["alpha", "", "βeta", "gamma " * 50]
    shards = pack_tokens([Document(t, str(i)) for i, t in enumerate(texts)], ByteTokenizer(), tmp_path / "s")
    kept = [t for t in texts if t]
    assert [s.tolist() for s in shards] == [ByteTokenizer().encode_document(t) for t in kept]
    assert shards[-1].tolist() == ByteTokenizer().encode_document(kept[-1])
    assert shards.text_bytes.tolist() == [len(t.encode()) for t in kept]
    assert shards.lengths.tolist() == [len(s) for s in shards] and shards.n_tokens == sum(map(len, shards))
    assert shards[0].dtype == np.uint16 and not shards[0].flags.writeable
    with pytest.raises(IndexError):
        shards[3]
    wide = pack_tokens(texts, ByteTokenizer(70000), tmp_path / "w")
    assert wide[0].dtype == np.uint32 and [s.tolist() for s in wide] == [s.tolist() for s in shards]
    first = (tmp_path / "s/manifest.json").read_bytes()
    pack_tokens(texts, ByteTokenizer(), tmp_path / "s")
    assert (tmp_path / "s/manifest.json").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "w"]


def test_corpus_several_shards_are_one(tmp_path: Path) -> None:
    one = pack_tokens(["a", "bb"], ByteTokenizer(), tmp_path / "1")
    two = pack_tokens(["ccc"], ByteTokenizer(), tmp_path / "2")
    both = TokenShards([tmp_path / "1", tmp_path / "2"], verify=True)
    assert [s.tolist() for s in both] == [s.tolist() for s in (*one, *two)]
    assert [both[i].tolist() for i in range(3)] == [s.tolist() for s in both]
    pack_tokens(["x"], ByteTokenizer(300), tmp_path / "3")
    with pytest.raises(FileFormatError, match="another vocabulary"):
        TokenShards([tmp_path / "1", tmp_path / "3"])


class Unframed(ByteTokenizer):
    def encode_document(self, text: str) -> list[int]:
        return list(text.encode())


class OutOfRange(ByteTokenizer):
    def encode_document(self, text: str) -> list[int]:
        return [BOS, 999, EOS]


def test_corpus_bad_input_leaves_no_shard(tmp_path: Path) -> None:
    for documents, tokenizer, message in (
        ([], ByteTokenizer(), "no document to tokenise"),
        ([""], ByteTokenizer(), "no document to tokenise"),
        (["a"], Unframed(), "BOS and EOS"),
        (["a"], OutOfRange(), "outside its vocabulary; got 999"),
    ):
        with pytest.raises(HerdError, match=message):
            pack_tokens(documents, tokenizer, tmp_path / "s")
        assert list(tmp_path.iterdir()) == []


def damage(path: Path, how: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    if how == "short tokens":
        (path / "tokens.bin").write_bytes((path / "tokens.bin").read_bytes()[:-1])
    elif how == "missing index":
        (path / "index.bin").unlink()
    elif how == "shuffled offsets":
        index = np.fromfile(path / "index.bin", dtype="<i8")
        index[1], index[2] = index[2], index[1]
        index.tofile(path / "index.bin")
    elif how == "offset beyond the end":
        index = np.fromfile(path / "index.bin", dtype="<i8")
        index[3] += 10**12
        index.tofile(path / "index.bin")
    elif how == "flipped token":
        data = bytearray((path / "tokens.bin").read_bytes())
        data[4] ^= 1
        (path / "tokens.bin").write_bytes(data)
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    else:
        field, value = {
            "huge count": ("n_tokens", 2**47),
            "negative count": ("n_documents", -1),
            "no documents": ("n_documents", 0),
            "text count": ("n_tokens", "7"),
            "true count": ("bos_id", True),
            "other dtype": ("dtype", "float64"),
            "listed dtype": ("dtype", ["uint16"]),
            "other format": ("format", "zip"),
            "later version": ("version", 99),
        }[how]
        manifest[field] = value
        (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "how",
    ["short tokens", "missing index", "shuffled offsets", "offset beyond the end", "flipped token", "no manifest",
     "huge count", "negative count", "no documents", "text count", "true count", "other dtype", "listed dtype",
     "other format", "later version"],
)  # fmt: skip
def test_corpus_damaged_shards_are_refused(tmp_path: Path, how: str) -> None:
    pack_tokens(["alpha", "b", "gamma"], ByteTokenizer(), tmp_path / "s")
    damage(tmp_path / "s", how)
    with pytest.raises(FileFormatError):
        TokenShards(tmp_path / "s", verify=how == "flipped token")
    if how == "flipped token":
        assert len(TokenShards(tmp_path / "s")) == 3  # sums are compared only when asked for


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 4), st.data())
def test_corpus_windows_score_every_token_once(
    folder: Path, lengths: list[int], seq_len: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.one_of(st.none(), st.integers(1, seq_len)))
    texts = distinct(lengths)
    shards = shards_of(texts, folder)
    windows = EvaluationWindows(shards, seq_len, batch_size, stride)
    scored: Counter[tuple[int, int]] = Counter()
    batches = list(windows)
    assert len(batches) == len(windows)
    for batch, documents in batches:
        for tokens, targets, ids, weights, owners in zip(*batch, documents, strict=True):
            for number in range(int(ids[-1]) + 1):
                here = np.flatnonzero(ids == number)
                owner = int(owners[here[0]])
                assert (owners[here] == owner).all()
                if owner < 0:
                    assert not weights[here].any()
                    continue
                document = shards[owner].tolist()
                window = [*tokens[here].tolist(), int(targets[here[-1]])]
                assert window[1:] == targets[here].tolist()
                starts = [s for s in range(len(document)) if document[s : s + len(window)] == window]
                assert starts
                counted = np.flatnonzero(weights[here] > 0)
                assert (np.diff(counted) == 1).all() and counted[-1] == len(here) - 1
                # All of a document's first window counts, and of the others what the one before did not reach.
                overlap = seq_len - (max(seq_len // 2, 1) if stride is None else stride)
                assert counted[0] == (0 if window[0] == BOS else overlap)
                scored[owner, len(counted)] += 1
    totals: Counter[int] = Counter()
    for (owner, count), times in scored.items():
        totals[owner] += count * times
    assert totals == {i: len(text) + 1 for i, text in enumerate(texts)}
    assert windows.n_targets == sum(totals.values())
    assert windows.n_bytes == sum(lengths)


def test_corpus_bits_per_byte_of_a_uniform_model(folder: Path) -> None:
    shards = shards_of(["ab" * 40, "c"], folder)
    windows = EvaluationWindows(shards, 16, 2)
    nll = sum(float(batch.weights.sum()) * math.log(258) for batch, _ in windows)
    # 81 bytes and two EOS, log2(258) bits each.
    assert windows.bits_per_byte(nll) == pytest.approx(math.log2(258) * 83 / 81)
    with pytest.raises(HerdError, match="not a finite number"):
        windows.bits_per_byte(float("nan"))
    with pytest.raises(UsageError):
        EvaluationWindows(shards, 16, 2, stride=17)


def test_corpus_wrong_packing_arguments(folder: Path) -> None:
    shards = shards_of(["ab"], folder)
    for arguments in ((0, 1), (1, 0)):
        with pytest.raises(UsageError):
            PackedDataset(shards, *arguments)
    with pytest.raises(UsageError, match="unknown packing"):
        PackedDataset(shards, 4, 1, 0, "worst_fit")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        PackedDataset(shards, 4, 1).batch(-1)
