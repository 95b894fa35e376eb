"""Near-duplicate removal: ours against datasketch, on the same texts, with the same shingles and verification.

Both sides make word 5-gram shingles, 128-permutation MinHash signatures, find candidates by LSH with the same number of
bands and rows, and verify each candidate's Jaccard similarity. datasketch gets a cheap hash (CRC-32) instead of its
default SHA-1, and its batch update. Rounds are interleaved; medians and the range are printed, as rows of a table.

    python benchmarks/corpus_dedup.py                        # the standard library of this Python
    python benchmarks/corpus_dedup.py folder pages.jsonl.gz  # anything `herd corpus` reads
    python benchmarks/corpus_dedup.py --limit 200 --rounds 1
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import zlib
from collections.abc import Callable

from herd.corpus import read_sources
from herd.corpus.minhash import UnionFind, lsh_parameters, near_duplicate_clusters, signatures
from herd.corpus.normalise import normalise

NGRAM, PERMUTATIONS, THRESHOLD = 5, 128, 0.7
WORD = re.compile(r"[0-9A-Za-z_\x80-\u07ff]+|[\u0800-\U0010ffff]")


def shingles(text: str) -> set[bytes]:
    words = [word.encode() for word in WORD.findall(text.lower())]
    return {b" ".join(words[i : i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1))} if words else set()


def by_datasketch(texts: list[str]) -> list[list[int]]:
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=PERMUTATIONS, params=lsh_parameters(THRESHOLD, PERMUTATIONS))
    sets = [shingles(text) for text in texts]
    union = UnionFind(len(texts))
    for i, found in enumerate(sets):
        if not found:
            continue
        sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        sketch.update_batch(found)
        for j in lsh.query(sketch):
            if union.find(i) != union.find(j) and len(found & sets[j]) / len(found | sets[j]) >= THRESHOLD:
                union.union(i, j)
        lsh.insert(i, sketch)
    clusters: dict[int, list[int]] = {}
    for i in range(len(texts)):
        clusters.setdefault(union.find(i), []).append(i)
    return [cluster for cluster in clusters.values() if len(cluster) > 1]


def by_herd(texts: list[str]) -> list[list[int]]:
    return near_duplicate_clusters(texts, ngram=NGRAM, permutations=PERMUTATIONS, threshold=THRESHOLD)


def signatures_only(texts: list[str]) -> list[list[int]]:
    signatures(texts, ngram=NGRAM, permutations=PERMUTATIONS)
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["python-stdlib"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=None, help="documents to use")
    arguments = parser.parse_args()
    documents = list(read_sources(arguments.sources))[: arguments.limit]
    texts = [normalise(document.text, code=document.kind == "code") for document in documents]
    size = sum(len(text.encode()) for text in texts)

    runs: dict[str, Callable[[list[str]], list[list[int]]]] = {
        "herd": by_herd,
        "herd, signatures only": signatures_only,
    }
    try:
        import datasketch

        runs[f"datasketch {datasketch.__version__}"] = by_datasketch
    except ImportError:
        print("datasketch is not installed: pip install datasketch")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    clusters: dict[str, list[list[int]]] = {}
    for _ in range(arguments.rounds):
        for name, function in runs.items():
            started = time.perf_counter()
            clusters[name] = function(texts)
            seconds[name].append(time.perf_counter() - started)

    print(f"{len(texts)} documents, {size / 1e6:.1f} MB, {arguments.rounds} rounds, medians (least to most)")
    print("| tool | seconds | documents/s | MB/s | clusters | time / ours |\n|---|---|---|---|---|---|")
    ours = statistics.median(seconds["herd"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"| {name} | {median:.2f} ({min(values):.2f}–{max(values):.2f}) | {len(texts) / median:,.0f} "
            f"| {size / 1e6 / median:.1f} | {len(clusters[name]) or '–'} | {median / ours:.1f}× |"
        )
    others = [name for name in runs if name.startswith("datasketch")]
    if others:
        print("same clusters:", "yes" if clusters["herd"] == clusters[others[0]] else "no")


if __name__ == "__main__":
    main()
