"""HTML that is escaped unless it was built here: text of models and users can never become markup.

tag("p", "1 < 2", tag("b", name))  →  <p>1 &lt; 2<b>…</b></p>
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence

_VOID = frozenset({"meta", "br", "line", "rect", "circle", "path", "polyline"})


class Html(str):
    """Text that is markup already. Only the functions of this package make it."""

    __slots__ = ()


Child = str | int | float | Html | None | Iterable["Child"]


def escape(text: object) -> Html:
    """Any value as text. Invisible and control characters are written out, so that nothing hides in a sample."""
    shown = "".join(letter if _printable(letter) else f"⟨U+{ord(letter):04X}⟩" for letter in str(text))
    return Html(html.escape(shown, quote=True))


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """An element. `class_="x"` is class, `stroke_width=1` is stroke-width; False and None leave an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Children one after the other; strings that are not Html are escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return escape(children)
    return Html("".join(join(child) for child in children))


def table(
    headings: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    numeric: Iterable[int] = (),
    class_: str | None = None,
) -> Html:
    """A table that scrolls sideways on a narrow screen; columns in `numeric` are aligned to the right."""
    right = frozenset(numeric)

    def cells(kind: str, row: Sequence[Child]) -> Html:
        return tag("tr", [tag(kind, cell, class_="n" if i in right else None) for i, cell in enumerate(row)])

    head = tag("thead", cells("th", headings)) if any(headings) else None
    body = tag("tbody", [cells("td", row) for row in rows])
    return tag("div", tag("table", head, body, class_=class_), class_="scroll")


def _printable(character: str) -> bool:
    if character in "\n\t":
        return True
    # Cc control, Cf format (among them the direction overrides), Cs surrogates, Co/Cn private and unassigned
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
