"""Long documents out of short ones that belong together: a walk from each document to its nearest unused neighbour.

Text that is long enough for a long context is rare, and unrelated texts end to end teach nothing about looking far
back. Documents are related by the rare words they share, each weighing ln(N / its number of documents); a document
without such a neighbour goes on with one of its own folder or host. The walk is that of In-Context Pretraining (arXiv
2310.10638, over embeddings there); what Gradient's 4M card did to SlimPajama, it does not say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from herd.corpus.document import Document
from herd.corpus.order import permutation
from herd.corpus.table import I64, blocks

SEPARATOR = "\n\n"
"""Between the texts of a long document, which is one document to the attention mask."""

_WORDS = 32  # rarest words by which a document is found
_MOST_DOCUMENTS = 64  # a word of more documents says little, and would make the walk slow


def join_related(documents: Sequence[Document], target_bytes: int, seed: int = 0) -> Iterator[Document]:
    """The same texts, each once, as documents of at least `target_bytes` bytes of UTF-8 where there are enough of them.

    A walk ends as soon as it is long enough, so one that begins with such a document is that alone; one that finds no
    neighbour is as long as it is. `meta` has the urls in "parts"; url and the rest are the first one's. `seed`: of the
    order in which walks begin.
    """
    texts = [document for document in documents if document.text]
    neighbours = _Neighbours(texts)
    used = np.zeros(len(texts), dtype=bool)
    for first in permutation(len(texts), seed).tolist():
        if used[first]:
            continue
        used[first] = True
        walk, size = [first], texts[first].n_bytes
        while size < target_bytes:
            following = neighbours.nearest(walk[-1], used)
            if following is None:
                break
            used[following] = True
            walk.append(following)
            size += len(SEPARATOR) + texts[following].n_bytes
        yield _joined([texts[i] for i in walk])


def _joined(parts: Sequence[Document]) -> Document:
    first = parts[0]
    if len(parts) == 1:
        return first
    meta = first.meta | {"parts": [part.url for part in parts]}
    return replace(first, text=SEPARATOR.join(part.text for part in parts), meta=meta)


class _Neighbours:
    """The rare words of every document, the documents of every rare word, and the documents of every folder."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._words, self._weights = _rare_words([document.text for document in documents])
        self._owners: dict[int, list[int]] = defaultdict(list)
        for number, words in enumerate(self._words):
            for word in words:
                self._owners[word].append(number)
        self._folder_of = [_folder(document) for document in documents]
        self._folders: dict[str, list[int]] = defaultdict(list)
        for number, folder in enumerate(self._folder_of):
            self._folders[folder].append(number)

    def nearest(self, document: int, used: np.ndarray) -> int | None:
        """The unused document that shares the most, else the first one of the same folder, else None."""
        scores: dict[int, float] = defaultdict(float)
        for word in self._words[document]:
            for other in self._owners[word]:
                if not used[other]:
                    scores[other] += self._weights[word]
        folder = self._folder_of[document]
        if scores:
            return min(scores, key=lambda other: (-scores[other], self._folder_of[other] != folder, other))
        siblings = self._folders[folder]
        while siblings and used[siblings[0]]:
            siblings.pop(0)
        return siblings[0] if siblings else None


def _folder(document: Document) -> str:
    """Everything of its url before the last slash: the folder of a file, the host and path of a page."""
    return document.url.rpartition("/")[0]


def _rare_words(texts: Sequence[str]) -> tuple[list[list[int]], dict[int, float]]:
    """Each document's rarest words among those that at least two and at most 64 documents have, and their weights."""
    sets: list[I64] = []
    for _, table in blocks(texts):
        hashes, bounds = table.word_hashes, table.words.bounds
        sets += [np.unique(hashes[bounds[d] : bounds[d + 1]]) for d in range(len(table))]
    words, counts = np.unique(np.concatenate(sets), return_counts=True) if sets else (np.zeros(0), np.zeros(0))
    shared = (counts >= 2) & (counts <= _MOST_DOCUMENTS)
    words, counts = words[shared], counts[shared]
    chosen = []
    for own in sets:
        places = np.searchsorted(words, own)
        places = places[places < len(words)]
        places = places[np.isin(words[places], own)]
        places = np.unique(places)
        rarest = places[np.argsort(counts[places], kind="stable")[:_WORDS]]
        chosen.append(words[rarest].tolist())
    weights = np.log(len(texts) / counts) if len(counts) else np.zeros(0)
    return chosen, dict(zip(words.tolist(), weights.tolist(), strict=True))
