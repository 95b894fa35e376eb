"""Python's literals as JSON text, without Python: what a Llama writes between the brackets of a call.

Nothing here evaluates anything. Strings are unescaped by Python's rules, numbers keep their digits, and all else is
`Malformed`. Source: "Lexical analysis" of the Python language reference, but for prefixes of strings and \\N{…}.
"""

from __future__ import annotations

import json
import re
import sys

# JSON's own words stand for themselves: models write them between Python's brackets as well.
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"(-?)(?:(0|[1-9][0-9]*)(\.[0-9]*)?|(\.[0-9]+))((?:[eE][-+]?[0-9]+)?)")
_SURROGATES = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(
    r"\\(?:(\r\n|\n)|([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_NAMED = {"\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class Malformed(Exception):
    """The text is not what was to be read."""


def escape(text: str) -> str:
    """Text as the inside of a JSON string. Half characters are escaped, so that the result can always be sent."""
    return _SURROGATES.sub(lambda half: f"\\u{ord(half[0]):04x}", json.dumps(text, ensure_ascii=False)[1:-1])


def string_as_json(body: str) -> str:
    """A string literal, given without its quotes. Raises `Malformed` for a broken escape."""
    return f'"{escape(_ESCAPE.sub(_unescape, body))}"'


def scalar_as_json(token: str) -> str:
    """A number, True, False or None. Raises `Malformed` for anything else."""
    if token in _WORDS:
        return _WORDS[token]
    number = _NUMBER.fullmatch(re.sub(r"(?<=[0-9])_(?=[0-9])", "", token))
    if number is None:
        raise Malformed(token)
    sign, whole, fraction, bare_fraction, exponent = number.groups(default="")
    fraction = bare_fraction or ("" if not fraction else fraction if fraction != "." else ".0")
    return f"{sign}{whole or '0'}{fraction}{exponent}"


def _unescape(found: re.Match[str]) -> str:
    line_break, octal, *hexadecimal, other = found.groups()
    if line_break:
        return ""
    if octal:
        return chr(int(octal, 8))
    digits = next((digits for digits in hexadecimal if digits), None)
    if digits:
        code = int(digits, 16)
        if code > sys.maxunicode:
            raise Malformed(found[0])
        return chr(code)
    if other in ("x", "u", "U", "N"):
        raise Malformed(found[0])
    return _NAMED.get(other, found[0])  # as in Python, an unknown escape is what it looks like
