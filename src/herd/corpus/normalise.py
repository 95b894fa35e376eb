"""One spelling for equal texts: newlines, trailing spaces, control characters, and NFC for prose."""

from __future__ import annotations

import re
import unicodedata

# C0 and C1 controls except tab and newline, delete, and the byte order mark.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]+")
_PROSE_LINE_ENDS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
# A run is looked at once, from its start: without the lookbehind a megabyte of spaces would take hours.
_TRAILING = re.compile(r"(?<![ \t])[ \t]++(?=\n)")
_BLANK_RUN = re.compile(r"\n{4,}")


def normalise(text: str, *, code: bool, form: str = "NFC") -> str:
    """Return the text as the corpus stores it: lines end in one newline without trailing blanks, at most two blank
    lines follow each other, no control characters but tab and newline, no blank lines at the start, one newline at
    the end. Prose is put into Unicode `form` ("NFC" or "none"); code is not, since identifiers and string literals
    may differ on purpose. An empty or blank text gives "". Idempotent.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not code:
        text = _PROSE_LINE_ENDS.sub("\n", text)
    text = _CONTROLS.sub("", text)
    text = well_formed(text)
    if form != "none" and not code and not text.isascii():
        text = unicodedata.normalize(form, text)  # type: ignore[arg-type]
    text = _BLANK_RUN.sub("\n\n\n", _TRAILING.sub("", text + "\n"))
    text = text.strip("\n").rstrip()
    return text + "\n" if text else ""


def well_formed(text: str) -> str:
    """The text with "?" for lone surrogates, which no UTF-8 file can hold; JSON and file names can smuggle them in."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
