"""From raw text to clean documents to packed token batches; no torch.

    >>> stats = curate(CorpusConfig(sources=["python-stdlib"]), "corpus")
    >>> shards = pack_tokens(read_documents("corpus/train.jsonl"), tokenizer, "tokens")
    >>> batch = PackedDataset(shards, seq_len=512, batch_size=16, seed=0).batch(step=0)

Names load when they are first used, so importing the room is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.corpus.config import CorpusConfig, Lines, NearDuplicates, Quality
    from herd.corpus.document import Document, read_documents, write_documents
    from herd.corpus.packing import Batch, PackedDataset, PackedExamples, RowSource, pack_examples
    from herd.corpus.pipeline import curate
    from herd.corpus.shards import TokenShards, pack_tokens
    from herd.corpus.sources import STDLIB, SourceReport, check_sources, read_sources, source_files
    from herd.corpus.stats import CorpusStats
    from herd.corpus.windows import EvaluationBatch, EvaluationWindows

__getattr__ = lazy_names(
    __name__,
    {
        "config": ("CorpusConfig", "Lines", "NearDuplicates", "Quality"),
        "document": ("Document", "read_documents", "write_documents"),
        "packing": ("Batch", "PackedDataset", "PackedExamples", "RowSource", "pack_examples"),
        "pipeline": ("curate",),
        "shards": ("TokenShards", "pack_tokens"),
        "sources": ("STDLIB", "SourceReport", "check_sources", "read_sources", "source_files"),
        "stats": ("CorpusStats",),
        "windows": ("EvaluationBatch", "EvaluationWindows"),
    },
)

__all__ = [
    "STDLIB",
    "Batch",
    "CorpusConfig",
    "CorpusStats",
    "Document",
    "EvaluationBatch",
    "EvaluationWindows",
    "Lines",
    "NearDuplicates",
    "PackedDataset",
    "PackedExamples",
    "Quality",
    "RowSource",
    "SourceReport",
    "TokenShards",
    "check_sources",
    "curate",
    "pack_examples",
    "pack_tokens",
    "read_documents",
    "read_sources",
    "source_files",
    "write_documents",
]
