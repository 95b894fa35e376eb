"""Find out what a path holds and read it: a tokenizer file, a checkpoint directory or a GGUF."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.errors import FileFormatError, HerdError, UsageError
from herd.files import read_json_object
from herd.ggufmeta import read_metadata
from herd.tokenizer import gguf_vocab
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.chat import CHAT_FORMATS
from herd.tokenizer.hf_read import read_tokenizer_json
from herd.tokenizer.hf_write import FORMAT_KEY
from herd.tokenizer.pieces import SentencePieceVocabulary
from herd.tokenizer.specials import (
    LLAMA3_0_SPECIALS,
    LLAMA3_PATTERN,
    LLAMA3_SPECIALS,
    LLAMA4_PATTERN,
    LLAMA4_SPECIALS,
    N_LLAMA3_SPECIALS,
    N_LLAMA4_RANKS,
    N_LLAMA4_SPECIALS,
    numbered,
)
from herd.tokenizer.spmodel import read_model
from herd.tokenizer.tiktoken_file import read_ranks
from herd.tokenizer.tokenizer import Tokenizer
from herd.tokenizer.vocabulary import Vocabulary

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# In a directory, in this order: tokenizer.json knows tokens that were added later, Meta's files do not.
_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_ALLOWED = "tokenizer.json, tokenizer.model (SentencePiece or tiktoken), a .gguf, or a directory with one of them"


def load(path: str | os.PathLike[str], chat_format: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Parameters
    ----------
    path : a `tokenizer.model` (SentencePiece of Llama 1, 2 and Code Llama; tiktoken of Llama 3 and 4), a
        `tokenizer.json`, a `.gguf`, or a directory that holds one of them (Hugging Face's or Meta's layout).
    chat_format : one of `CHAT_FORMATS`. By default what Herd wrote beside the vocabulary, or else what the control
        tokens tell: llama4, llama3.1, llama3, codellama-70b, codellama or llama2. "llama3" also gives a tiktoken
        file the special tokens of the first Llama 3.

    Raises `FileFormatError` for files that are damaged or not a Llama's, naming file, field and offset.
    """
    path = Path(path)
    try:
        file = _find(path)
        return _load_file(file, chat_format)
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=path) from None


def _load_file(file: Path, chat_format: str | None) -> Tokenizer:
    if file.name.endswith(".json"):
        return _load_json(file, chat_format)
    with file.open("rb") as opened:
        head = opened.read(4096)
    if head.startswith(b"GGUF"):
        return _from_metadata(read_metadata(file).metadata, chat_format, file)
    try:
        return Tokenizer(_read_model_file(file, head, chat_format), chat_format)
    except (FileFormatError, UsageError):  # it names the file already, or is about `chat_format`
        raise
    except HerdError as error:
        raise FileFormatError(str(error), file=file) from None


def from_gguf_metadata(metadata: Mapping[str, object], chat_format: str | None = None) -> Tokenizer:
    """The tokenizer of a GGUF's key/value metadata (as `herd.ggufmeta.read_metadata` or `gguf_metadata` give it)."""
    return _from_metadata(metadata, chat_format, None)


def _from_metadata(metadata: Mapping[str, object], chat_format: str | None, file: Path | None) -> Tokenizer:
    vocabulary = gguf_vocab.read_vocabulary(metadata, file)
    stored = metadata.get(gguf_vocab.FORMAT_KEY)
    return _tokenizer(vocabulary, chat_format, stored, metadata.get(gguf_vocab.TEMPLATE_KEY))


def _tokenizer(vocabulary: Vocabulary, chat_format: str | None, stored: object, template: object) -> Tokenizer:
    """A template from elsewhere is kept as it came; one that Herd wrote follows the chat format."""
    known = stored if isinstance(stored, str) and stored in CHAT_FORMATS else None
    own = known is not None and template == CHAT_FORMATS[known].template
    foreign = template if isinstance(template, str) and not own else None
    return Tokenizer(vocabulary, chat_format or known, source_template=foreign)


def _find(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        ggufs = sorted(path.glob("*.gguf"))
        if found is None and len(ggufs) == 1:
            found = ggufs[0]
        if found is None:
            raise HerdError("no tokenizer in this directory", value=str(path), allowed=_ALLOWED)
        return found
    if not path.is_file():
        raise HerdError("no such tokenizer file", value=str(path), allowed=_ALLOWED)
    return path


def _load_json(file: Path, chat_format: str | None) -> Tokenizer:
    beside = file.with_name("tokenizer_config.json")
    config: dict[str, Any] = read_json_object(beside) if beside.is_file() else {}
    template = config.get("chat_template")
    jinja = file.with_name("chat_template.jinja")
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8", errors="replace")
    return _tokenizer(read_tokenizer_json(file), chat_format, config.get(FORMAT_KEY), template)


def _read_model_file(file: Path, head: bytes, chat_format: str | None) -> Vocabulary:
    if _TIKTOKEN_LINE.match(head):
        return _tiktoken(read_ranks(file.read_bytes(), file), file, chat_format)
    if head.startswith(b"\n"):  # field 1 of the protocol buffer, with a length
        pieces, dummy_prefix = read_model(file.read_bytes(), file)
        return SentencePieceVocabulary(pieces, dummy_prefix)
    raise FileFormatError("not a tokenizer file", file=file, field="magic", offset=0, value=head[:8], allowed=_ALLOWED)


def _tiktoken(ranks: dict[bytes, int], file: Path, chat_format: str | None) -> ByteLevelVocabulary:
    """A tiktoken file holds the ranks alone; pattern and special tokens follow from their number, as in Meta's code.

    For vocabularies of other sizes Meta's `params.json` beside the file tells how many special tokens there are.
    """
    n_ranks = len(ranks)
    if n_ranks == N_LLAMA4_RANKS:
        return ByteLevelVocabulary(ranks, LLAMA4_PATTERN, numbered(LLAMA4_SPECIALS, n_ranks, N_LLAMA4_SPECIALS))
    names = LLAMA3_0_SPECIALS if chat_format == "llama3" else LLAMA3_SPECIALS
    params = file.with_name("params.json")
    total = read_json_object(params).get("vocab_size") if params.is_file() else None
    n_specials = total - n_ranks if type(total) is int and total > 0 else N_LLAMA3_SPECIALS
    if not 2 <= n_specials <= N_LLAMA3_SPECIALS:
        raise FileFormatError(
            f"the vocabulary has {n_ranks} ranks, which leaves no room for special tokens",
            file=params,
            field="vocab_size",
            value=total,
            allowed=f"{n_ranks + 2} to {n_ranks + N_LLAMA3_SPECIALS}",
        )
    return ByteLevelVocabulary(ranks, LLAMA3_PATTERN, numbered(names, n_ranks, n_specials))
