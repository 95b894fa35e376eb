"""The corpus stage: sources in, train.jsonl, heldout.jsonl and stats.json out.

Cheap steps come first, and quality is judged last, when duplicates no longer sway the corpus that the divergence is
measured against. All of the corpus is held in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from herd.corpus.config import CorpusConfig
from herd.corpus.document import Document, write_documents
from herd.corpus.lines import remove_boilerplate
from herd.corpus.minhash import near_duplicate_clusters
from herd.corpus.normalise import normalise
from herd.corpus.quality import measure, reasons
from herd.corpus.sources import SourceReport, read_sources
from herd.corpus.split import Split, is_heldout, overlaps, split_documents
from herd.corpus.stats import CorpusStats, Ledger, Reason, Step, total_bytes
from herd.errors import HerdError
from herd.files import write_json
from herd.progress import status


def curate(config: CorpusConfig, out_dir: str | Path) -> CorpusStats:
    """Read, clean, deduplicate and split the sources; write train.jsonl, heldout.jsonl and stats.json to `out_dir`.

    Equal configuration and input give equal bytes. Raises UsageError for a source that does not exist and HerdError
    when a source is empty or a step removes everything (it names the step and the rules).
    """
    try:
        return _curate(config, Path(out_dir))
    finally:
        status("")


def _curate(config: CorpusConfig, out: Path) -> CorpusStats:
    ledger, report = Ledger(), SourceReport()
    ledger.begin("read", [])
    status("corpus: reading")
    documents = list(read_sources(config.sources, report=report, max_document_bytes=config.max_document_bytes))
    ledger.end(documents)

    for name, function in (
        ("normalise", _normalise),
        ("exact duplicates", _exact_duplicates),
        ("near duplicates", _near_duplicates),
        ("boilerplate lines", _boilerplate_lines),
        ("quality", _quality),
    ):
        status(f"corpus: {name} ({len(documents)} documents)")
        step = ledger.begin(name, documents)
        documents = function(documents, config, step)
        ledger.end(documents)

    status("corpus: split")
    step = ledger.begin("split", documents)
    split, worst = _split(documents, config, step)
    ledger.end([*split.train, *split.heldout])
    if not split.train or (config.heldout_fraction and not split.heldout):
        side = "train" if not split.train else "held-out"
        raise HerdError(
            f"the split left no {side} text",
            value=f"{len(documents)} documents, {total_bytes(documents)} bytes",
            allowed="more text, or another heldout_fraction (0 switches the split off)",
        )
    stats = CorpusStats(
        sources=report.to_dict(),
        steps=ledger.steps,
        train_documents=len(split.train),
        train_bytes=total_bytes(split.train),
        heldout_documents=len(split.heldout),
        heldout_bytes=total_bytes(split.heldout),
        heldout_groups=sorted({document.group for document in split.heldout}),
        split=split.how,
        max_overlap=None if worst is None else round(worst, 4),
        config=config.model_dump(mode="json"),
    )
    write_documents(out / "train.jsonl", split.train)
    write_documents(out / "heldout.jsonl", split.heldout)
    write_json(out / "stats.json", stats.to_dict())
    return stats


def _normalise(documents: Sequence[Document], config: CorpusConfig, step: Step) -> list[Document]:
    result = []
    for document in documents:
        text = normalise(document.text, code=document.kind == "code", form=config.unicode_form)
        if text:
            result.append(replace(document, text=text))
        else:
            step.remove(document, "blank")
    return result


def _exact_duplicates(documents: Sequence[Document], config: CorpusConfig, step: Step) -> list[Document]:
    """Keep one document of each text: a held-out one if there is one, so train never repeats held-out text."""
    if not config.exact_duplicates:
        return list(documents)
    keeper: dict[bytes, int] = {}
    hashes = [hashlib.blake2b(document.text.encode("utf-8"), digest_size=16).digest() for document in documents]
    for i, digest in enumerate(hashes):
        j = keeper.setdefault(digest, i)
        if j != i and _is_heldout(documents[i], config) and not _is_heldout(documents[j], config):
            keeper[digest] = i
    result = []
    for i, document in enumerate(documents):
        kept = keeper[hashes[i]]
        if kept == i:
            result.append(document)
        else:
            step.remove(document, "exact duplicate", f"= {documents[kept].url}")
    return result


def _near_duplicates(documents: Sequence[Document], config: CorpusConfig, step: Step) -> list[Document]:
    """Keep one document of each cluster: held-out before train, then the longest, then the first by name."""
    near = config.near_duplicates
    if not near.enabled:
        return list(documents)
    clusters = near_duplicate_clusters(
        [document.text for document in documents],
        ngram=near.ngram,
        permutations=near.permutations,
        threshold=near.threshold,
    )
    removed = set()
    for cluster in clusters:
        kept = min(
            cluster,
            key=lambda i: (not _is_heldout(documents[i], config), -len(documents[i].text), documents[i].url),
        )
        for i in cluster:
            if i != kept:
                removed.add(i)
                step.remove(documents[i], "near duplicate", f"~ {documents[kept].url}")
    return [document for i, document in enumerate(documents) if i not in removed]


def _boilerplate_lines(documents: Sequence[Document], config: CorpusConfig, step: Step) -> list[Document]:
    if not config.lines.enabled:
        return list(documents)
    result, report = remove_boilerplate(
        documents, max_documents=config.lines.max_documents, min_words=config.lines.min_words
    )
    examples = [f"{line} ({count} times)" for line, count in report.examples]
    if report.lines:
        step.reasons["lines removed"] = Reason(report.documents, report.bytes, examples)
    kept = []
    for document in result:
        if document.text:
            kept.append(document)
        else:
            step.remove(document, "nothing but boilerplate")
    return kept


def _quality(documents: Sequence[Document], config: CorpusConfig, step: Step) -> list[Document]:
    signals = measure(documents, config.dirty_words)
    result = []
    for document, reason in zip(
        documents, reasons(documents, signals, {"code": config.code, "prose": config.prose}), strict=True
    ):
        if reason is None:
            result.append(document)
        else:
            name, _, value = reason.partition(" ")
            step.remove(document, f"{document.kind}.{name}", value)
    return result


def _split(documents: Sequence[Document], config: CorpusConfig, step: Step) -> tuple[Split, float | None]:
    """Split; then drop held-out documents that train repeats. Also returns the largest overlap that remains."""
    split = split_documents(documents, config.heldout_fraction, config.split_seed)
    near = config.near_duplicates
    if not near.enabled:
        return split, None
    worst, kept = 0.0, []
    for document, overlap in zip(split.heldout, overlaps(split, near.ngram), strict=True):
        if overlap.similarity >= near.threshold:
            step.remove(document, "near duplicate in train", f"~ {overlap.nearest} ({overlap.similarity:.2f})")
        elif overlap.contained > near.max_overlap:
            step.remove(document, "repeated in train", f"({overlap.contained:.2f} of its shingles)")
        else:
            worst = max(worst, overlap.contained)
            kept.append(document)
    return replace(split, heldout=kept), worst


def _is_heldout(document: Document, config: CorpusConfig) -> bool:
    return is_heldout(document, config.heldout_fraction, config.split_seed)
