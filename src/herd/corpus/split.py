"""Train and held-out: by module, by hash, and with proof that no near duplicate stands on both sides.

A group (a top-level module or folder with all below it) is held out when the hash of its name falls below the
fraction. That depends on nothing but the name, the seed and the fraction: adding documents never moves others, and
siblings such as json/encoder.py and json/decoder.py stay together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from herd.corpus.document import Document
from herd.corpus.minhash import jaccard
from herd.corpus.table import U64, blocks

_TAIL_MIN_BYTES = 2048  # documents shorter than this are not cut


@dataclass(frozen=True)
class Split:
    """The two sides; `how` is "module", "module by rank", "document by rank", "tail" or "none"."""

    train: list[Document]
    heldout: list[Document]
    how: str


def group_rank(group: str, seed: int) -> float:
    """A number in [0, 1), uniform over names: the first 53 bits of SHA-256 of "seed:group"."""
    digest = hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def is_heldout(document: Document, fraction: float, seed: int) -> bool:
    """Whether the document's group is held out."""
    return group_rank(document.group, seed) < fraction


def split_documents(documents: Sequence[Document], fraction: float, seed: int) -> Split:
    """Split the documents, so that both sides are usable whatever the corpus looks like.

    "module": the hash alone, when it holds out between a quarter of the fraction and four times of it (in bytes).
    "module by rank": otherwise (few or very unequal groups) groups are taken in the order of their hashes while they
    fit into twice the fraction. "document by rank": if that holds out too little, documents are taken so. "tail": if
    that fails as well, the last lines of every document of 2 KiB or more are held out. With fraction 0 nothing is.
    """
    if fraction == 0:
        return Split(list(documents), [], "none")
    total = sum(document.n_bytes for document in documents)
    chosen = {document.url for document in documents if is_heldout(document, fraction, seed)}
    size = sum(document.n_bytes for document in documents if document.url in chosen)
    if size and fraction / 4 * total <= size <= min(4 * fraction, 0.5) * total:
        return _divide(documents, chosen, "module")
    for how, names in (
        ("module by rank", [document.group for document in documents]),
        ("document by rank", [document.url for document in documents]),
    ):
        members: dict[str, list[Document]] = {}
        for name, document in zip(names, documents, strict=True):
            members.setdefault(name, []).append(document)
        chosen, size = set(), 0
        for name in sorted(members, key=lambda name: (group_rank(name, seed), name)):
            addition = sum(document.n_bytes for document in members[name])
            if size < fraction * total and size + addition <= 2 * fraction * total:
                chosen.update(document.url for document in members[name])
                size += addition
        if size >= fraction / 4 * total:
            return _divide(documents, chosen, how)
    return _split_tails(documents, fraction)


def _divide(documents: Sequence[Document], heldout: set[str], how: str) -> Split:
    return Split(
        [document for document in documents if document.url not in heldout],
        [document for document in documents if document.url in heldout],
        how,
    )


def _split_tails(documents: Sequence[Document], fraction: float) -> Split:
    train, heldout = [], []
    for document in documents:
        # The cut falls after a line; a single line is cut after a space, and one without spaces anywhere.
        aim = round(len(document.text) * (1 - fraction))
        cut = (
            max(document.text.rfind("\n", 0, aim), document.text.rfind(" ", 0, aim) if _one_line(document) else -1) + 1
        )
        cut = cut or aim
        if document.n_bytes < _TAIL_MIN_BYTES or not document.text[cut:].strip():
            train.append(document)
            continue
        train.append(replace(document, text=document.text[:cut]))
        heldout.append(replace(document, text=document.text[cut:], url=f"{document.url}#tail"))
    return Split(train, heldout, "tail")


def _one_line(document: Document) -> bool:
    return "\n" not in document.text.rstrip("\n")


@dataclass(frozen=True)
class Overlap:
    """How one held-out document relates to train: the most similar training document, and the share of its shingles
    that occur anywhere in train."""

    url: str
    nearest: str
    similarity: float
    contained: float


def overlaps(split: Split, ngram: int) -> list[Overlap]:
    """Measure every held-out document against all of train, exactly (no hash sampling, unlike the MinHash search)."""
    if not split.heldout:
        return []
    held = [np.unique(part) for part in _shingles(split.heldout, ngram)]
    vocabulary = np.unique(np.concatenate(held))
    found = np.zeros(len(vocabulary), dtype=bool)
    # Postings: which held-out documents have a shingle, as one sorted list of (shingle, document).
    owners = np.repeat(np.arange(len(held)), [len(part) for part in held])
    keys = np.searchsorted(vocabulary, np.concatenate(held))
    order = np.argsort(keys, kind="stable")
    owners = owners[order]
    first = np.searchsorted(keys[order], np.arange(len(vocabulary) + 1))

    best = np.zeros(len(held))
    nearest = [""] * len(held)
    for document, raw in zip(split.train, _shingles(split.train, ngram), strict=True):
        shingles = np.unique(raw)
        places = np.minimum(np.searchsorted(vocabulary, shingles), max(len(vocabulary) - 1, 0))
        hits = places[vocabulary[places] == shingles] if len(vocabulary) else places[:0]
        if not len(hits):
            continue
        found[hits] = True
        touched = np.unique(np.concatenate([owners[first[h] : first[h + 1]] for h in hits]))
        for h in touched:
            # The number of shared shingles bounds the similarity, so most pairs need no second look.
            if min(len(held[h]), len(shingles)) / max(len(held[h]), len(shingles)) > best[h]:
                similarity = jaccard(held[h], shingles)
                if similarity > best[h]:
                    best[h], nearest[h] = similarity, document.url
    result = []
    for h, document in enumerate(split.heldout):
        inside = found[np.searchsorted(vocabulary, held[h])]
        contained = float(inside.mean()) if len(inside) else 0.0
        result.append(Overlap(document.url, nearest[h], float(best[h]), contained))
    return result


def _shingles(documents: Sequence[Document], ngram: int) -> list[U64]:
    result: list[U64] = []
    for _, table in blocks([document.text for document in documents]):
        shingles, bounds = table.shingles(ngram)
        result.extend(shingles[bounds[d] : bounds[d + 1]] for d in range(len(table)))
    return result
