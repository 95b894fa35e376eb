"""Sources, decoding and normalising: what is read, what is skipped, and what a text looks like afterwards."""

from __future__ import annotations

import gzip
import io
import json
import os
import sysconfig
import time
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd import HerdError, UsageError
from herd.corpus import Document, SourceReport, read_documents, read_sources, source_files, write_documents
from herd.corpus.decode import BinaryData, decode
from herd.corpus.normalise import normalise


def read(*sources: object, **options: int) -> tuple[list[Document], SourceReport]:
    report = SourceReport()
    return list(read_sources([str(source) for source in sources], report=report, **options)), report


def test_corpus_stdlib_is_this_pythons_own_library() -> None:
    documents, report = read("python-stdlib")
    by_url = {document.url: document for document in documents}
    root = Path(sysconfig.get_path("stdlib"))
    assert by_url["python-stdlib/json/encoder.py"].text == (root / "json/encoder.py").read_text("utf-8")
    assert by_url["python-stdlib/json/encoder.py"].group == by_url["python-stdlib/json/__init__.py"].group
    assert by_url["python-stdlib/argparse.py"].group == "python-stdlib/argparse"
    assert all(document.kind == "code" for document in documents)
    assert not [url for url in by_url if "site-packages" in url or "/test/" in url or "/tests/" in url]
    assert not [url for url in by_url if str(root) in url or "_sysconfigdata" in url]
    assert report.documents == len(documents) > 300
    assert list(by_url) == [document.url for document in read("python-stdlib")[0]]


def test_corpus_folder_reads_text_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.md").write_text("two")
    (tmp_path / "a.py").write_text("one = 1\n")
    (tmp_path / "latin.txt").write_bytes("Grüße aus Köln".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "big.txt").write_bytes(b"x" * 101)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("secret")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "out").symlink_to("/etc", target_is_directory=True)
    documents, report = read(tmp_path, max_document_bytes=100)
    name = tmp_path.name
    assert [d.url for d in documents] == [f"{name}/a.py", f"{name}/b/two.md", f"{name}/latin.txt"]
    assert [d.kind for d in documents] == ["code", "prose", "prose"]
    assert [d.group for d in documents] == [f"{name}/a", f"{name}/b", f"{name}/latin"]
    assert documents[2].text == "Grüße aus Köln"
    assert report.encodings == {"utf-8": 2, "latin-1": 1}
    assert report.skipped == {
        "binary": 1,
        "larger than max_document_bytes": 1,
        "empty": 1,
        "linked folder already read": 1,
        "link that leaves the folder": 1,
        "broken link": 1,
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_corpus_unreadable_file_is_counted_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_text("locked")
    (tmp_path / "b.txt").chmod(0)
    documents, report = read(tmp_path)
    assert len(documents) == 1 and report.skipped == {"unreadable": 1}


@pytest.mark.parametrize("packed", [False, True])
def test_corpus_jsonl(tmp_path: Path, packed: bool) -> None:
    lines = [
        json.dumps({"text": "first", "id": "p-1", "language": "de"}),
        json.dumps({"content": "second", "url": "https://x.org/a", "meta": {"kind": "code", "group": "g", "z": 1}}),
        "{broken",
        json.dumps({"title": "no text"}),
        json.dumps([1, 2]),
        json.dumps({"text": "y" * 300}),
        "",
        json.dumps({"text": "last"}),
    ]
    data = "\n".join(lines).encode()
    path = tmp_path / ("d.jsonl.gz" if packed else "d.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    documents, report = read(path, max_document_bytes=250)
    assert [(d.text, d.url, d.language, d.kind, d.group) for d in documents] == [
        ("first", "p-1", "de", "prose", "p-1"),
        ("second", "https://x.org/a", "en", "code", "g"),
        ("last", f"{path.name}:8", "en", "prose", f"{path.name}:8"),
    ]
    assert report.skipped == {"broken JSON": 1, "no text or content field": 2, "larger than max_document_bytes": 1}


def test_corpus_truncated_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    records = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(2000))
    (tmp_path / "in/a.jsonl.gz").write_bytes(gzip.compress(records)[:-2000])
    (tmp_path / "in/b.jsonl.gz").write_bytes(b"not gzip at all")
    documents, report = read(tmp_path / "in")
    assert 0 < len(documents) < 2000
    assert report.skipped == {"unreadable": 2}


def test_corpus_wrong_sources_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such source.*missing"):
        read(tmp_path / "missing")
    with pytest.raises(UsageError, match="no such source"):
        read("x" * 300)  # longer than any file name
    with pytest.raises(UsageError, match="no source"):
        read()
    (tmp_path / "x.bin").write_bytes(b"\0\1\2")
    with pytest.raises(HerdError, match="gave no document: 1 binary"):
        read(tmp_path)


def test_corpus_names_and_texts_that_are_not_unicode_do_no_harm(tmp_path: Path) -> None:
    lines = [
        '{"text": "a \\ud800 b"}',
        '{"text": "t", "url": "\\udc80", "language": "\\ud800", "meta": {"group": "\\udfff"}}',
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    (tmp_path / "in").mkdir()
    for name, content in ((b"caf\xe9.txt", b"fine"), (b"\xe9.bin", b"\0\1")):
        with open(os.path.join(os.fsencode(tmp_path / "in"), name), "wb") as file:  # noqa: PTH118
            file.write(content)
    documents, report = read(tmp_path / "r.jsonl", tmp_path / "in")
    assert [(d.text, d.url, d.language, d.group) for d in documents] == [
        ("a ? b", "r.jsonl:1", "en", "r.jsonl:1"),
        ("t", "?", "?", "?"),
        ("fine", "in/caf?.txt", "en", "in/caf?"),
    ]
    assert report.examples == {"binary": ["in/?.bin"]}
    write_documents(tmp_path / "out.jsonl", documents)
    assert list(read_documents(tmp_path / "out.jsonl")) == documents


def test_corpus_source_files_are_those_that_are_read(tmp_path: Path) -> None:
    for name in ("b/two.md", "a.py", ".git/index", "__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(source_files(tmp_path)) == [tmp_path / "a.py", tmp_path / "b/two.md"]
    assert list(source_files(tmp_path / ".git/index")) == [tmp_path / ".git/index"]


def test_corpus_same_names_from_two_folders_stay_apart(tmp_path: Path) -> None:
    for parent in "pq":
        (tmp_path / parent / "docs").mkdir(parents=True)
        (tmp_path / parent / "docs/a.txt").write_text(parent)
    documents, _ = read(tmp_path / "p/docs", tmp_path / "q/docs")
    assert [d.url for d in documents] == ["docs/a.txt", "docs/a.txt#2"]


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfx = '\xc3\xa9'\n",
        b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
        b"#!/usr/bin/python\n# vim: set fileencoding=cp1251 :\nx = '\xe9'\n",
        b"x = '\xc3\xa9'\n",
        b"'''doc'''\n# coding: cp1251\nx = '\xc3\xa9'\n",
    ],
)
def test_corpus_python_source_decodes_as_python_does(data: bytes) -> None:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    assert decode(data, python_source=True)[0] == data.decode(encoding)


def test_corpus_decode_marks_and_binaries() -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert decode("Ωmega\n".encode(encoding))[0] == "Ωmega\n"
    assert decode(b"caf\xe9") == ("café", "latin-1")
    # Codecs from bytes to bytes are not run on a stranger's word.
    assert decode(b"# coding: hex\n61\n", python_source=True) == ("# coding: hex\n61\n", "utf-8")
    for data in (b"ab\0cd", bytes(range(1, 9)) * 4, b"x" * 9000 + b"\0"):
        with pytest.raises(BinaryData):
            decode(data)


@given(st.text(), st.booleans())
def test_corpus_normalise_is_idempotent_and_clean(text: str, code: bool) -> None:
    once = normalise(text, code=code)
    assert normalise(once, code=code) == once
    assert not set(once) & {chr(i) for i in range(32) if i not in (9, 10)} and "\x7f" not in once
    assert all(line == line.rstrip(" \t") for line in once.split("\n"))
    assert "\n\n\n\n" not in once and not once.startswith("\n")
    assert once == "" or (once.endswith("\n") and not once.endswith("\n\n"))
    once.encode("utf-8")


def test_corpus_normalise_keeps_code_and_composes_prose() -> None:
    decomposed = "e\u0301\r\nx\r"
    assert normalise(decomposed, code=False) == "é\nx\n"
    assert normalise(decomposed, code=True) == "e\u0301\nx\n"
    assert normalise("page one\x0cpage two", code=False) == "page one\npage two\n"
    assert normalise("\tindented  \n\n\n\n\n\nb\x00", code=True) == "\tindented\n\n\nb\n"
    assert normalise(" \n\t", code=False) == ""
    assert normalise("caf\udce9", code=True) == "caf?\n"


def test_corpus_normalise_takes_long_runs_of_blanks_in_stride() -> None:
    blanks = " \t" * 250_000
    started = time.process_time()
    assert normalise(f"a{blanks}b{blanks}\nc\n", code=True) == f"a{blanks}b\nc\n"
    assert time.process_time() - started < 5  # CPU seconds; quadratic work would take hours


@given(st.lists(st.builds(Document, st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=9))))
def test_corpus_documents_survive_the_file(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    if any("\ud800" <= c <= "\udfff" for d in documents for c in d.url):
        return
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    write_documents(path, documents)
    assert list(read_documents(path)) == documents


def test_corpus_damaged_document_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_documents(path, [Document("a", "u")])
    path.write_text(path.read_text() + '{"text": 1\n')
    with pytest.raises(HerdError, match=r"train\.jsonl, field line 2"):
        list(read_documents(path))
    with pytest.raises(HerdError, match="cannot be read"):
        list(read_documents(tmp_path / "none.jsonl"))
