"""A conversation with a model: the history that `herd chat` keeps, without any terminal in it.

Nothing leaves the history unsaid: a message that does not fit raises, an answer that was cut or stopped is kept as far
as it was shown, and says how it ended.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from herd.engine.request import Chunk, FinishReason, Sampling, SamplingOptions
from herd.files import write_json

if TYPE_CHECKING:
    from herd.engine.llm import LLM
    from herd.tokenizer import Message


class ChatSession:
    """System text, history and sampling options of one conversation. Raises UsageError for a wrong option."""

    def __init__(self, llm: LLM, system: str | None = None, **options: Unpack[SamplingOptions]) -> None:
        Sampling.from_options(options)
        self._llm = llm
        self._options = options
        self.system = system
        self._turns: list[Message] = []
        self.finish_reason: FinishReason | None = None
        """How the last answer ended: "stop", "length" (max_tokens or the context), "cancelled"."""

    @property
    def messages(self) -> list[Message]:
        """System text (if any) and all turns so far."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return head + self._turns

    @property
    def context_used(self) -> int:
        """Tokens of context that the conversation takes by now, with the header of the next answer."""
        return len(self._llm.chat_ids(self.messages)) if self.messages else 0

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self._turns = []

    def say(self, text: str) -> Generator[Chunk, None, None]:
        """Send a message and stream the answer. Closing the iterator stops the answer and keeps what was yielded.

        Raises ContextLengthExceeded, with the history as it was before, when the conversation no longer fits.
        """
        asked: Message = {"role": "user", "content": text}
        chunks = self._llm.chat([*self.messages, asked], stream=True, **self._options)
        return self._answer(asked, chunks)

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON: {"model": ..., "messages": [...]}. OSError where there is no such folder."""
        if not Path(path).parent.is_dir():  # a misspelt path is not made
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(Path(path).parent))
        write_json(path, {"model": str(self._llm.path), "messages": self.messages})

    def _answer(self, asked: Message, chunks: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
        shown: list[str] = []
        self.finish_reason = "cancelled"
        try:
            with closing(chunks):
                for chunk in chunks:
                    shown.append(chunk.text)
                    if chunk.finish_reason is not None:
                        self.finish_reason = chunk.finish_reason
                    yield chunk
        finally:
            if shown:  # stopped before the first token: the message was not answered, the history stays as it was
                answer: Message = {"role": "assistant", "content": "".join(shown)}
                self._turns += [asked, answer]
