"""What happened to a corpus, step by step: documents and bytes in and out, reasons, examples."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from herd.corpus.document import Document
from herd.errors import HerdError

_EXAMPLES = 5


@dataclass
class Reason:
    """Documents (and bytes) that one rule took away or shortened, with the first few names."""

    documents: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Step:
    """One step of the pipeline."""

    name: str
    documents_in: int
    bytes_in: int
    documents_out: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    reasons: dict[str, Reason] = field(default_factory=dict)

    def remove(self, document: Document, reason: str, detail: str = "") -> None:
        """Count a removed document; `detail` goes into the example."""
        entry = self.reasons.setdefault(reason, Reason())
        entry.documents += 1
        entry.bytes += document.n_bytes
        if len(entry.examples) < _EXAMPLES:
            entry.examples.append(f"{document.url} {detail}".rstrip())


@dataclass
class CorpusStats:
    """The whole account; `to_dict` is what stats.json holds."""

    sources: dict[str, Any]
    steps: list[Step]
    train_documents: int
    train_bytes: int
    heldout_documents: int
    heldout_bytes: int
    heldout_groups: list[str]
    split: str
    max_overlap: float | None
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Seconds are left out: equal inputs give equal files."""
        data = asdict(self)
        for step in data["steps"]:
            del step["seconds"]
        return data

    @property
    def seconds(self) -> float:
        """Wall time of all steps."""
        return sum(step.seconds for step in self.steps)


class Ledger:
    """Opens and closes steps, and refuses to go on with nothing."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._started = 0.0

    def begin(self, name: str, documents: Sequence[Document]) -> Step:
        """Start a step on `documents`."""
        self._started = time.perf_counter()
        step = Step(name, len(documents), total_bytes(documents))
        self.steps.append(step)
        return step

    def end(self, documents: Sequence[Document]) -> None:
        """Close the running step with what it left over; HerdError if that is nothing."""
        step = self.steps[-1]
        step.documents_out, step.bytes_out = len(documents), total_bytes(documents)
        step.seconds = time.perf_counter() - self._started
        if step.documents_in and not documents:
            reasons = sorted(step.reasons.items(), key=lambda item: -item[1].documents)
            text = ", ".join(f"{name} {reason.documents}" for name, reason in reasons)
            example = next((reason.examples[0] for _, reason in reasons if reason.examples), "")
            raise HerdError(
                f"the step {step.name!r} of the corpus removed all {step.documents_in} documents ({text})",
                value=example,
                allowed="at least one document must pass every step",
                fix="loosen or switch off that limit in the corpus configuration, or give more text",
            )


def total_bytes(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of all texts."""
    return sum(document.n_bytes for document in documents)
