"""The stage's token files: training text by source, all held-out text, and a small probe of it for evaluation along
the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.corpus import Document, TokenShards, pack_tokens, read_documents
from herd.corpus.infilling import Infilling, pack_infilled
from herd.errors import FileFormatError, UsageError
from herd.files import read_json, sha256_file, write_json
from herd.pretrain.config import WHOLE, Source

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenFiles:
    """Opened shards; `heldout` and `probe` are None when nothing was held out.

    train: all sources together. left_out: documents of the corpus that fit none of the sources.
    """

    sources: Mapping[str, TokenShards]
    train: TokenShards
    heldout: TokenShards | None
    probe: TokenShards | None
    left_out: int = 0

    def scored_tokens(self, probes: int) -> tuple[int, int]:
        """Tokens that go through the model for all probes and at the end; windows overlap by half: each goes twice."""
        full = self.heldout.n_tokens if self.heldout is not None else 0
        return 2 * probes * (self.probe.n_tokens if self.probe is not None else 0), 2 * full


def prepare(
    corpus: Path,
    tokenizer: Tokenizer,
    directory: Path,
    probe_tokens: int,
    sources: Mapping[str, Source] | None = None,
    seed: int = 0,
    row: int | None = None,
) -> TokenFiles:
    """Tokenise corpus/train.jsonl and heldout.jsonl into `directory`, or open what an earlier call left there.

    Earlier files are used only when they came from the same texts, vocabulary and settings. Without sources there is
    one, of all training text. `seed` and `row` are for infilling: documents longer than a row are left as they are.
    Raises UsageError for a folder without train.jsonl, a source that no document fits and shards of another vocabulary.
    """
    train, heldout = corpus / "train.jsonl", corpus / "heldout.jsonl"
    sources = sources or {WHOLE: Source(weight=1)}
    parts = {name: source for name, source in sources.items() if not source.shards}
    if parts and not train.is_file():
        raise UsageError(
            f"{corpus} has no train.jsonl", allowed="a folder made by curate()", fix="herd corpus SOURCES... --out DIR"
        )
    has_heldout = heldout.is_file() and heldout.stat().st_size > 0
    files = [("train", train)] * bool(parts) + [("heldout", heldout)] * has_heldout
    wanted: dict[str, Any] = {name: sha256_file(file) for name, file in files}
    wanted |= {"vocabulary": vocabulary_hash(tokenizer), "probe_tokens": probe_tokens}
    wanted["sources"] = {name: source.model_dump(mode="json", exclude={"weight"}) for name, source in parts.items()}
    wanted["infilling"] = [seed, row] if any(source.infilling for source in parts.values()) else None
    stamp = directory / "made_from.json"
    left_out = _left_out(stamp, wanted)
    if left_out is None:
        stamp.unlink(missing_ok=True)
        left_out = _pack_sources(train, parts, tokenizer, directory, seed, row) if parts else 0
        if has_heldout:
            pack_heldout(heldout, tokenizer, directory, probe_tokens)
        write_json(stamp, wanted | {"left_out": left_out})
    return _open(tokenizer, directory, sources, has_heldout, left_out)


def pack_heldout(file: Path, tokenizer: Tokenizer, directory: Path, probe_tokens: int) -> TokenShards:
    """Write all held-out text to directory/heldout and a probe of it to directory/probe, which is returned."""
    shards = pack_tokens(read_documents(file), tokenizer, directory / "heldout")
    chosen = spread(shards.lengths.tolist(), probe_tokens)
    return pack_tokens(_select(file, chosen), tokenizer, directory / "probe")


def _open(
    tokenizer: Tokenizer, directory: Path, sources: Mapping[str, Source], has_heldout: bool, left_out: int
) -> TokenFiles:
    places = {name: [*map(Path, source.shards)] or [folder(directory, name)] for name, source in sources.items()}
    opened = {name: TokenShards(folders) for name, folders in places.items()}
    for name, shards in opened.items():
        _check_vocabulary(name, shards, tokenizer)
    train = TokenShards([place for folders in places.values() for place in folders])
    heldout, probe = (TokenShards(directory / name) if has_heldout else None for name in ("heldout", "probe"))
    return TokenFiles(opened, train, heldout, probe, left_out)


def folder(directory: Path, source: str) -> Path:
    """Where the shards of a source are."""
    return directory / (source if source == WHOLE else f"{WHOLE}-{source}")


def origin(document: Document, sources: Mapping[str, Source]) -> str | None:
    """The first of the sources that a document fits."""
    for name, source in sources.items():
        right_kind = source.kind is None or document.kind == source.kind
        if right_kind and (not source.match or any(fnmatchcase(document.url, like) for like in source.match)):
            return name
    return None


def heldout_parts(corpus: Path, sources: Mapping[str, Source]) -> dict[str | None, list[int]]:
    """Numbers of the held-out documents of each source that has any, in the order of their shards; of None: of those
    that fit none. Sources of shards have no held-out text."""
    parts = {name: source for name, source in sources.items() if not source.shards}
    found: dict[str | None, list[int]] = {}
    # pack_tokens leaves out documents without text, so they do not count here either.
    texts = (document for document in read_documents(corpus / "heldout.jsonl") if document.text)
    for number, document in enumerate(texts):
        found.setdefault(origin(document, parts), []).append(number)
    return found


def spread(lengths: Sequence[int], tokens: int) -> set[int]:
    """Indices of documents at equal distances over the whole list, together about `tokens` long; all if they are fewer.

    Documents longer than a quarter of the probe are passed over, or one of them would be the probe.
    """
    usable = [i for i, length in enumerate(lengths) if length <= max(tokens // 4, min(lengths))]
    total = sum(lengths[i] for i in usable)
    count = max(1, min(len(usable), round(len(usable) * tokens / total)))
    return {usable[i * len(usable) // count] for i in range(count)}


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 over every token's bytes and every special token's name and id."""
    digest = hashlib.sha256(repr(sorted(tokenizer.specials.items())).encode())
    specials = set(tokenizer.specials.values())
    for token in range(tokenizer.vocab_size):
        content = b"" if token in specials else tokenizer.token_bytes(token)
        digest.update(len(content).to_bytes(4, "little") + content)
    return digest.hexdigest()


def _pack_sources(
    file: Path, sources: Mapping[str, Source], tokenizer: Tokenizer, directory: Path, seed: int, row: int | None
) -> int:
    """Write the shards of every source; returns how many documents fit none."""
    found = Counter(origin(document, sources) for document in read_documents(file) if document.text)
    for name, source in sources.items():
        if not found[name] and len(sources) > 1:
            raise UsageError(f"no document of {file} is of the source {name!r}", value=source.model_dump(mode="json"))
        documents = (document for document in read_documents(file) if origin(document, sources) == name)
        if source.infilling:
            how = Infilling(source.infilling, most_tokens=row)
            pack_infilled(documents, tokenizer, folder(directory, name), how, seed)
        else:
            pack_tokens(documents, tokenizer, folder(directory, name))
    return found[None]


def _check_vocabulary(name: str, shards: TokenShards, tokenizer: Tokenizer) -> None:
    ours = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
    theirs = shards.vocab_size, shards.bos_id, shards.eos_id
    if ours != theirs:
        raise UsageError(
            f"the shards of source {name!r} have another vocabulary than the tokenizer",
            value=theirs,
            allowed=f"{ours} (vocab_size, bos_id, eos_id)",
        )


def _left_out(stamp: Path, wanted: Mapping[str, Any]) -> int | None:
    """What an earlier call with the same settings left out; None where there was none."""
    try:
        found = read_json(stamp)
    except FileFormatError:
        return None
    if not isinstance(found, dict):
        return None
    left_out = found.pop("left_out", 0)
    return left_out if found == wanted and isinstance(left_out, int) else None


def _select(file: Path, chosen: set[int]) -> Iterator[Document]:
    # pack_tokens leaves out documents without text, so they do not count here either.
    documents = (document for document in read_documents(file) if document.text)
    return (document for number, document in enumerate(documents) if number in chosen)
