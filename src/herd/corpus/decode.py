"""Bytes to text: byte order marks, PEP 263 cookies, UTF-8, and Latin-1 as the last resort."""

from __future__ import annotations

import codecs
import re

# Longest first: the UTF-32 mark begins with the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_BLANK = re.compile(rb"^[ \t\f]*(?:#|$)")
_PROBE = 8192  # bytes looked at to tell binary data from text
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\v\b\x1b\x1a")


class BinaryData(ValueError):
    """The bytes are not text."""


def decode(data: bytes, *, python_source: bool = False) -> tuple[str, str]:
    """Return (text, encoding used). "latin-1" means nothing else fitted, and some characters may be wrong.

    `python_source` honours a PEP 263 coding cookie. Raises BinaryData for NUL bytes without a byte order mark or for
    many control characters.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding), encoding
            except UnicodeDecodeError:
                if encoding != "utf-8":
                    raise BinaryData(f"broken {encoding}") from None
                return data[len(mark) :].decode("latin-1"), "latin-1"
    if _looks_binary(data[:_PROBE]) or b"\0" in data:
        raise BinaryData("control characters")
    if python_source:
        declared = _declared_encoding(data)
        if declared is not None:
            try:
                return data.decode(declared), declared
            except (UnicodeDecodeError, ValueError):
                pass
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"


def _declared_encoding(data: bytes) -> str | None:
    """The codec of a coding cookie in the first two lines (PEP 263), if it is one that yields text."""
    for line in data.split(b"\n", 2)[:2]:
        match = _COOKIE.match(line)
        if match:
            try:
                info = codecs.lookup(match.group(1).decode("ascii", "replace"))
            except LookupError:
                return None
            # Codecs such as "hex" or "zip" turn bytes into bytes and must not run on untrusted files.
            return info.name if getattr(info, "_is_text_encoding", False) else None
        if not _BLANK.match(line.rstrip(b"\r")):
            return None
    return None


def _looks_binary(head: bytes) -> bool:
    controls = sum(1 for byte in head if byte < 32 and byte not in _TEXT_CONTROLS)
    return b"\0" in head or controls * 20 > len(head)
