"""Token ids to streamed text: whole characters only, and nothing that may turn out to be a stop string.

`StopMatcher` works on characters, so a stop string is found across token boundaries, and where it is found does not
depend on how the text was split. The stop string that is complete first counts, of those the longest, and the text
ends before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StreamDecoder(Protocol):
    """What `Tokenizer.stream()` returns: text comes out as soon as its characters are complete."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class StopMatcher:
    """Withholds the tail of a text while it could be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text, give what is safe to show. After a match, `matched` is set and nothing more comes out."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = self._longest_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text ended without a match: what was withheld is ordinary text."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper start of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0


class TextStream:
    """The text of one completion, token by token; the concatenation of all parts is the completion's text."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops)
        self._parts: list[str] = []

    def push(self, token_id: int) -> str:
        """Text that token `token_id` makes final (may be empty)."""
        return self._keep(self._matcher.push(self._decoder.push(token_id)))

    def finish(self) -> str:
        """The remaining text, when no token follows. An unfinished character comes out as U+FFFD."""
        rest = self._matcher.push(self._decoder.flush())
        return self._keep(rest + ("" if self.matched_stop is not None else self._matcher.flush()))

    @property
    def matched_stop(self) -> str | None:
        return self._matcher.matched

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def _keep(self, part: str) -> str:
        if part:
            self._parts.append(part)
        return part
