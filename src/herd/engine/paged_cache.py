"""Which page of the key/value cache holds what: the bookkeeping of the native backend, without any arithmetic.

The cache is a pool of pages of `page_tokens` tokens each. A sequence is a list of pages. Sequences that begin alike
share pages: a fork shares all of them, and a page is copied only when one of its holders writes to it. A full page is
remembered by the tokens up to its end, so that a later prompt which begins with them starts there (prefix cache); pages
that nobody holds are forgotten oldest first, when room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

Content = int | tuple[int, str]
"""What identifies tokens up to the end of a page: its number; before the first page, the variant and the salt."""


@dataclass
class CachedSequence:
    """A sequence's tokens and the pages that hold their keys and values, in order.

    `variant` tells apart what has the same tokens and yet other keys and values, from -1 on: the model itself, and the
    model with each of its adapters. What has another `salt` is not shared. `contents[i]` identifies the tokens up to
    the end of page i, for pages that are full and remembered.
    """

    variant: int = -1
    salt: str = ""
    remembered: bool = True
    """Whether later prompts may begin with its pages."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)

    @property
    def end(self) -> Content:
        """What identifies the remembered tokens, all of them."""
        return self.contents[-1] if self.contents else (self.variant, self.salt)


class PagedCache:
    """A pool of `n_pages` pages. `copy_page(source, target)` copies what a page holds.

    max_idle: so many remembered pages that nobody holds, and the oldest is given out before a page that was never used
    (None: any number), which bounds the memory that stands behind the pool.
    """

    def __init__(
        self, n_pages: int, page_tokens: int, copy_page: Callable[[int, int], None], max_idle: int | None = None
    ) -> None:
        self.n_pages = n_pages
        self.page_tokens = page_tokens
        self.max_idle = n_pages if max_idle is None else max_idle
        self._copy_page = copy_page
        self._untouched = 0  # pages from here on were never used: no memory stands behind them yet
        self._free: list[int] = []
        self._holders = [0] * n_pages
        # A content is (content before it, tokens of its page); its number is given once and never again, so that what
        # follows a forgotten page is not found by accident.
        self._number_of: dict[tuple[Content, tuple[int, ...]], int] = {}
        self._page_of: dict[int, int] = {}
        self._key_of: dict[int, tuple[Content, tuple[int, ...]]] = {}
        self._next_content = 0
        self._content_in: dict[int, int] = {}  # page -> content
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered pages without holders, oldest first

    @property
    def available(self) -> int:
        """Pages that can be given out: free ones, and remembered ones that nobody holds."""
        return len(self._free) + len(self._idle) + self.n_pages - self._untouched

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def open(self, prompt: Sequence[int], variant: int = -1, salt: str = "") -> CachedSequence:
        """A new sequence that holds the longest remembered beginning of `prompt`, but not all of it."""
        sequence, size = CachedSequence(variant, salt), self.page_tokens
        for start in range(0, len(prompt) - 1, size):
            page_tokens = tuple(prompt[start : start + size])
            number = self._number_of.get((sequence.end, page_tokens))
            if number is None or start + size >= len(prompt):
                break
            page = self._page_of[number]
            self._hold(page)
            sequence.pages.append(page)
            sequence.contents.append(number)
            sequence.tokens += page_tokens
        return sequence

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A second holder of all tokens of `sequence`; room that it has for more stays its own."""
        pages = sequence.pages[: self.pages_for(len(sequence.tokens))]
        for page in pages:
            self._hold(page)
        return replace(sequence, tokens=list(sequence.tokens), pages=pages, contents=list(sequence.contents))

    def release(self, sequence: CachedSequence) -> None:
        """Let go of a sequence; its full pages stay remembered until their room is needed."""
        # From the end: of a content's pages the last ones are forgotten first.
        for page in reversed(sequence.pages):
            self._let_go(page)
        sequence.pages.clear()

    def grow(self, sequence: CachedSequence, n_tokens: int) -> bool:
        """Make room for `n_tokens` more, in pages that nobody else holds; False, and no change, without room."""
        length = len(sequence.tokens)
        missing = self.pages_for(length + n_tokens) - len(sequence.pages)
        partial = length // self.page_tokens  # page that is written to next, if it is there already
        shared = partial < len(sequence.pages) and self._holders[sequence.pages[partial]] > 1
        if max(missing, 0) + shared > self.available:
            return False
        if shared:
            page = self._take()
            self._copy_page(sequence.pages[partial], page)
            self._let_go(sequence.pages[partial])
            sequence.pages[partial] = page
        for _ in range(missing):
            sequence.pages.append(self._take())
        return True

    def append(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Count tokens that have been written, and remember the pages that are full."""
        sequence.tokens += tokens
        if sequence.remembered:
            self._remember(sequence)

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget all but the first `length` tokens; nobody else holds what is forgotten."""
        del sequence.tokens[length:]
        keep = self.pages_for(length)
        for page in sequence.pages[length // self.page_tokens :]:
            self._forget(page)  # also the one that keeps its first tokens: it will be written to
        for page in reversed(sequence.pages[keep:]):
            self._let_go(page)
        del sequence.pages[keep:], sequence.contents[length // self.page_tokens :]

    def _remember(self, sequence: CachedSequence) -> None:
        size = self.page_tokens
        for i in range(len(sequence.contents), len(sequence.tokens) // size):
            key = (sequence.end, tuple(sequence.tokens[i * size : (i + 1) * size]))
            number = self._number_of.get(key)
            if number is None:  # else another sequence's page is remembered for the same tokens
                number = self._next_content
                self._next_content += 1
                page = sequence.pages[i]
                self._number_of[key], self._page_of[number] = number, page
                self._key_of[number], self._content_in[page] = key, number
            sequence.contents.append(number)

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._content_in:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        elif self._untouched < self.n_pages and len(self._idle) < max(1, self.max_idle):
            page = self._untouched
            self._untouched += 1
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def _forget(self, page: int) -> None:
        """No prompt will find this page any more."""
        number = self._content_in.pop(page, None)
        if number is not None:
            del self._number_of[self._key_of.pop(number)], self._page_of[number]
