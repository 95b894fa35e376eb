"""The unit of a corpus: a document, and the JSON Lines files documents travel in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herd.errors import FileFormatError
from herd.files import atomic_write


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from.

    `url` is a stable name that contains no path of this machine. `meta` is JSON data; the corpus itself uses
    "kind" ("code" or "prose": which rules apply) and "group" (documents of one group stay on one side of the split).
    """

    text: str
    url: str
    language: str = "en"
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "code" or "prose"."""
        return "code" if self.meta.get("kind") == "code" else "prose"

    @property
    def group(self) -> str:
        """What the split hashes: the top module or folder, or the document itself."""
        return str(self.meta.get("group", self.url))

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


def write_documents(path: str | Path, documents: Iterable[Document]) -> None:
    """Write documents as JSON Lines (UTF-8, one object a line), atomically."""
    with atomic_write(path, "w") as file:
        for document in documents:
            record = {
                "text": document.text,
                "url": document.url,
                "language": document.language,
                "meta": document.meta,
            }
            file.write(json.dumps(record, ensure_ascii=False, sort_keys=True))
            file.write("\n")


def read_documents(path: str | Path) -> Iterator[Document]:
    """Yield the documents of a file that `write_documents` wrote; FileFormatError names the line that is broken."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed by the with below; opened here to name a missing file)
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=path) from None
    with file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                yield Document(record["text"], record["url"], record["language"], record["meta"])
            except (ValueError, KeyError, TypeError):
                raise FileFormatError(
                    "is not a document",
                    file=path,
                    field=f"line {number}",
                    allowed="objects with text, url, language and meta",
                    fix="herd corpus SOURCES... --out DIR writes such files",
                ) from None
