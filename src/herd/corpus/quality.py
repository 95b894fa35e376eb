"""Quality heuristics: a dozen numbers per document, and the limits that turn them into reasons for removal.

After Gopher (repetition, word lengths, symbols), C4 and the Llama 3 paper §3.1.1 (duplicated n-gram coverage, dirty
words, KL divergence of the distribution from that of the corpus), adapted to source code as StarCoder's filters were
(line lengths, generated files, data tables). All signals of a block of documents come from one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from herd.corpus.config import Quality
from herd.corpus.document import Document
from herd.corpus.table import TextTable, blocks, mix

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_NGRAM = 10  # Gopher's longest; the share of words inside repeated ones measures long repeated passages
_DIGITS_FROM_BYTES = 2048  # small modules of named constants are not data tables
_GENERATED_LINES = 12
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|@generated\b"
    r"|generated (by|from|with) ['\"]?[\w./-]+\.(py|pl|sh|rb|js|c|awk|txt|xml|y|l|in)\b",
    re.I,
)
_LETTERS = np.zeros(256, dtype=bool)
_LETTERS[[*range(65, 91), *range(97, 123), *range(128, 256)]] = True
_DIGITS = np.zeros(256, dtype=bool)
_DIGITS[48:58] = True
_SPACES = np.zeros(256, dtype=bool)
_SPACES[[9, 10, 32]] = True


@dataclass(frozen=True)
class Signals:
    """One array [D] per signal; the docstrings of `Quality`'s fields say what each means."""

    bytes: I64
    words: I64
    mean_word: F64
    max_line: I64
    mean_line: F64
    letters: F64
    symbols: F64
    digits: F64
    duplicate_lines: F64
    duplicate_ngrams: F64
    dirty_words: F64
    divergence: F64


def measure(documents: Sequence[Document], dirty_words: Iterable[str] = ()) -> Signals:
    """Compute all signals of all documents."""
    texts = [document.text for document in documents]
    dirty = _hashes_of_words(dirty_words)
    columns: dict[str, list[npt.NDArray[np.generic]]] = {}
    histograms = np.zeros((len(texts), 256))
    for first, table in blocks(texts):
        histogram = _byte_histograms(table)
        histograms[first : first + len(table)] = histogram
        for name, column in _measure_block(table, histogram, dirty).items():
            columns.setdefault(name, []).append(column)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Signals(**joined, divergence=_divergence(histograms, [document.kind for document in documents]))


def reasons(documents: Sequence[Document], signals: Signals, limits: dict[str, Quality]) -> list[str | None]:
    """The first limit each document breaks, as "field (value)" with its name in `Quality`; None for a good document."""
    result: list[str | None] = []
    for d, document in enumerate(documents):
        result.append(_reason(document, d, signals, limits[document.kind]))
    return result


def _reason(document: Document, d: int, s: Signals, q: Quality) -> str | None:
    large = s.bytes[d] >= _DIGITS_FROM_BYTES
    rules: tuple[tuple[str, float | None, float, int], ...] = (
        # name of the limit, limit, value, +1 if the value may not exceed it, -1 if it may not fall below
        ("min_bytes", q.min_bytes, s.bytes[d], -1),
        ("max_bytes", q.max_bytes, s.bytes[d], 1),
        ("min_words", q.min_words, s.words[d], -1),
        ("max_mean_word", q.max_mean_word, s.mean_word[d], 1),
        ("max_line", q.max_line, s.max_line[d], 1),
        ("max_mean_line", q.max_mean_line, s.mean_line[d], 1),
        ("min_letters", q.min_letters, s.letters[d], -1),
        ("max_symbols", q.max_symbols, s.symbols[d], 1),
        ("max_digits", q.max_digits if large else None, s.digits[d], 1),
        ("max_duplicate_lines", q.max_duplicate_lines, s.duplicate_lines[d], 1),
        ("max_duplicate_ngrams", q.max_duplicate_ngrams, s.duplicate_ngrams[d], 1),
        ("max_dirty_words", q.max_dirty_words, s.dirty_words[d], 1),
        ("max_divergence", q.max_divergence if large else None, s.divergence[d], 1),
    )
    if q.drop_generated and document.kind == "code" and _says_generated(document.text):
        return "drop_generated"
    for name, limit, value, sign in rules:
        if limit is not None and sign * value > sign * limit:
            return f"{name} ({value:.6g})"
    return None


def _says_generated(text: str) -> bool:
    head = text[:4000].split("\n", _GENERATED_LINES)[:_GENERATED_LINES]
    return any(_GENERATED.search(line) for line in head)


def _measure_block(
    table: TextTable, histogram: F64, dirty: npt.NDArray[np.uint64]
) -> dict[str, npt.NDArray[np.generic]]:
    words, lines = table.words, table.lines
    n_words, n_lines = np.diff(words.bounds), np.diff(lines.bounds)
    solid = histogram[:, ~_SPACES].sum(1)
    letters, digits = histogram[:, _LETTERS].sum(1), histogram[:, _DIGITS].sum(1)
    return {
        "bytes": np.diff(table.bounds) - 1,  # without the newline that the table adds
        "words": n_words,
        "mean_word": _ratio(_sum_by(words.documents, words.lengths, len(table)), n_words),
        "max_line": _max_by(lines.documents, lines.lengths, len(table)),
        "mean_line": _ratio(_sum_by(lines.documents, lines.lengths, len(table)), n_lines),
        "letters": _ratio(letters, solid),
        "symbols": _ratio(solid - letters - digits, letters),
        "digits": _ratio(digits, solid),
        "duplicate_lines": _duplicate_lines(table),
        "duplicate_ngrams": _duplicate_ngrams(table),
        "dirty_words": _ratio(
            _sum_by(words.documents, np.isin(table.word_hashes, dirty) if len(dirty) else 0 * words.starts, len(table)),
            n_words,
        ),
    }


def _ratio(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> F64:
    """a / b, where b = 0 counts as 1: a document without words or letters has ratio a."""
    return np.asarray(a, dtype=np.float64) / np.maximum(np.asarray(b, dtype=np.float64), 1.0)


def _sum_by(owners: I64, values: npt.NDArray[np.generic], n: int) -> F64:
    return np.asarray(np.bincount(owners, weights=np.asarray(values, dtype=np.float64), minlength=n), dtype=np.float64)


def _max_by(owners: I64, values: I64, n: int) -> I64:
    result = np.zeros(n, dtype=np.int64)
    np.maximum.at(result, owners, values)
    return result


def _byte_histograms(table: TextTable) -> F64:
    counts = np.empty((len(table), 256))
    for d in range(len(table)):
        counts[d] = np.bincount(table.bytes_N[table.bounds[d] : table.bounds[d + 1]], minlength=256)
    return counts


def _repeats(keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """For each key: does an equal one stand before it; does an equal one stand anywhere else."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.zeros(len(keys) + 1, dtype=bool)
    same[1:-1] = ordered[1:] == ordered[:-1]
    before, anywhere = np.empty(len(keys), dtype=bool), np.empty(len(keys), dtype=bool)
    before[order] = same[:-1]
    anywhere[order] = same[:-1] | same[1:]
    return before, anywhere


def _duplicate_lines(table: TextTable) -> F64:
    """Share of the bytes of non-blank lines that repeat an earlier line of the same document."""
    lines = table.lines
    keys = mix(table.line_hashes ^ mix(lines.documents.astype(np.uint64)))
    before, _ = _repeats(keys)
    total = _sum_by(lines.documents, lines.lengths, len(table))
    return _ratio(_sum_by(lines.documents, lines.lengths * before, len(table)), total)


def _duplicate_ngrams(table: TextTable) -> F64:
    """Share of a document's words that lie in an n-gram of words occurring at least twice in the document."""
    shingles, bounds = table.shingles(_NGRAM)
    word_bounds = table.words.bounds
    documents = np.repeat(np.arange(len(table)), np.diff(bounds))
    _, anywhere = _repeats(mix(shingles ^ mix(documents.astype(np.uint64))))
    # Mark where covered stretches begin and end; a word is covered while more have begun than ended.
    first = word_bounds[documents] + np.arange(len(shingles)) - bounds[documents]
    change = np.zeros(word_bounds[-1] + 1, dtype=np.int64)
    np.add.at(change, first[anywhere], 1)
    np.add.at(change, np.minimum(first[anywhere] + _NGRAM, word_bounds[documents[anywhere] + 1]), -1)
    covered = np.cumsum(change[:-1]) > 0
    return _ratio(_sum_by(table.words.documents, covered, len(table)), np.diff(word_bounds))


def _divergence(histograms: F64, kinds: Sequence[str]) -> F64:
    """KL(document || reference) in nats over bytes; the reference is all documents of the same kind and script.

    Scripts are told apart by the share of non-ASCII bytes, so that text in another alphabet is not an outlier as such.
    """
    result = np.zeros(len(histograms))
    if not len(histograms):
        return result
    foreign = histograms[:, 128:].sum(1) > 0.3 * histograms.sum(1)
    code = np.array([kind == "code" for kind in kinds])
    for group in (code & ~foreign, code & foreign, ~code & ~foreign, ~code & foreign):
        if not group.any():
            continue
        counts = histograms[group]
        reference = counts.sum(0) + 1.0
        reference /= reference.sum()
        p = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * np.log(p / reference), 0.0)
        result[group] = terms.sum(1)
    return result


def _hashes_of_words(words: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Hashes as a table has them; a phrase of several words counts by each of its words."""
    return np.unique(TextTable([" ".join(words)]).word_hashes)
