"""Text from ids that come one at a time, never with half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns ids into text as they come. Made by `Tokenizer.stream`.

    A character whose bytes are spread over several tokens comes out with the last of them. Bytes that cannot be
    text become U+FFFD as soon as that is certain. All pieces together equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], drop_first_space: bool) -> None:
        self._token_bytes = token_bytes
        self._drop_first_space = drop_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; often "", when a character is still open."""
        token = self._token_bytes(token_id)
        if self._drop_first_space and token:
            self._drop_first_space = False
            token = token.removeprefix(b" ")
        return self._decoder.decode(token)

    def flush(self) -> str:
        """End of the stream: U+FFFD for a character that was never completed, else ""."""
        return self._decoder.decode(b"", final=True)
