"""The calls of tools in what a Llama writes, as it writes them: the reverse of `herd.tokenizer.chat.tools`.

    {"name": "f", "parameters": {…}}        3.1; also "type": "function", "arguments", and members in any order
    [f(a=1), g()]    [{"name": …}, …]       3.2, 3.3 and 4; JSON in brackets too
    <function=f>{…}</function>              3.1, when told so
    <|python_tag|>, <|python_start|>        before any of these, before brave_search.call(query="…"), and before code
    f(a=1)                                  as the whole message, or as all that follows a mark

Models mix the forms of the generations, so all are looked for. Sources: prompt_format.md of 3.1 to 4 and
`models/llama3/tool_utils.py` in meta-llama/llama-models.

**What is a call.** It begins at the beginning, after white space, after a mark or after another call; the marks and
<function= count anywhere. Its name must be offered and its form right: all else is text, exactly as written. A list in
Python's form is calls only if every item is one; an array of JSON is calls up to the first item that is none. What a
well-formed call of another name holds is not searched. What follows a mark and is no call is code, if the interpreter
is offered: to the end of the message, or from <|python_start|> to <|python_end|>. White space and ";" are dropped where
only calls stand beside them. With `anywhere=False` a call begins at the beginning or after another one only.

**What is held back.** Text that can still become a call; all other text is passed on at once. <function=…> and JSON
objects are calls for certain once an offered name and the brace of the arguments are read. From there the arguments are
streamed as they are written, but for control characters in strings, which are escaped. They are checked on the way: at
the first character that is not JSON the call ends, with the arguments as they were written so far, and text goes on
with that character. Calls in Python's form, and those with the name after the arguments, are held to their end.

If the text ends within a call, what is held is text, and what was streamed stays as it is. Nothing depends on how the
text is cut into pieces. Every character is read once, nesting and what is held are bounded, and nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping
from enum import Enum

from herd.tokenizer.chat.messages import Call
from herd.tokenizer.chat.python_literals import Malformed, string_as_json
from herd.tokenizer.chat.reading import ArgumentsDelta, CallStart, Delta, Mode, Reader, Steps, TextDelta
from herd.tokenizer.chat.tools import CODE_INTERPRETER

__all__ = ["ArgumentsDelta", "CallParser", "CallStart", "Delta", "TextDelta", "parse_calls"]


def parse_calls(text: str, functions: Collection[str], built_in: Collection[str] = ()) -> tuple[str, list[Call]]:
    """Content and calls of a whole message. A call whose arguments break off is left out."""
    parser = CallParser(functions, built_in)
    content: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for delta in (*parser.push(text), *parser.finish()):
        match delta:
            case TextDelta(piece):
                content.append(piece)
            case CallStart(_, name):
                calls.append((name, []))
            case ArgumentsDelta(index, piece):
                calls[index][1].append(piece)
    whole = []
    for name, pieces in calls:
        try:
            whole.append(Call(name, json.loads("".join(pieces))))
        except ValueError:
            continue
    return "".join(content), whole


class _Words:
    """Words of which one may be coming, and what each stands for."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self.meaning = dict(words)
        self._sorted = sorted(words)

    def begin(self, text: str) -> bool:
        """Whether one of them begins like this."""
        at = bisect_left(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at].startswith(text)


def _words(*words: str) -> _Words:
    return _Words({word: word for word in words})


_PYTHON_TAG, _PYTHON_START, _PYTHON_END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
# "<" stands only at the beginning of each, so where one breaks off another can begin.
_MARKS = _words(_PYTHON_TAG, _PYTHON_START, _PYTHON_END, _FUNCTION, _FUNCTION_END)
_MEMBERS = _words("name", "type", "parameters", "arguments")
_TYPES = _words("function")

_BEGINNING = re.compile(r"<|(?<=\s)[{\[]")
_WHITE, _GAP = re.compile(r"\s*"), re.compile(r"[\s;]*")
_NAME, _ALL, _CODE = re.compile(r"[\w.\-]*"), re.compile(r".*", re.DOTALL), re.compile(r"[^<]*")


class _Place(Enum):
    """Where a call is looked for."""

    START = "at the beginning of the message"
    TEXT = "in text"
    AFTER = "after another call"


class CallParser(Reader):
    """Content and calls out of text that comes in pieces. `push` and `finish` return what became certain.

    Parameters
    ----------
    functions : names that may be called.
    built_in : of Meta's tools `brave_search`, `wolfram_alpha` and `code_interpreter`, those that may be called.
    anywhere : if False, only what a message begins with, and what follows that, is a call: the rest is text.
    """

    def __init__(self, functions: Collection[str], built_in: Collection[str] = (), *, anywhere: bool = True) -> None:
        self._anywhere = anywhere
        names = {f"{name}.call": name for name in built_in} | {name: name for name in (*built_in, *functions)}
        self._names = _Words({word: name for word, name in names.items() if word})
        self._interprets = CODE_INTERPRETER in built_in
        self._tag = ""  # the mark before what is being read
        self._closing = False  # whether a call is whole but for what closes its form
        super().__init__()

    def _grammar(self) -> Steps[None]:
        place = _Place.START
        while True:
            if (yield from self._attempt(place)):
                place = _Place.AFTER
            elif (yield from self._content()):
                place = _Place.TEXT
            else:
                return

    def _content(self) -> Steps[bool]:
        """Ordinary text up to where a call may begin; whether there is such a place."""
        if not self._anywhere:
            yield from self._run(_ALL)
            return False
        while True:
            if self._at == 0 and self._text[:1] in ("{", "[") and self._before.isspace():
                return True
            found = _BEGINNING.search(self._text, self._at)
            if found:
                self._at = found.start()
                return True
            self._at = len(self._text)
            if not (yield from self._more()):
                return False

    def _attempt(self, place: _Place) -> Steps[bool]:
        """A call, or several in brackets; whether it was one. What is none goes on as content or as code."""
        self._hold()
        self._closing = False
        try:
            yield from self._call(place)
        except Malformed:
            if self._mode is Mode.CALL:  # within the arguments
                self._spill()
                self._mode = Mode.TEXT
            elif self._closing and self._ended and self._mode is Mode.HELD:  # after them
                self._drop()
        self._lose()
        if self._mode is Mode.CODE:
            yield from self._code()
        return self._mode is Mode.CALL

    def _call(self, place: _Place) -> Steps[None]:
        """White space, marks, and a call in any of its forms."""
        self._tag = ""
        while True:
            character = yield from self._run(_GAP if place is _Place.AFTER else _WHITE)
            if not character:
                if place is _Place.AFTER:
                    self._drop()
                self._to_code = False
                raise Malformed
            mark = (yield from self._mark()) if character == "<" else ""
            self._check_held()
            if mark in (_PYTHON_TAG, _PYTHON_START):
                self._put(-1, self._prefix)
                self._prefix, self._to_code, self._tag = self._drop(), self._interprets, mark
                place = _Place.START
            elif mark in (_PYTHON_END, _FUNCTION_END) and place is _Place.AFTER:
                self._drop()
            elif mark == _FUNCTION:
                return (yield from self._function_call())
            elif mark or character == "<":
                raise Malformed
            elif character == "{":
                return (yield from self._json_call())
            elif character == "[":
                return (yield from self._list())
            elif place is _Place.START:
                return (yield from self._bare_call())
            else:
                raise Malformed

    def _check_held(self) -> None:
        self._spill()
        if self._mode is not Mode.HELD:  # lost, or too long
            raise Malformed

    def _mark(self) -> Steps[str]:
        """One of the marks, or "" with what only begins like one read."""
        mark = ""
        while mark not in _MARKS.meaning:
            character = yield from self._peek()
            if not character or not _MARKS.begin(mark + character):
                return ""
            self._read()
            mark += character
        return mark

    # The forms of calls.

    def _function_call(self) -> Steps[None]:
        """<function=name>{…}, after the "=". What closes it stands after the call."""
        name = yield from self._name(">")
        self._read()
        yield from self._expect("{")
        self._commit((name, ""))
        yield from self._value(python=False)
        self._spill()

    def _json_call(self) -> Steps[None]:
        """{"name": …, "parameters": {…}}"""
        name, arguments = yield from self._json_members()
        self._commit((name, arguments))
        self._hold_closing()
        yield from self._json_rest()
        self._drop_closing()

    def _json_list(self) -> Steps[None]:
        """[{"name": …, "parameters": {…}}, …], after the bracket: calls up to the first item that is none."""
        while True:
            if (yield from self._space()) == "{":
                yield from self._json_call()
                self._hold_closing()
            else:
                self._lose()
                yield from self._value(python=False, strict=True)
            if (yield from self._space()) == "]":
                break
            yield from self._expect(",")
            self._read()
            self._closing = False
        self._read()
        self._drop_closing()

    def _hold_closing(self) -> None:
        if self._mode is Mode.CALL:
            self._hold()
            self._closing = True

    def _drop_closing(self) -> None:
        self._spill()
        if self._mode is Mode.HELD:
            self._drop()
            self._mode = Mode.CALL

    def _json_members(self) -> Steps[tuple[str, str]]:
        """The members of a JSON object until name and arguments have both been read."""
        name, arguments = "", None
        while True:
            self._read()
            yield from self._expect('"')
            member = yield from self._word(_MEMBERS)
            yield from self._expect(":")
            self._read()
            character = yield from self._space()
            if member == "name" and not name:
                name = yield from self._word(self._names)
            elif member == "type":
                yield from self._word(_TYPES)
            elif member in ("parameters", "arguments") and arguments is None and character == "{":
                if name:
                    self._commit((name, ""))
                self._json.clear()
                yield from self._value(python=False)
                arguments = "".join(self._json)
            else:
                self._lose()
                yield from self._value(python=False, strict=True)
            if name and arguments is not None:
                return name, arguments
            if (yield from self._space()) == "}":
                self._lose()
                return "", ""
            yield from self._expect(",")

    def _json_rest(self) -> Steps[None]:
        """The rest of a JSON object: other members are read over."""
        while (yield from self._space()) == ",":
            self._read()
            yield from self._expect('"')
            yield from self._json_string([], strict=True)
            yield from self._expect(":")
            self._read()
            yield from self._value(python=False, strict=True)
        yield from self._expect("}")
        self._read()

    def _word(self, words: _Words) -> Steps[str]:
        """A string of JSON that is one of these words. If it is another value, the call is lost."""
        if (yield from self._peek()) != '"':
            self._lose()
            yield from self._value(python=False, strict=True)
            return ""
        self._read()
        word = ""
        while (character := (yield from self._peek())) not in ("", '"', "\\") and words.begin(word + character):
            self._read()
            word += character
        if character != '"' and character != "\\":
            self._lose()
        written = [word]
        yield from self._json_string_rest(written, strict=True)
        word = json.loads('"' + "".join(written), strict=False)
        if word not in words.meaning:
            self._lose()
        return words.meaning.get(word, "")

    def _list(self) -> Steps[None]:
        self._read()
        character = yield from self._space()
        if character and character in '{["-0123456789':
            yield from self._json_list()
        else:
            yield from self._python_list()

    def _python_list(self) -> Steps[None]:
        """[f(a=1), g()], after the bracket: nothing is a call unless everything is."""
        calls = [(yield from self._python_call())]
        while (yield from self._space()) != "]":
            yield from self._expect(",")
            self._read()
            character = yield from self._space()
            if character == "{":
                self._lose()
                yield from self._value(python=False, strict=True)
            elif character != "]":
                calls.append((yield from self._python_call()))
        self._read()
        self._commit(*calls)

    def _bare_call(self) -> Steps[None]:
        """f(a=1), with nothing after it but the mark that closes the one before it."""
        call = yield from self._python_call()
        character = yield from self._run(_WHITE)
        self._check_held()
        if character == "<" and self._tag == _PYTHON_START and (yield from self._mark()) == _PYTHON_END:
            character = ""
        if character:
            raise Malformed
        self._commit(call)

    def _python_call(self) -> Steps[tuple[str, str]]:
        """f(a=1, b="x")"""
        name = yield from self._name("(")
        self._read()
        self._json.clear()
        self._json.append("{")
        keywords: set[str] = set()
        while (yield from self._space()) != ")":
            if keywords:
                self._json.append(", ")
            keyword = yield from self._token()
            if not keyword.isidentifier() or keyword in keywords:
                raise Malformed
            keywords.add(keyword)
            yield from self._expect("=")
            self._read()
            self._json.append(f"{string_as_json(keyword)}: ")
            yield from self._value(python=True)
            if (yield from self._space()) != ")":
                yield from self._expect(",")
                self._read()
        self._read()
        return name, "".join((*self._json, "}"))

    def _name(self, end: str) -> Steps[str]:
        """The name of a call, up to this character. If it is not offered, the call is lost."""
        name = ""
        while (character := (yield from self._peek())) and self._names.begin(name + character):
            self._read()
            name += character
        if character != end or name not in self._names.meaning:
            self._lose()
            name = ""
        if (yield from self._run(_NAME)) != end:
            raise Malformed
        return self._names.meaning.get(name, "")

    def _code(self) -> Steps[None]:
        """Code for the interpreter, up to what closes its mark or the end of the text."""
        while (yield from self._run(_CODE if self._tag == _PYTHON_START else _ALL)):
            self._hold()
            closed = (yield from self._mark()) == _PYTHON_END
            held = self._drop()
            if closed:
                break
            self._put(self._index, held)
            self._mode = Mode.CODE
        self._put(self._index, '"}')
        self._mode = Mode.CALL
