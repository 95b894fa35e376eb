"""Words, shingles, MinHash, clusters and boilerplate lines against brute force."""

from __future__ import annotations

import ast
import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.corpus import Document
from herd.corpus.lines import line_key, remove_boilerplate
from herd.corpus.minhash import UnionFind, jaccard, lsh_parameters, near_duplicate_clusters, signatures
from herd.corpus.table import TextTable, blocks

WORDS = [f"w{i}" for i in range(400)]
TEXTS = st.lists(st.text(st.sampled_from("abAB_1 .\n\té中ก"), max_size=30), min_size=1, max_size=6)


def words_of(text: str) -> list[str]:
    """The definition, by regular expression: runs of word characters, wide characters opening words of their own."""
    found = re.findall(r"(?:[\u0800-\U0010ffff]|[0-9A-Za-z_\x80-\u07ff])[0-9A-Za-z_\x80-\u07ff]*", text)
    return [re.sub("[A-Z]", lambda m: m.group().lower(), word) for word in found]


def shingles_of(text: str, n: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()


@given(TEXTS)
def test_corpus_table_finds_words_and_lines(texts: list[str]) -> None:
    table = TextTable(texts)
    data = table.bytes_N.tobytes()
    for spans, expected in (
        (table.words, [words_of(text) for text in texts]),
        (table.lines, [[line.strip(" \t") for line in text.split("\n") if line.strip(" \t")] for text in texts]),
    ):
        for d in range(len(texts)):
            rows = range(spans.bounds[d], spans.bounds[d + 1])
            found = [data[spans.starts[i] : spans.ends[i]].decode() for i in rows]
            if spans is table.words:
                found = [re.sub("[A-Z]", lambda m: m.group().lower(), word) for word in found]
            assert found == expected[d]
    flat = [word for text in texts for word in words_of(text)]
    hashes = table.word_hashes.tolist()
    assert len(set(zip(flat, hashes, strict=True))) == len(set(flat)) == len(set(hashes))


@given(TEXTS, st.integers(1, 6))
def test_corpus_shingle_hashes_match_shingles(texts: list[str], n: int) -> None:
    hashes, bounds = TextTable(texts).shingles(n)
    for d, text in enumerate(texts):
        expected = shingles_of(text, n)
        assert len(set(hashes[bounds[d] : bounds[d + 1]].tolist())) == len(expected)
    for a, b in combinations(range(len(texts)), 2):
        A, B = (np.unique(hashes[bounds[d] : bounds[d + 1]]) for d in (a, b))
        sa, sb = shingles_of(texts[a], n), shingles_of(texts[b], n)
        assert jaccard(A, B) == pytest.approx(len(sa & sb) / max(len(sa | sb), 1))


def test_corpus_hashes_do_not_depend_on_the_block() -> None:
    texts = ["alpha beta gamma " * 20, "beta gamma", "delta"]
    whole = TextTable(texts).word_hashes
    parts = np.concatenate([table.word_hashes for _, table in blocks(texts, limit=5)])
    assert (whole == parts).all() and len(list(blocks(texts, limit=5))) == 3


@pytest.mark.parametrize(("threshold", "expected"), [(0.7, (14, 9)), (0.8, (9, 13)), (0.9, (5, 25))])
def test_corpus_lsh_parameters_are_the_published_ones(threshold: float, expected: tuple[int, int]) -> None:
    assert lsh_parameters(threshold, 128, false_negative_weight=0.5) == expected


def mutate(words: list[str], rng: random.Random, changes: int) -> list[str]:
    words = list(words)
    for _ in range(changes):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return words


def test_corpus_signature_agreement_estimates_jaccard() -> None:
    rng = random.Random(0)
    base = [rng.choice(WORDS) for _ in range(600)]
    texts = [" ".join(mutate(base, rng, changes)) for changes in (0, 3, 10, 30, 60)]
    found, has_words = signatures(texts, ngram=3, permutations=512)
    assert has_words.all()
    for a, b in combinations(range(len(texts)), 2):
        sa, sb = shingles_of(texts[a], 3), shingles_of(texts[b], 3)
        true = len(sa & sb) / len(sa | sb)
        # Standard deviation sqrt(s (1 - s) / 512) <= 0.0221; four of them.
        assert (found[a] == found[b]).mean() == pytest.approx(true, abs=0.09)


def test_corpus_clusters_equal_brute_force() -> None:
    rng = random.Random(1)
    texts = []
    for _ in range(25):
        base = [rng.choice(WORDS) for _ in range(rng.randrange(30, 300))]
        texts += [" ".join(mutate(base, rng, changes)) for changes in (0, 1, 2, rng.randrange(20, 25))]
    rng.shuffle(texts)
    texts += ["", "  !!", "x", "x", "a b"]
    union = UnionFind(len(texts))
    margin = []
    for i, j in combinations(range(len(texts)), 2):
        a, b = shingles_of(texts[i], 5), shingles_of(texts[j], 5)
        similarity = len(a & b) / max(len(a | b), 1)
        margin.append(abs(similarity - 0.7))
        if similarity >= 0.7:
            union.union(i, j)
    expected: dict[int, list[int]] = {}
    for i in range(len(texts)):
        expected.setdefault(union.find(i), []).append(i)
    clusters = near_duplicate_clusters(texts, ngram=5, permutations=128, threshold=0.7)
    assert clusters == [members for members in expected.values() if len(members) > 1]
    assert len(clusters) > 20


def test_corpus_large_family_of_copies_is_one_cluster() -> None:
    rng = random.Random(2)
    base = [rng.choice(WORDS) for _ in range(400)]
    texts = [" ".join(mutate(base, rng, 1)) for _ in range(300)] + ["something else entirely, quite short"]
    assert near_duplicate_clusters(texts, ngram=5, permutations=128, threshold=0.7) == [list(range(300))]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19))))
def test_corpus_union_find_is_connectivity(edges: list[tuple[int, int]]) -> None:
    union = UnionFind(20)
    reach = np.eye(20, dtype=bool)
    for i, j in edges:
        union.union(i, j)
        reach[i, j] = reach[j, i] = True
    for _ in range(5):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    for i in range(20):
        assert union.find(i) == int(np.flatnonzero(reach[i])[0])


LICENCE = "# Copyright (C) {year} Some Foundation\n# All rights reserved by the foundation.\n#\n"


def module(i: int, body: str = "") -> Document:
    text = f"{LICENCE.format(year=1990 + i)}\nimport os\n\n\ndef f{i}():\n    return None\n{body}"
    return Document(text, f"m{i}.py", meta={"kind": "code"})


def test_corpus_licence_headers_go_and_code_stays() -> None:
    documents = [module(i) for i in range(7)]
    cleaned, report = remove_boilerplate(documents, max_documents=6, min_words=4)
    for i, document in enumerate(cleaned):
        assert document.text == f"import os\n\n\ndef f{i}():\n    return None\n"
    assert (report.lines, report.documents) == (21, 7)
    assert report.bytes == sum(d.n_bytes for d in documents) - sum(d.n_bytes for d in cleaned)
    same, _ = remove_boilerplate(documents[:6], max_documents=6, min_words=4)
    assert same == documents[:6]


def test_corpus_comment_lines_inside_strings_stay() -> None:
    body = 'TEXT = """\n# Copyright (C) 2001 Some Foundation\n# All rights reserved by the foundation.\n"""\n'
    cleaned, _ = remove_boilerplate([module(i, body) for i in range(8)], max_documents=6, min_words=4)
    for document in cleaned:
        assert document.text.endswith(body) and document.text.startswith("import os")


def test_corpus_single_common_remark_and_shebang_stay() -> None:
    documents = [
        Document(
            f"#!/usr/bin/env python3\n# common functions for the tests\nx = {i}\n", f"{i}.py", meta={"kind": "code"}
        )
        for i in range(9)
    ]
    assert remove_boilerplate(documents, max_documents=6, min_words=4)[0] == documents


def test_corpus_includes_and_selectors_are_not_comments() -> None:
    c = [
        Document(
            "/*\n * Copyright 2020 by Somebody Anybody\n * All rights reserved.\n */\n#include <stdio.h>\n"
            f"#include <stdlib.h>\nint f{i};\n",
            f"{i}.c",
            meta={"kind": "code"},
        )
        for i in range(9)
    ]
    css = [
        Document(f"#navigation {{ }}\n#navigation2 {{ }}\na{i} {{}}\n", f"{i}.css", meta={"kind": "code"})
        for i in range(9)
    ]
    cleaned, _ = remove_boilerplate([*c, *css], max_documents=6, min_words=4)
    assert [d.text for d in cleaned[:9]] == [f"#include <stdio.h>\n#include <stdlib.h>\nint f{i};\n" for i in range(9)]
    assert cleaned[9:] == css


def test_corpus_block_comment_goes_whole_or_not_at_all() -> None:
    own = [
        Document(
            f"/* Copyright 2020 by Somebody Anybody\n * but file {chr(97 + i)} is special */\nint x;\n",
            f"{i}.c",
            meta={"kind": "code"},
        )
        for i in range(9)
    ]
    assert remove_boilerplate(own, max_documents=6, min_words=4)[0] == own


def test_corpus_prose_loses_repeated_lines_but_not_headings_or_quoted_code() -> None:
    documents = [
        Document(
            f"Introduction\nThis text number {i} is shared by all.\n"
            f"    this code is shared by all of them\nown {'z' * i} words\n",
            f"{i}.txt",
        )
        for i in range(7)
    ]
    cleaned, _ = remove_boilerplate(documents, max_documents=6, min_words=4)
    assert [d.text for d in cleaned] == [
        f"Introduction\n    this code is shared by all of them\nown {'z' * i} words\n" for i in range(7)
    ]


def test_corpus_line_key_is_ccnets() -> None:
    assert line_key("  # Copyright (C) 2001-2007  Foo, Inc.") == line_key("# copyright (c) 1999-2003 foo inc")
    assert line_key("# -------- #") == ""


COMMENTS = st.sampled_from(
    ["# shared line number one", "# shared line number two", "# licence: shared number", "#", "x = 1", "", "if x:",
     "    # shared line number one", "    pass", "s = '''", "'''", "def f(): return None"]
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.lists(COMMENTS, max_size=9), min_size=1, max_size=6))
def test_corpus_python_programs_never_change(bodies: list[list[str]]) -> None:
    documents = [Document("\n".join(body) + "\n", f"{i}.py", meta={"kind": "code"}) for i, body in enumerate(bodies)]
    cleaned, _ = remove_boilerplate(documents, max_documents=1, min_words=1)
    for before, after in zip(documents, cleaned, strict=True):
        kept = [line for line in before.text.split("\n") if not line.lstrip().startswith("#")]
        # Whatever is not a comment stays, line by line; and what parses still means the same.
        assert [line for line in after.text.split("\n") if line and not line.lstrip().startswith("#")] == [
            line for line in kept if line
        ]
        try:
            tree = ast.dump(ast.parse(before.text))
        except SyntaxError:
            continue
        assert ast.dump(ast.parse(after.text)) == tree
