"""Where documents come from: the Python standard library, folders, JSON Lines files and text files.

Nothing found on the way is fatal: binary files, unreadable files and broken records are skipped and counted in a
`SourceReport`. Only a source that does not exist, or that yields nothing at all, is an error.
"""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from herd.corpus.decode import BinaryData, decode
from herd.corpus.document import Document
from herd.corpus.normalise import well_formed
from herd.errors import HerdError, UsageError

STDLIB = "python-stdlib"
_CODE = """
    .py .pyi .pyx .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .mjs .ts .tsx .jsx .rb .php .pl .pm .lua .sh
    .bash .zsh .swift .m .mm .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .jl .r .sql .zig .nim .d .f90 .asm
    .s .cmake .mk .toml .yaml .yml .ini .cfg .css .scss .vue
"""
CODE_SUFFIXES = frozenset(_CODE.split())
_JSONL = (".jsonl", ".jsonl.gz")
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
# Tests repeat their subject and are full of odd literals; the last two hold this build's settings, not source code.
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "lib-dynload"})
_STDLIB_SKIPPED_STARTS = ("config-", "_sysconfigdata")
_EXAMPLES = 5


@dataclass
class SourceReport:
    """What was read, what was skipped and why; filled while `read_sources` runs."""

    documents: int = 0
    bytes: int = 0
    encodings: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Count one skipped file or record; the first few names of each reason are kept."""
        self.skipped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(well_formed(name))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for stats.json."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "encodings": dict(sorted(self.encodings.items())),
            "skipped": {
                reason: {"count": count, "examples": self.examples[reason]}
                for reason, count in sorted(self.skipped.items())
            },
        }


def read_sources(
    sources: Iterable[str | os.PathLike[str]],
    *,
    report: SourceReport | None = None,
    max_document_bytes: int = 16 * 2**20,
) -> Iterator[Document]:
    """Yield the documents of all sources, in the same order on every machine.

    A source is "python-stdlib", a folder (every text file below it), a *.jsonl or *.jsonl.gz file whose records have a
    "text" or "content" field, or a text file. `report` collects counts. Raises UsageError for a source that does not
    exist and HerdError for one that yields no document.
    """
    report = report if report is not None else SourceReport()
    names = [os.fspath(source) for source in sources]
    check_sources(names)
    seen: set[str] = set()
    for source in names:
        before, skipped_before = report.documents, report.skipped.copy()
        for document in _read_one(source, report, max_document_bytes):
            document = _with_unique_url(_writable(document), seen)
            report.documents += 1
            report.bytes += document.n_bytes
            yield document
        if report.documents == before:
            skipped = report.skipped - skipped_before
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "it is empty"
            raise HerdError(
                f"the source {source!r} gave no document: {reasons}",
                allowed="text files, or records with a non-empty text or content field",
            )


def check_sources(sources: Sequence[str]) -> None:
    """Raises UsageError where no source is given or one does not exist."""
    if not sources:
        raise UsageError("no source was given", allowed=f"{STDLIB}, folders, *.jsonl, *.jsonl.gz, text files")
    for source in sources:
        if source != STDLIB and not os.path.exists(source):  # noqa: PTH110 (Path.exists raises for a name too long)
            raise UsageError(
                "there is no such source",
                value=source,
                allowed=f"{STDLIB}, an existing folder, *.jsonl, *.jsonl.gz or text file",
            )


def source_files(source: str | os.PathLike[str]) -> Iterator[Path]:
    """The files that `read_sources` opens for a folder or a file: hidden and skipped entries are not among them."""
    path = Path(source)
    yield from _walk(path, SourceReport()) if os.path.isdir(source) else [path]  # noqa: PTH112 (as above)


def _writable(document: Document) -> Document:
    """The document in Unicode that a file can hold, whatever its text, its name and its record came with."""
    meta = {key: well_formed(value) for key, value in document.meta.items()}
    return Document(well_formed(document.text), well_formed(document.url), well_formed(document.language), meta)


def _with_unique_url(document: Document, seen: set[str]) -> Document:
    """Two sources may use one name (two folders called docs); later ones get a number."""
    url, number = document.url, 1
    while url in seen:
        number += 1
        url = f"{document.url}#{number}"
    seen.add(url)
    return document if url == document.url else Document(document.text, url, document.language, document.meta)


def _read_one(source: str, report: SourceReport, limit: int) -> Iterator[Document]:
    if source == STDLIB:
        yield from _read_stdlib(report, limit)
    elif Path(source).is_dir():
        label = Path(source).resolve().name or "root"
        for path in _walk(Path(source), report):
            yield from _read_file(path, label, path.relative_to(source).as_posix(), report, limit)
    else:
        yield from _read_file(Path(source), "", Path(source).name, report, limit)


def _read_stdlib(report: SourceReport, limit: int) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, report, _STDLIB_SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not name.startswith(_STDLIB_SKIPPED_STARTS):
            yield from _read_file(path, STDLIB, name, report, limit)


def _walk(root: Path, report: SourceReport, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `root` in sorted order. Hidden entries are left out; a folder reached twice by links is read once."""
    visited: set[tuple[int, int]] = set()
    real_root = root.resolve()

    def visit(folder: Path) -> Iterator[Path]:
        name = folder.relative_to(root).as_posix()
        try:
            status = folder.stat()
            entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
        except OSError:
            report.skip("unreadable folder", name)
            return
        if (status.st_dev, status.st_ino) in visited:
            report.skip("linked folder already read", name)
            return
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _SKIPPED_FOLDERS or entry.name in skipped:
                continue
            try:
                if entry.is_symlink() and not entry.exists():
                    report.skip("broken link", entry.relative_to(root).as_posix())
                elif entry.is_symlink() and not entry.resolve().is_relative_to(real_root):
                    report.skip("link that leaves the folder", entry.relative_to(root).as_posix())
                elif entry.is_dir():
                    yield from visit(entry)
                elif entry.is_file():
                    yield entry
                else:
                    report.skip("not a regular file", entry.relative_to(root).as_posix())
            except OSError:
                report.skip("unreadable", entry.relative_to(root).as_posix())

    yield from visit(root)


def _read_file(path: Path, label: str, name: str, report: SourceReport, limit: int) -> Iterator[Document]:
    url = f"{label}/{name}" if label else name
    try:
        if name.endswith(_JSONL):
            yield from _read_jsonl(path, url, report, limit)
            return
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        report.skip("unreadable", f"{url}: {getattr(error, 'strerror', None) or type(error).__name__}")
        return
    if len(data) > limit:
        report.skip("larger than max_document_bytes", url)
        return
    suffix = path.suffix.lower()
    try:
        text, encoding = decode(data, python_source=suffix in (".py", ".pyi", ".pyx"))
    except BinaryData:
        report.skip("binary", url)
        return
    if not text.strip():
        report.skip("empty", url)
        return
    report.encodings[encoding] += 1
    # Everything under one top-level module or folder shares a group, so siblings never straddle the split.
    top = name.split("/", 1)[0]
    group = f"{label}/{top.removesuffix(path.suffix) if top == name else top}" if label else url
    kind = "code" if suffix in CODE_SUFFIXES else "prose"
    yield Document(text, url, meta={"kind": kind, "group": group})


def _read_jsonl(path: Path, url: str, report: SourceReport, limit: int) -> Iterator[Document]:
    with open(path, "rb") as raw:
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
        for number, line in enumerate(_lines(file, limit), 1):
            where = f"{url}:{number}"
            if line is None:
                report.skip("larger than max_document_bytes", where)
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if line.strip():
                    report.skip("broken JSON", where)
                continue
            text = (record.get("text") or record.get("content")) if isinstance(record, dict) else None
            if not isinstance(text, str) or not text.strip():
                report.skip("no text or content field", where)
                continue
            report.encodings["utf-8"] += 1
            yield _from_record(record, text, where)


def _from_record(record: dict[str, Any], text: str, where: str) -> Document:
    """A Document of foreign JSON: known fields are taken when they have the right type, all others are dropped."""
    names = [record.get(key) for key in ("url", "id", "path")]
    url = next((name for name in names if isinstance(name, str) and name), where)
    language = record.get("language")
    meta = record.get("meta")
    kept = {}
    if isinstance(meta, dict):
        kept = {key: meta[key] for key in ("kind", "group") if isinstance(meta.get(key), str)}
    kept.setdefault("kind", "code" if Path(url).suffix.lower() in CODE_SUFFIXES else "prose")
    return Document(text, url, language if isinstance(language, str) else "en", kept)


def _lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines of a file; None for one that is longer than `limit` bytes, which is skipped without being held."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
            pass
        yield None
