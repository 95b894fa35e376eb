"""Text that comes in pieces, read by a grammar that need not know it, and passed on piece by piece as what it is.

A grammar is written as generators over `Reader`: where the text is used up they wait for more. What they have read
is, until they know better, held; then it is content, or a call of which they write the arguments, or code.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from herd.errors import UsageError
from herd.tokenizer.chat.python_literals import Malformed, escape, scalar_as_json, string_as_json
from herd.tokenizer.chat.tools import CODE_INTERPRETER

MAX_DEPTH = 64  # brackets within each other in the arguments of a call
MAX_HELD = 256 * 1024  # characters held back; more is text
MAX_TOKEN = 1000  # characters of a number, keyword or name of an argument

_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r"[-+.\w]*")
_JSON_STRING = re.compile('[^"\\\\\\x00-\\x1f\ud800-\udfff]*')
_JSON_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null", re.ASCII)
_PYTHON_STRING = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
_CLOSING = {"{": "}", "[": "]"}
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")

T = TypeVar("T")
Steps = Generator[None, None, T]  # a part of a grammar: yields where it waits for more text


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Ordinary content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """A piece of the arguments of a call, as JSON text."""

    index: int
    text: str


Delta = TextDelta | CallStart | ArgumentsDelta


class Mode(Enum):
    """What becomes of the text that is read."""

    TEXT = "content, passed on as it is"
    HELD = "held, as it can still become a call"
    CALL = "a call's: what the grammar writes as its arguments is passed on instead"
    CODE = "the argument of the code interpreter"


class Reader:
    """The position in the text, where what was read goes, and the values that all grammars of calls share.

    `_grammar` is the whole grammar, of the subclass. No decision in a grammar may depend on `_mode` or on where a piece
    ends, but for what follows a `_spill`: then the same text gives the same deltas, whatever its pieces.
    """

    def __init__(self) -> None:
        self._text = ""  # the piece being read
        self._at = 0
        self._spilled = 0  # up to here it has gone where it goes
        self._before = ""  # the last character of the piece before
        self._ended = False
        self._mode = Mode.TEXT
        self._held: list[str] = []
        self._held_length = 0
        self._prefix = ""  # a mark before what is held: text if that is text, and dropped otherwise
        self._to_code = False  # what is held is code if it is no call
        self._json: list[str] = []  # arguments as they are read
        self._index = -1  # of the last call
        self._deltas: list[Delta] = []
        self._pieces: list[str] = []  # of the next delta
        self._pieces_index = -1  # the call they belong to, or -1 for content
        self._steps = self._grammar()
        next(self._steps)

    def _grammar(self) -> Steps[None]:
        raise NotImplementedError

    def push(self, text: str) -> list[Delta]:
        """What is certain with this piece of the text."""
        if self._ended:
            raise UsageError("the text has been finished", value=text)
        if text:
            self._before = self._text[-1:]
            self._text, self._at, self._spilled = text, 0, 0
            next(self._steps)
        return self._take_deltas()

    def finish(self) -> list[Delta]:
        """The text ends here: what is left of it."""
        if not self._ended:
            self._ended = True
            self._text, self._at, self._spilled = "", 0, 0
            next(self._steps, None)
        return self._take_deltas()

    # Where it goes.

    def _take_deltas(self) -> list[Delta]:
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _flush(self) -> None:
        if self._pieces:
            text = "".join(self._pieces)
            self._pieces.clear()
            index = self._pieces_index
            self._deltas.append(TextDelta(text) if index < 0 else ArgumentsDelta(index, text))

    def _put(self, index: int, text: str) -> None:
        if text:
            if index != self._pieces_index:
                self._flush()
                self._pieces_index = index
            self._pieces.append(text)

    def _start(self, name: str) -> None:
        self._flush()
        self._index += 1
        self._deltas.append(CallStart(self._index, name))

    def _spill(self) -> None:
        """All that was read so far goes where it goes."""
        piece = self._text[self._spilled : self._at]
        self._spilled = self._at
        if self._mode is Mode.HELD:
            self._held.append(piece)
            self._held_length += len(piece)
            if self._held_length > MAX_HELD:
                self._lose()
            return
        if self._mode is Mode.TEXT:
            self._put(-1, piece)
        elif self._mode is Mode.CODE:
            self._put(self._index, escape(piece))
        else:
            self._put(self._index, "".join(self._json))
        self._json.clear()

    def _hold(self) -> None:
        """From here on text is held."""
        self._spill()
        self._mode = Mode.HELD

    def _drop(self) -> str:
        """Forget what is held; it is given back."""
        held = "".join((*self._held, self._text[self._spilled : self._at]))
        self._spilled = self._at
        self._held.clear()
        self._held_length = 0
        self._json.clear()
        return held

    def _lose(self) -> None:
        """What is held will not become a call. The grammar goes on, so that nothing inside is taken for a call."""
        if self._mode is Mode.HELD:
            held = self._drop()
            if self._to_code:
                self._start(CODE_INTERPRETER)
                self._put(self._index, '{"code": "' + escape(held))
                self._mode = Mode.CODE
            else:
                self._put(-1, self._prefix + held)
                self._mode = Mode.TEXT
            self._prefix, self._to_code = "", False

    def _commit(self, *calls: tuple[str, str]) -> None:
        """What is held is these calls, unless it is too long or was lost. Their arguments may still follow."""
        self._spill()
        if self._mode is Mode.HELD:
            self._drop()
            self._prefix, self._to_code = "", False
            self._mode = Mode.CALL
            for name, arguments in calls:
                self._start(name)
                self._put(self._index, arguments)

    # Characters. A character is "" at the end of the text.

    def _more(self) -> Steps[bool]:
        """Wait for the next piece; whether there is one."""
        self._spill()
        if not self._ended:
            yield
        return not self._ended

    def _peek(self) -> Steps[str]:
        """The next character."""
        if self._at == len(self._text) and not (yield from self._more()):
            return ""
        return self._text[self._at]

    def _run(self, pattern: re.Pattern[str], into: list[str] | None = None) -> Steps[str]:
        """Read while the pattern goes on; the character after that, which is not read."""
        while True:
            found = pattern.match(self._text, self._at)
            if found and found.end() > self._at:
                if into is not None:
                    into.append(found[0])
                self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not (yield from self._more()):
                return ""

    def _space(self) -> Steps[str]:
        return self._run(_SPACE)

    def _expect(self, character: str) -> Steps[None]:
        """White space, and then this character, which is not read."""
        if (yield from self._space()) != character:
            raise Malformed

    def _token(self) -> Steps[str]:
        """A number or a word, perhaps none."""
        token = ""
        while True:
            found = _TOKEN.match(self._text, self._at, self._at + MAX_TOKEN - len(token))
            if found:
                token += found[0]
                self._at = found.end()
            if len(token) == MAX_TOKEN or self._at < len(self._text) or not (yield from self._more()):
                return token

    # Values.

    def _value(self, python: bool, strict: bool = False) -> Steps[None]:
        """A value in JSON, or in Python, written to `_json`. `strict` refuses control characters in JSON's strings."""
        closing: list[str] = []  # what closes the brackets that are open
        opened = comma = False  # whether the value stands after a bracket, after a comma
        while True:
            character = yield from self._run(_SPACE, None if python else self._json)
            if not closing or character != closing[-1] or not (opened or python):
                if comma and python:
                    self._json.append(", ")
                if closing and closing[-1] == "}":
                    yield from self._key(python, strict, character)
                    character = yield from self._run(_SPACE, None if python else self._json)
                if character in _CLOSING:
                    if len(closing) == MAX_DEPTH:
                        raise Malformed
                    self._read(self._json)
                    closing.append(_CLOSING[character])
                    opened, comma = True, False
                    continue
                yield from self._leaf(python, strict, character)
            while closing:
                character = yield from self._run(_SPACE, None if python else self._json)
                if character == closing[-1]:
                    self._read(self._json)
                    closing.pop()
                elif character == ",":
                    self._read(None if python else self._json)  # in Python it may be the last one, which JSON has not
                    opened, comma = False, True
                    break
                else:
                    raise Malformed
            else:
                return

    def _key(self, python: bool, strict: bool, character: str) -> Steps[None]:
        if character != '"' and not (python and character == "'"):
            raise Malformed
        yield from self._leaf(python, strict, character)
        if (yield from self._run(_SPACE, None if python else self._json)) != ":":
            raise Malformed
        self._read(self._json)
        if python:
            self._json.append(" ")

    def _leaf(self, python: bool, strict: bool, character: str) -> Steps[None]:
        """A value without brackets, of which this is the first character."""
        if python and character in _PYTHON_STRING:
            yield from self._python_string(character)
        elif character == '"':
            yield from self._json_string(self._json, strict)
        else:
            token = yield from self._token()
            self._json.append(scalar_as_json(token) if python else token)
            if len(token) == MAX_TOKEN or not (python or _JSON_SCALAR.fullmatch(token)):
                raise Malformed

    def _read(self, into: list[str] | None = None) -> None:
        """The next character, which must be there."""
        if into is not None:
            into.append(self._text[self._at])
        self._at += 1

    def _json_string(self, into: list[str], strict: bool) -> Steps[None]:
        """A string of JSON, as it is written."""
        self._read(into)
        yield from self._json_string_rest(into, strict)

    def _json_string_rest(self, into: list[str], strict: bool) -> Steps[None]:
        while True:
            character = yield from self._run(_JSON_STRING, into)
            if character == '"':
                self._read(into)
                return
            if character == "\\":
                self._read(into)
                character = yield from self._peek()
                if character == "u":
                    self._read(into)
                    for _ in range(4):
                        if (yield from self._peek()) not in _HEXADECIMAL:
                            raise Malformed
                        self._read(into)
                elif character and character in '"\\/bfnrt':
                    self._read(into)
                else:
                    raise Malformed
            elif not character or (strict and character < " "):
                raise Malformed
            else:
                into.append(escape(character))
                self._at += 1

    def _python_string(self, quote: str) -> Steps[None]:
        """A string of Python in these quotes, or in three of them, as JSON."""
        body: list[str] = []
        self._read()
        length = 1  # of the quotes
        if (yield from self._peek()) == quote:
            self._read()
            if (yield from self._peek()) != quote:
                self._json.append('""')
                return
            self._read()
            length = 3
        while True:
            character = yield from self._run(_PYTHON_STRING[quote], body)
            if character == "\\":
                self._read(body)
                if not (yield from self._peek()):
                    raise Malformed
                self._read(body)
            elif not character:
                raise Malformed
            else:
                found = 0
                while found < length and (yield from self._peek()) == quote:
                    self._read()
                    found += 1
                if found == length:
                    break
                body.append(quote * found)
        self._json.append(string_as_json("".join(body)))
