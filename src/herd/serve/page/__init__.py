"""The chat page: markup, style and script in files of their own, sent as one page that asks for nothing else.

The parts of the script share one scope, in the order below; each reads on its own. There is no build step: they are
put together when the page is first asked for.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable

__all__ = ["chat_page"]

_SCRIPT = (
    "elements.js",
    "inline.js",
    "blocks.js",
    "colours.js",
    "conversations.js",
    "answers.js",
    "changes.js",
    "drawing.js",
    "dialogs.js",
    "keyboard.js",
    "start.js",
)


def chat_page(nonce: str) -> str:
    """The page as HTML; `nonce` is what its style and its script carry, for the Content-Security-Policy."""
    return _page().replace("__NONCE__", nonce)


@functools.cache
def _page() -> str:
    style, script = _text(["page.css"]), _text(_SCRIPT)
    return _text(["page.html"]).replace("__STYLE__", style).replace("__SCRIPT__", script)


def _text(names: Iterable[str]) -> str:
    folder = importlib.resources.files(__name__)
    return "\n".join(folder.joinpath(name).read_text("utf-8") for name in names).rstrip("\n")
