"""Token shards: all documents of a corpus as one memory-mapped array of token ids.

A shard is a directory, written at once:
    tokens.bin     token ids, little-endian uint16 if the vocabulary has at most 65,536 entries, else uint32;
                   each document is BOS, content, EOS
    index.bin      little-endian int64: where each document begins (and one past the last), then its UTF-8 bytes
    manifest.json  counts, vocabulary, sizes and SHA-256 of both files
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from herd.corpus.document import Document
from herd.errors import FileFormatError, HerdError
from herd.files import atomic_dir, read_json, sha256_file, write_json
from herd.progress import track

_FORMAT, _VERSION = "herd-token-shard", 1
_SMALL_VOCABULARY = 2**16
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_REBUILD = "build the shard again with pack_tokens"

Ids = npt.NDArray[np.unsignedinteger[Any]]


class DocumentTokenizer(Protocol):
    """What packing needs of a tokenizer; `herd.tokenizer.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode_document(self, text: str) -> list[int]: ...


def pack_tokens(documents: Iterable[Document | str], tokenizer: DocumentTokenizer, path: str | Path) -> TokenShards:
    """Encode documents one after the other into the shard directory `path` (replaced if it exists) and open it.

    Memory stays that of one document plus the index. Empty documents are left out. Raises HerdError if no document
    has text, or if the tokenizer yields ids outside its vocabulary or no BOS … EOS frame.
    """
    name = "uint16" if tokenizer.vocab_size <= _SMALL_VOCABULARY else "uint32"
    lengths: list[int] = []
    n_bytes: list[int] = []
    with atomic_dir(path) as directory:
        with open(directory / "tokens.bin", "wb") as file:
            for document in track(documents, label="tokenising"):
                text = document if isinstance(document, str) else document.text
                if not text:
                    continue
                ids = _encode(text, tokenizer)
                file.write(ids.astype(_DTYPES[name]).tobytes())
                lengths.append(len(ids))
                n_bytes.append(len(text.encode("utf-8")))
            _sync(file)
        if not lengths:
            raise HerdError("there is no document to tokenise", allowed="at least one document with text")
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        with open(directory / "index.bin", "wb") as file:
            file.write(np.concatenate((offsets, np.array(n_bytes, dtype=np.int64))).astype("<i8").tobytes())
            _sync(file)
        files = {
            part: {"bytes": (directory / part).stat().st_size, "sha256": sha256_file(directory / part)}
            for part in ("tokens.bin", "index.bin")
        }
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "dtype": name,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "n_documents": len(lengths),
            "n_tokens": int(offsets[-1]),
            "n_bytes": sum(n_bytes),
            "files": files,
        }
        write_json(directory / "manifest.json", manifest)
    return TokenShards(path)


def _encode(text: str, tokenizer: DocumentTokenizer) -> npt.NDArray[np.int64]:
    ids = np.asarray(tokenizer.encode_document(text), dtype=np.int64)
    if len(ids) < 2 or ids[0] != tokenizer.bos_id or ids[-1] != tokenizer.eos_id:
        raise HerdError("the tokenizer did not frame a document with BOS and EOS", value=ids[:4].tolist())
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise HerdError(
            "the tokenizer gave an id outside its vocabulary",
            value=int(ids.max() if ids.max() >= tokenizer.vocab_size else ids.min()),
            allowed=f"0 to {tokenizer.vocab_size - 1}",
        )
    return ids


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class TokenShards(Sequence[Ids]):
    """The documents of one or several shard directories, as read-only views of the mapped files.

    `shards[i]` are the token ids of document i: BOS, content, EOS. Sizes are verified before anything is mapped;
    `verify=True` also compares the SHA-256 sums. Raises FileFormatError for anything that does not fit the manifest.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        verify: bool = False,
    ) -> None:
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        if not listed:
            raise HerdError("no shard directory was given", allowed="one directory or several")
        parts = [_Shard(Path(path), verify) for path in listed]
        first = parts[0]
        for part in parts[1:]:
            if part.vocabulary != first.vocabulary:
                raise FileFormatError(
                    "has another vocabulary than the first shard",
                    file=part.path,
                    value=part.vocabulary,
                    allowed=f"{first.vocabulary} (vocab_size, bos_id, eos_id)",
                    fix="tokenise all shards with one tokenizer",
                )
        self._parts = parts
        self._bounds = np.cumsum([0, *(len(part.n_bytes) for part in parts)])
        self.vocab_size, self.bos_id, self.eos_id = first.vocabulary
        self.lengths: npt.NDArray[np.int64] = np.concatenate([np.diff(part.offsets) for part in parts])
        """Tokens of each document, BOS and EOS included."""
        self.text_bytes: npt.NDArray[np.int64] = np.concatenate([part.n_bytes for part in parts])
        """UTF-8 bytes of each document's text."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @property
    def checksums(self) -> list[str | None]:
        """SHA-256 of every shard's tokens and index, as the manifests have them."""
        return [part.checksum(name) for part in self._parts for name in ("tokens.bin", "index.bin")]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Ids:  # type: ignore[override]
        i = range(len(self))[index]
        part = int(np.searchsorted(self._bounds, i, side="right")) - 1
        return self._parts[part].document(i - int(self._bounds[part]))

    def __iter__(self) -> Iterator[Ids]:
        for part in self._parts:
            for i in range(len(part.n_bytes)):
                yield part.document(i)

    def slice(self, index: int, start: int, stop: int) -> Ids:
        """Tokens start:stop of document `index`, without touching the rest of it."""
        return self[index][start:stop]


class _Shard:
    """One directory, checked."""

    def __init__(self, path: Path, verify: bool) -> None:
        self.path = path
        manifest = read_json(path / "manifest.json")
        self._manifest = manifest if isinstance(manifest, dict) else {}
        if self._manifest.get("format") != _FORMAT or self._manifest.get("version") != _VERSION:
            self._bad("is not a token shard of this version", "format")
        if str(self._manifest.get("dtype")) not in _DTYPES:
            self._bad("has an unknown dtype", "dtype", ", ".join(_DTYPES))
        dtype = _DTYPES[str(self._manifest["dtype"])]
        n_documents, n_tokens = self._count("n_documents"), self._count("n_tokens")
        self.vocabulary = (self._count("vocab_size"), self._count("bos_id"), self._count("eos_id"))
        self._check_file("tokens.bin", n_tokens * dtype.itemsize, verify)
        self._check_file("index.bin", (2 * n_documents + 1) * 8, verify)
        index = np.fromfile(path / "index.bin", dtype="<i8")
        self.offsets, self.n_bytes = index[: n_documents + 1], index[n_documents + 1 :]
        if self.offsets[0] != 0 or self.offsets[-1] != n_tokens or (np.diff(self.offsets) < 2).any():
            raise FileFormatError(
                "document offsets are not in order", file=path / "index.bin", field="offsets", fix=_REBUILD
            )
        if (self.n_bytes < 1).any():
            raise FileFormatError("a document has no bytes", file=path / "index.bin", field="bytes", fix=_REBUILD)
        self._tokens = np.memmap(path / "tokens.bin", dtype=dtype, mode="r", shape=(n_tokens,))

    def document(self, i: int) -> Ids:
        view: Ids = self._tokens[self.offsets[i] : self.offsets[i + 1]]
        return view

    def _count(self, field: str) -> int:
        value = self._manifest.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
            self._bad("is not a count", field, "a whole number from 0")
        if field.startswith("n_") and value == 0:
            self._bad("is empty", field, "at least 1")
        return value

    def checksum(self, name: str) -> str | None:
        """SHA-256 of one of the files, as the manifest has it."""
        files = self._manifest.get("files")
        entry = files.get(name) if isinstance(files, dict) else None
        return str(entry.get("sha256")) if isinstance(entry, dict) else None

    def _check_file(self, name: str, expected: int, verify: bool) -> None:
        file = self.path / name
        try:
            size = file.stat().st_size
        except OSError:
            raise FileFormatError("is missing", file=file, fix=_REBUILD) from None
        if size != expected:
            raise FileFormatError(
                "has the wrong size", file=file, field="bytes", value=size, allowed=str(expected), fix=_REBUILD
            )
        if verify and self.checksum(name) != sha256_file(file):
            raise FileFormatError("does not match its checksum", file=file, field="sha256", fix=_REBUILD)

    def _bad(self, what: str, field: str, allowed: str | None = None) -> NoReturn:
        raise FileFormatError(
            what,
            file=self.path / "manifest.json",
            field=field,
            value=self._manifest.get(field),
            allowed=allowed,
            fix=_REBUILD,
        )
