"""The Tokenizer: one vocabulary with one chat format. Text and dialogues become ids, ids become text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal

from herd.errors import UsageError
from herd.tokenizer.chat import Encoded, Message, check_messages, choose_format
from herd.tokenizer.specials import special_roles
from herd.tokenizer.stream import StreamDecoder
from herd.tokenizer.vocabulary import Vocabulary


class Tokenizer:
    """Made by `herd.tokenizer.load`, `train` or `from_gguf_metadata`.

    Attributes
    ----------
    specials : control tokens, name -> id. No content is ever encoded to one of them.
    bos_id, eos_id : beginning and end of a text.
    pad_id : fills unused places; never the end of a text.
    stop_ids : tokens at which generation ends (end of text, of turn, of message).
    chat_format : name of the format that `encode_dialog` writes, one of `CHAT_FORMATS`.
    chat_template : the Jinja template that other tools get: the one that came with the files, or Herd's own.
    """

    def __init__(
        self, vocabulary: Vocabulary, chat_format: str | None = None, *, source_template: str | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self.specials = vocabulary.specials
        self.bos_id, self.eos_id, self.pad_id, self.stop_ids = special_roles(self.specials)
        self._chat = choose_format(chat_format, self.specials)
        self.chat_format = self._chat.name
        self.source_template = source_template
        self._control_ids = frozenset(self.specials.values())

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} tokens, {self.chat_format})"

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return len(self.vocabulary.table)

    @property
    def chat_template(self) -> str:
        return self._chat.template if self.source_template is None else self.source_template

    def with_chat_format(self, chat_format: str) -> Tokenizer:
        """The same vocabulary with another chat format (and Herd's template for it)."""
        return Tokenizer(self.vocabulary, chat_format)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as plain content: no beginning, no end, and never a control token, whatever the text says.

        Equal to tiktoken's `encode_ordinary` (Llama 3, 4) and SentencePiece's `encode` (Llama 1, 2), with the bounds
        on slices and runs of Meta's tokenizers. Characters that are no Unicode text become U+FFFD.
        """
        return self.vocabulary.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """Beginning of text, content, end of text: a training document."""
        return [self.bos_id, *self.vocabulary.encode(text), self.eos_id]

    def encode_dialog(
        self,
        messages: Sequence[Message],
        tools: Sequence[object] | None = None,
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Ids of a dialogue, and for each whether it is one the assistant had to produce.

        `tools` are function descriptions (OpenAI's form or the inner object) or names of Meta's built-in tools;
        `add_generation_prompt` ends with what precedes an answer. Supervised are the assistant's content, calls and
        end-of-turn tokens; headers are not. Raises `UsageError` for messages the format cannot hold.
        """
        return self._chat.encode(self.vocabulary, check_messages(messages), tools, add_generation_prompt)

    def encode_infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
        """Code Llama's prompt for the text between `prefix` and `suffix`; generation ends at its `▁<EOT>`.

        Prefix-suffix-middle order, or suffix-prefix-middle with `suffix_first`. Raises `UsageError` for
        vocabularies without the infilling marks. Source: `infilling_prompt_tokens` of meta-llama/codellama.
        """
        if "▁<PRE>" not in self.specials:
            raise UsageError(
                "this vocabulary has no marks for infilling",
                allowed="Code Llama 7B, 13B and 70B",
                fix="use a Code Llama",
            )
        start, middle, end = (self.specials[name] for name in ("▁<PRE>", "▁<MID>", "▁<SUF>"))
        before = self.vocabulary.encode(prefix)
        after = self.vocabulary.encode_continuation(suffix)
        if suffix_first:
            return [self.bos_id, start, end, *after, middle, *before]
        return [self.bos_id, start, *before, end, *after, middle]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False, keep_first_space: bool = False) -> str:
        """Text of ids; bytes that are no text become U+FFFD.

        Control tokens stand as their names, or are left out with `skip_specials`. Where encoding puts a space before
        a text (SentencePiece), decoding takes it away, unless `keep_first_space` says that the ids continue a text.
        """
        table = self.vocabulary.table
        numbers = [i for i in ids if i not in self._control_ids] if skip_specials else list(ids)
        try:
            text = b"".join([table[i] for i in numbers])
        except IndexError:
            raise self._no_such_id(next(i for i in numbers if i >= len(table))) from None
        if numbers and min(numbers) < 0:
            raise self._no_such_id(min(numbers))
        if self.vocabulary.drops_first_space and not keep_first_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", "replace")

    def stream(self, *, skip_specials: bool = False, keep_first_space: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time; options as in `decode`."""

        def token_bytes(token_id: int) -> bytes:
            return b"" if skip_specials and token_id in self._control_ids else self.token_bytes(token_id)

        return StreamDecoder(token_bytes, self.vocabulary.drops_first_space and not keep_first_space)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of a control token, its name."""
        if not 0 <= token_id < self.vocab_size:
            raise self._no_such_id(token_id)
        return self.vocabulary.table[token_id]

    def _no_such_id(self, token_id: int) -> UsageError:
        return UsageError("no such token id", value=token_id, allowed=f"0 to {self.vocab_size - 1}")

    def save(self, directory: str | os.PathLike[str], *, layout: Literal["hf", "meta"] = "hf") -> None:
        """Write the files other tools read into `directory` (made if need be, other files left alone).

        "hf": tokenizer.json, tokenizer_config.json with the chat template, and Meta's tokenizer.model where Meta's
        own repositories have it (in the directory for SentencePiece, in `original/` for byte-level vocabularies,
        since converters take a top-level one for SentencePiece). "meta": tokenizer.model alone.
        """
        from herd.tokenizer.saving import save

        save(self, directory, layout)

    def gguf_metadata(self) -> dict[str, object]:
        """The `tokenizer.*` keys of a GGUF file: strings, ints, bools, and lists of them."""
        from herd.tokenizer.gguf_vocab import to_metadata

        return to_metadata(self)
