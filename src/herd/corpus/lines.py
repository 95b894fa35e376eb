"""Boilerplate lines: what many documents share word for word, such as licence headers and page furniture.

As CCNet does, lines are compared after dropping case, digits, punctuation and spaces around, so that "(C) 2001" and
"(c) 2007" are one line; as the Llama 3 paper does, a line seen more than 6 times goes. Code is treated with care, as
its most frequent lines (`return None`) are not boilerplate: only comments qualify, and only where the removal
provably leaves the program alone.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from herd.corpus.document import Document

_NOT_WORD = re.compile(r"[\W_]+")
_DIGITS = re.compile(r"\d")
_LICENCE = re.compile(
    r"copyright|licen[cs]e|all rights reserved|spdx|contributor agreement|warrant|redistribut|permission", re.I
)
_MIN_COMMENT = 8  # characters of a comment's key; shorter ones are dividers and remarks such as "# XXX"
_EXAMPLES = 20


@dataclass(frozen=True)
class _Style:
    """How a language writes comments."""

    line: tuple[str, ...] = ()
    block: tuple[str, str] | None = None


_C_BLOCK = ("/*", "*/")
_STYLES: dict[str, _Style] = {
    suffix: style
    for suffixes, style in (
        (".py .pyi .pyx .sh .bash .zsh .rb .pl .pm .yaml .yml .toml .r .jl .cmake .mk .ex .exs .nim", _Style(("#",))),
        (".c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .mjs .ts .tsx .jsx", _Style(("//",), _C_BLOCK)),
        (".swift .m .mm .cs .fs .zig .d .scss .php", _Style(("//",), _C_BLOCK)),
        (".css", _Style((), _C_BLOCK)),
        (".sql .lua .hs", _Style(("--",))),
        (".clj .lisp .el .scm .asm", _Style((";",))),
        (".ini .cfg", _Style(("#", ";"))),
        (".erl", _Style(("%",))),
        (".f90", _Style(("!",))),
        (".vue", _Style((), ("<!--", "-->"))),
    )
    for suffix in suffixes.split()
}


@dataclass
class LineReport:
    """What was removed: lines, bytes and documents touched; the most frequent lines and how often they were removed."""

    lines: int = 0
    bytes: int = 0
    documents: int = 0
    examples: list[tuple[str, int]] = field(default_factory=list)


def line_key(line: str) -> str:
    """What two lines must share to be the same line; "" for a line without letters and digits."""
    return _DIGITS.sub("0", _NOT_WORD.sub(" ", line.lower())).strip()


def remove_boilerplate(
    documents: Sequence[Document], *, max_documents: int, min_words: int
) -> tuple[list[Document], LineReport]:
    """Remove lines that occur in more than `max_documents` documents of their kind.

    Prose loses such lines when they have at least `min_words` words and are not indented as quoted code is. Code loses
    whole comment lines: those of the header before the first statement, and in Python anywhere, if the syntax tree
    stays equal. There a frequent line goes only together with another one beside it or if it speaks of a licence, so a
    single common remark stays. Returns the documents in order (some now shorter, perhaps empty) and the report.
    """
    parts = [_Code(document) if document.kind == "code" else _Prose(document, min_words) for document in documents]
    counts: dict[str, Counter[str]] = {"code": Counter(), "prose": Counter()}
    for document, part in zip(documents, parts, strict=True):
        counts[document.kind].update(set(part.keys.values()))
    frequent = {kind: {key for key, n in counter.items() if n > max_documents} for kind, counter in counts.items()}

    report, result = LineReport(), []
    removed: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for document, part in zip(documents, parts, strict=True):
        dropped = part.removable(frequent[document.kind])
        if not dropped:
            result.append(document)
            continue
        lines = document.text.split("\n")
        shorter = replace(document, text=_without(lines, dropped))
        report.lines += len(dropped)
        report.bytes += document.n_bytes - shorter.n_bytes
        report.documents += 1
        for i in dropped:
            if key := part.keys.get(i):
                removed[key] += 1
                shown.setdefault(key, lines[i].strip()[:120])
        result.append(shorter)
    report.examples = [(shown[key], n) for key, n in removed.most_common(_EXAMPLES)]
    return result, report


def _without(lines: Sequence[str], dropped: set[int]) -> str:
    text = "\n".join(line for i, line in enumerate(lines) if i not in dropped).strip("\n")
    return text + "\n" if text else ""


class _Prose:
    """The lines of prose that may count as boilerplate, by number."""

    def __init__(self, document: Document, min_words: int) -> None:
        self.keys: dict[int, str] = {}
        for i, line in enumerate(document.text.split("\n")):
            if line and not line.startswith(("    ", "\t")):
                key = line_key(line)
                if sum(word[0].isalpha() for word in key.split()) >= min_words:
                    self.keys[i] = key

    def removable(self, frequent: set[str]) -> set[int]:
        return {i for i, key in self.keys.items() if key in frequent}


class _Code:
    """The comment lines of source code, by number, in runs of neighbours."""

    def __init__(self, document: Document) -> None:
        suffix = PurePosixPath(document.url).suffix.lower()
        self._text = document.text
        self._style = _STYLES.get(suffix, _Style())
        self._python = suffix == ".py"
        self._lines = document.text.split("\n")
        self._runs, self._header_end = self._find_runs()
        self.keys: dict[int, str] = {}
        for i in (i for run in self._runs for i in run):
            key = line_key(self._lines[i])
            if len(key) >= _MIN_COMMENT:
                self.keys[i] = key

    def removable(self, frequent: set[str]) -> set[int]:
        marked = {i for i, key in self.keys.items() if key in frequent}
        if not marked:
            return set()
        header = {i for run in self._runs if run[-1] < self._header_end for i in self._drop_from_run(run, marked)}
        everywhere = {i for run in self._runs for i in self._drop_from_run(run, marked)}
        if everywhere == header or _same_program(self._text, _without(self._lines, everywhere)):
            return everywhere
        return header

    def _find_runs(self) -> tuple[list[list[int]], int]:
        """Runs of neighbouring whole-line comments, and the number of the first line that is neither comment nor blank.

        Beyond the header only Python is searched: there a marker may stand inside a string, which Python's own parser
        can tell (see `removable`), and no other language has one here.
        """
        runs: list[list[int]] = []
        lines, i, header_end = self._lines, 0, len(self._lines)
        while i < len(lines):
            stripped = lines[i].strip()
            if stripped.startswith("#!") and i == 0:
                pass
            elif self._style.line and stripped.startswith(self._style.line):
                if runs and runs[-1][-1] == i - 1 and not self._is_block(runs[-1]):
                    runs[-1].append(i)
                else:
                    runs.append([i])
            elif stripped and header_end > i:
                block = self._block_at(i)
                if block:
                    runs.append(block)
                    i = block[-1]
                else:
                    header_end = i
                    if not self._python:
                        break
            i += 1
        return runs, header_end

    def _block_at(self, start: int) -> list[int] | None:
        """The lines of a block comment that begins at `start` and has nothing else on its lines."""
        if self._style.block is None or not self._lines[start].lstrip().startswith(self._style.block[0]):
            return None
        closer = self._style.block[1]
        end = start
        skip = len(self._style.block[0])
        while closer not in self._lines[end].lstrip()[skip:]:
            skip, end = 0, end + 1
            if end == len(self._lines):
                return None
        return list(range(start, end + 1)) if self._lines[end].rstrip().endswith(closer) else None

    def _is_block(self, run: Sequence[int]) -> bool:
        return self._style.block is not None and self._lines[run[0]].lstrip().startswith(self._style.block[0])

    def _drop_from_run(self, run: Sequence[int], marked: set[int]) -> Iterable[int]:
        """The frequent lines of one run of comments, with the empty comment lines between and beside them."""
        droppable = [i in marked or not line_key(self._lines[i]) for i in run]
        if self._is_block(run):
            # A block comment goes whole or not at all: half of one would not be a comment any more.
            return run if all(droppable) and any(i in marked for i in run) else ()
        dropped: set[int] = set()
        start = 0
        while start < len(run):
            end = start
            while end < len(run) and droppable[end]:
                end += 1
            chosen = [i for i in run[start:end] if i in marked]
            if len(chosen) > 1 or any(_LICENCE.search(self._lines[i]) for i in chosen):
                dropped.update(run[start:end])
            start = max(end, start + 1)
        return dropped


def _same_program(text: str, shorter: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign code may hold invalid escapes; they concern its author
            return ast.dump(ast.parse(text)) == ast.dump(ast.parse(shorter))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
