"""Near duplicates: MinHash signatures, locality-sensitive hashing, verified Jaccard similarity, clusters.

The chance that two documents share the minimum of a random hash over their shingles is their Jaccard similarity
(Broder 1997). A signature has one such minimum per hash function. Signatures are cut into bands of rows; documents
that agree on a whole band are candidates, found with probability 1 - (1 - s^rows)^bands at similarity s. Each
candidate pair is then verified on the shingles themselves, so a hash accident never removes a document.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from herd.corpus.order import hashed_counters
from herd.corpus.table import I64, U64, TextTable, blocks, mix

U32 = npt.NDArray[np.uint32]

_CHUNK = 2**15  # shingles hashed at a time: the work arrays of 256 KiB stay in the L2 cache
_ALL_PAIRS = 24  # buckets up to this size are compared in full; larger ones along a chain
_CACHED_SETS = 4096


def signatures(
    texts: Sequence[str], *, ngram: int, permutations: int, seed: int = 0
) -> tuple[U32, npt.NDArray[np.bool_]]:
    """MinHash signatures [D, permutations] of the word n-grams, and which documents have any words [D].

    Hash k of shingle x is the high half of a_k x + b_k mod 2^64 with odd a_k (Dietzfelbinger's multiply-shift).
    """
    a, b = hashed_counters(2 * permutations, seed).reshape(2, permutations)
    a |= np.uint64(1)
    result: U32 = np.full((len(texts), permutations), 2**32 - 1, dtype=np.uint32)
    has_words = np.zeros(len(texts), dtype=bool)
    for first, table in blocks(texts):
        shingles, bounds = table.shingles(ngram)
        rows = result[first : first + len(table)]
        has_words[first : first + len(table)] = np.diff(bounds) > 0
        _minima(shingles, bounds, a, b, rows)
    return result, has_words


def _minima(shingles: U64, bounds: I64, a: U64, b: U64, out: U32) -> None:
    """out[d, k] = min over document d's shingles of hash k."""
    documents = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    work = np.empty(_CHUNK, dtype=np.uint64)
    for start in range(0, len(shingles), _CHUNK):
        x = shingles[start : start + _CHUNK]
        owners = documents[start : start + _CHUNK]
        begins = np.flatnonzero(np.diff(owners, prepend=-1))
        rows = owners[begins]
        w = work[: len(x)]
        for k in range(len(a)):
            np.multiply(x, a[k], out=w)
            w += b[k]
            # The minimum of the whole words has the minimum of the high halves on top.
            minima = (np.minimum.reduceat(w, begins) >> np.uint64(32)).astype(np.uint32)
            out[rows, k] = np.minimum(out[rows, k], minima)


def lsh_parameters(threshold: float, permutations: int, false_negative_weight: float = 0.99) -> tuple[int, int]:
    """(bands, rows) that minimise the weighted areas of false positives and false negatives around the threshold.

    Weight 0.5 gives datasketch's and RedPajama-v2's parameters (14 x 9 at 0.7, 9 x 13 at 0.8, 5 x 25 at 0.9 of 128).
    The default prefers finding pairs, as each is verified afterwards: 25 x 5 at 0.7 misses 1 % of pairs just there.
    """
    s = (np.arange(1000) + 0.5) / 1000
    below = s < threshold
    best: tuple[float, int, int] | None = None
    for bands in range(1, permutations + 1):
        for rows in range(1, permutations // bands + 1):
            found = 1.0 - (1.0 - s**rows) ** bands
            error = (1 - false_negative_weight) * found[below].sum() + false_negative_weight * (1 - found[~below]).sum()
            if best is None or error < best[0]:
                best = (float(error), bands, rows)
    assert best is not None
    return best[1], best[2]


def candidate_pairs(signatures_DK: U32, bands: int, rows: int) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, that agree on a band; a pair may come more than once.

    In a bucket of more than a few documents, only neighbours in the order of documents are paired: such a bucket is a
    family of copies, which the chain joins as well, without quadratic work.
    """
    for band in range(bands):
        keys = np.zeros(len(signatures_DK), dtype=np.uint64)
        for row in range(band * rows, (band + 1) * rows):
            keys = mix(keys ^ signatures_DK[:, row].astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        starts = np.concatenate(([0], edges))
        ends = np.concatenate((edges, [len(order)]))
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            bucket = order[start:end].tolist()
            yield from combinations(bucket, 2) if len(bucket) <= _ALL_PAIRS else pairwise(bucket)


def jaccard(a: U64, b: U64) -> float:
    """Jaccard similarity of two sorted arrays without repeats; 0 if both are empty."""
    if not len(a) or not len(b):
        return 0.0
    if len(a) > len(b):
        a, b = b, a
    places = np.searchsorted(b, a)
    shared = int(np.count_nonzero(b[np.minimum(places, len(b) - 1)] == a))
    return shared / (len(a) + len(b) - shared)


class ShingleSets:
    """Sorted unique shingles of documents, computed when asked for; the most recently used are kept."""

    def __init__(self, texts: Sequence[str], ngram: int) -> None:
        self._texts, self._ngram = texts, ngram
        self._cache: OrderedDict[int, U64] = OrderedDict()

    def __getitem__(self, i: int) -> U64:
        if i in self._cache:
            self._cache.move_to_end(i)
            return self._cache[i]
        shingles = np.unique(TextTable([self._texts[i]]).shingles(self._ngram)[0])
        self._cache[i] = shingles
        if len(self._cache) > _CACHED_SETS:
            self._cache.popitem(last=False)
        return shingles


class UnionFind:
    """Disjoint sets of 0 … n-1; the root of a set is its smallest member, whatever the order of unions."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, i: int) -> int:
        """The smallest member of i's set."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def union(self, i: int, j: int) -> None:
        """Join the sets of i and j."""
        i, j = self.find(i), self.find(j)
        self._parent[max(i, j)] = min(i, j)


def near_duplicate_clusters(
    texts: Sequence[str], *, ngram: int, permutations: int, threshold: float, seed: int = 0
) -> list[list[int]]:
    """Clusters (each sorted, two members or more) of texts connected by pairs of Jaccard similarity >= threshold."""
    signatures_DK, has_words = signatures(texts, ngram=ngram, permutations=permutations, seed=seed)
    bands, rows = lsh_parameters(threshold, permutations)
    numbers = np.flatnonzero(has_words)
    sets, clusters = ShingleSets(texts, ngram), UnionFind(len(texts))
    checked: set[tuple[int, int]] = set()
    for i, j in candidate_pairs(signatures_DK[numbers], bands, rows):
        pair = (int(numbers[i]), int(numbers[j]))
        if pair in checked or clusters.find(pair[0]) == clusters.find(pair[1]):
            continue
        checked.add(pair)
        if jaccard(sets[pair[0]], sets[pair[1]]) >= threshold:
            clusters.union(*pair)
    members: dict[int, list[int]] = {}
    for i in range(len(texts)):
        members.setdefault(clusters.find(i), []).append(i)
    return [cluster for cluster in members.values() if len(cluster) > 1]
