"""Long documents out of related ones: every text once, long enough, and neighbours that brute force finds too."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.corpus import Document
from herd.corpus.order import permutation
from herd.corpus.related import SEPARATOR, join_related

TOPICS = ("apple pear plum", "iron copper zinc", "violin cello flute", "wolf bear lynx")


def _topic_documents() -> list[Document]:
    """Five documents of each topic among words that all share."""
    documents = []
    for number in range(20):
        topic = TOPICS[number % 4].split()
        text = f"the text says {topic[0]} and {topic[1 + number % 2]} {number}"
        documents.append(Document(text, f"site{number}/page"))
    return documents


def _parts(document: Document) -> list[str]:
    return document.meta.get("parts", [document.url])


def test_documents_of_a_topic_come_together() -> None:
    documents = _topic_documents()
    joined = list(join_related(documents, 5 * len(documents[0].text)))
    by_url = {document.url: number % 4 for number, document in enumerate(documents)}
    topics = [[by_url[url] for url in _parts(document)] for document in joined]
    assert all(len(set(topic)) == 1 for topic in topics) and len(topics) == 4
    texts = {document.url: document.text for document in documents}
    assert all(document.text == SEPARATOR.join(texts[url] for url in _parts(document)) for document in joined)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc d", max_size=30), max_size=25), st.integers(1, 200), st.integers(0, 9), st.integers(1, 5))
def test_every_text_is_there_once(texts: list[str], target: int, seed: int, folders: int) -> None:
    documents = [Document(text, f"f{i % folders}/{i}") for i, text in enumerate(texts)]
    joined = list(join_related(documents, target, seed))
    urls = [url for document in joined for url in _parts(document)]
    assert sorted(urls) == sorted(document.url for document in documents if document.text)
    assert [d.url for d in joined] == [d.url for d in join_related(documents, target, seed)]
    for document in joined:  # no longer than the last part makes it
        parts = _parts(document)
        last = next(d for d in documents if d.url == parts[-1])
        assert len(parts) == 1 or document.n_bytes - last.n_bytes - len(SEPARATOR) < target


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9_]+", text.lower()))


def test_the_walk_is_that_of_brute_force() -> None:
    """Every document against every other, all shared words weighed; few enough words that none is left out."""
    rng = np.random.default_rng(4)
    documents = []
    for number in range(40):
        words = [f"w{w}" for w in rng.integers(0, 60, 12)] + ["common"]
        documents.append(Document(" ".join(words), f"folder{number % 3}/{number}"))
    sets = [_words(document.text) for document in documents]
    counts = Counter(itertools.chain.from_iterable(sets))
    weights = {word: math.log(len(documents) / n) for word, n in counts.items() if 2 <= n <= 64}
    used: set[int] = set()
    expected = []
    for first in permutation(len(documents), 7).tolist():
        if first in used:
            continue
        used.add(first)
        walk, size = [first], documents[first].n_bytes
        while size < 400:
            scores = {
                other: sum(weights.get(word, 0.0) for word in sets[walk[-1]] & sets[other])
                for other in range(len(documents))
                if other not in used and any(word in weights for word in sets[walk[-1]] & sets[other])
            }
            if not scores:
                break
            best = max(scores.values())
            near = [other for other in scores if math.isclose(scores[other], best)]
            following = min(near, key=lambda other: ((other - walk[-1]) % 3 != 0, other))
            used.add(following)
            walk.append(following)
            size += 2 + documents[following].n_bytes
        expected.append([documents[i].url for i in walk])
    assert [_parts(document) for document in join_related(documents, 400, 7)] == expected


def test_what_shares_no_word_goes_on_in_its_folder() -> None:
    documents = [Document(chr(97 + i) * 9, f"{'left' if i % 2 else 'right'}/{i}") for i in range(8)]
    joined = [_parts(document) for document in join_related(documents, 10**6)]
    assert sorted(map(len, joined)) == [4, 4]
    assert all(len({url.split("/")[0] for url in urls}) == 1 for urls in joined)
    strangers = [Document(chr(97 + i) * 9, f"host{i}/x") for i in range(8)]
    assert len(list(join_related(strangers, 10**6))) == 8


def test_a_long_document_ends_a_walk() -> None:
    documents = [Document("word " * 100, "a/long"), *(Document("word two", f"a/{i}") for i in range(3))]
    joined = list(join_related(documents, 100))
    assert Document("word " * 100, "a/long") in joined or any(_parts(d)[-1] == "a/long" for d in joined)
    assert list(join_related([], 100)) == []
