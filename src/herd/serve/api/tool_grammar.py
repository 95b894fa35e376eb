"""The grammar of an answer whose calls are held to their functions' schemas: calls from its beginning on, or text.

Calls come in all forms that `herd.tokenizer.CallParser` reads, but for one: f(a=1) as the whole message, and what
follows <|python_tag|> or <|python_start|>, cannot be told from text in time, so no answer begins like that. Text is
whatever begins in another way. It can hold nothing that counts as a call, since the parser then looks for calls at the
beginning only (`anywhere=False`): so an answer is read by the parser as it was written under the grammar.

In Python's form, arguments stand in the schema's order, and only functions with plain schemas of an object have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from herd.engine import Grammar
from herd.engine.grammar import MAX_BYTES
from herd.errors import UsageError

# The white space of Python's `re`, of which four characters are none in Rust's; that of JSON.
_WHITE, _BLANK = r"[\s\x1c-\x1f]", r"[ \t\r\n]"
_MOST = 16  # calls in a list, and beside each other
_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}

# White space is bounded where calls have it, as a model may go on with it for ever: a space, or a line break with
# indentation, and a blank line in front.
_COMMON = rf"""
LEAD: /{_WHITE}{{0,2}}/
GAP: /( |\n[ \t]{{0,8}})?/
COLON: GAP ":" GAP
COMMA: GAP "," GAP
BRACE: GAP "}}"
BRACKET: GAP "]"
HEAD: "{{" GAP ("\"type\"" COLON "\"function\"" COMMA)? "\"name\"" COLON
REST: COMMA ("\"parameters\"" | "\"arguments\"") COLON
END: "</function>"
object: %json {{"type": "object"}}
keywords: (KEYWORD value (COMMA KEYWORD value)*)? ")"
KEYWORD: /[A-Za-z_][A-Za-z0-9_]*=/
value: STRING | NUMBER | WORD | "[" (value (COMMA value)*)? BRACKET | "{{" (member (COMMA member)*)? BRACE
member: STRING COLON value
STRING: /"([^"\\\x00-\x1f]|\\[\\"'nrt])*"|'([^'\\\x00-\x1f]|\\[\\"'nrt])*'/
NUMBER: /-?(0|[1-9][0-9]{{0,30}})(\.[0-9]{{1,30}})?/
WORD: "True" | "False" | "None" | "true" | "false" | "null"
"""


@dataclass(frozen=True)
class Held:
    """A function, and the JSON schema that its arguments are held to; None: any object."""

    name: str
    schema: dict[str, Any] | None


def read_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without what only describes. Raises UsageError for one that cannot be followed."""
    read: dict[str, Any] = json.loads(Grammar.json_schema(schema).text)
    del read["x-guidance"]
    return read


def answers(functions: Sequence[Held], *, several: bool, text: bool) -> Grammar:
    """A call of one of these functions, with `several` more than one, with `text` any text instead.

    Schemas are as `read_schema` gives them.

    Raises UsageError when all together is too large.
    """
    try:
        return Grammar.lark(_Rules(functions, several, text, python=True).text)
    except UsageError:  # then calls in Python's form, whose schemas stand beside those of JSON, are left out
        return Grammar.lark(_Rules(functions, several, text, python=False).text)


class _Rules:
    """The rules and terminals of a grammar, as they come together."""

    def __init__(self, functions: Sequence[Held], several: bool, text: bool, *, python: bool) -> None:
        self._lines = [_COMMON]
        self._several = several
        self._values: dict[str, str] = {}  # rules by the schemas of values
        self._left = MAX_BYTES  # for the schemas of properties
        self._items: dict[str, list[str]] = {"LIST": [], "PYTHON": []}  # further ones of a list
        one: list[str] = []
        for i, function in enumerate(functions):
            name = json.dumps(f'"{function.name}"')
            arguments = "object" if function.schema is None else self._value(function.schema)
            self._lines += [
                f"OBJECT_{i}: LEAD HEAD {name}",
                f"FUNCTION_{i}: LEAD {json.dumps(f'<function={function.name}>')} GAP",
            ]
            one += [f"OBJECT_{i} REST {arguments} BRACE", f"FUNCTION_{i} {arguments} END?"]
            one.append(self._list("LIST", i, f"HEAD {name}", f"REST {arguments} BRACE"))
            if python and (keywords := self._keywords(i, function.schema)):
                one.append(self._list("PYTHON", i, json.dumps(f"{function.name}("), keywords))
        items = [(kind, each) for kind, each in self._items.items() if each]
        self._lines += [f"more_{kind.lower()}: COMMA ({' | '.join(each)})" for kind, each in items]
        self._lines.append("call: " + " | ".join(one))
        calls = f'call (";"? call){{0,{_MOST - 1}}}' if several else "call"
        if text:
            self._lines.append(f"TEXT: /(?s:.*)/ & ~/{_WHITE}*({_beginnings(functions)})(?s:.*)/")
            self._lines.append(f"start: (TEXT | {calls})?")
        else:
            self._lines.append(f"start: {calls}")
        self.text = "\n".join(self._lines)

    def _list(self, kind: str, i: int, begun: str, rest: str) -> str:
        """A list that begins with a call of function i; as a further item, such a call follows others."""
        self._lines.append(f'{kind}_{i}: LEAD "[" GAP {begun}')
        if not self._several:
            return f"{kind}_{i} {rest} BRACKET"
        self._lines.append(f"{kind}_ITEM_{i}: {begun}")
        self._items[kind].append(f"{kind}_ITEM_{i} {rest}")
        return f"{kind}_{i} {rest} more_{kind.lower()}{{0,{_MOST - 1}}} BRACKET"

    def _value(self, schema: dict[str, Any]) -> str:
        """The rule of a JSON value; one for all that have the same schema."""
        written = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        if written not in self._values:
            self._values[written] = f"value_{len(self._values)}"
            self._lines.append(f"{self._values[written]}: %json {written}")
        return self._values[written]

    def _keywords(self, i: int, schema: dict[str, Any] | None) -> str:
        """The rule of a=1, b="x"): what is required, and any of the others, in the schema's order.

        Empty where arguments cannot be held to the schema one by one.
        """
        if schema is None:
            return "keywords"
        names, required = list(schema.get("properties", {})), set(schema.get("required", ()))
        if schema.get("type") != "object" or schema.keys() - _PLAIN or required - set(names):
            return ""
        written = {name: self._keyword(schema, name) for name in names}
        if not all(written.values()):
            return ""
        firsts: list[str] = []  # the first one that is written: up to one that has to be
        optional = True
        for k, name in enumerate(names):
            further = f"COMMA {written[name]}" if name in required else f"(COMMA {written[name]})?"
            self._lines.append(f"after_{i}_{k}: {further} after_{i}_{k + 1}")
            if optional:
                firsts.append(f"{written[name]} after_{i}_{k + 1}")
            optional = optional and name not in required
        if optional:
            firsts.append('")"')
        self._lines.append(f'after_{i}_{len(names)}: ")"')
        self._lines.append(f"keywords_{i}: " + " | ".join(firsts))
        return f"keywords_{i}"

    def _keyword(self, schema: dict[str, Any], name: str) -> str:
        """What a=1 is; empty where a property's schema leads to other places than definitions."""
        own = schema["properties"][name]
        if not name.isidentifier() or not isinstance(own, dict):
            return ""
        if "$ref" in json.dumps(own):
            own = {**{key: schema[key] for key in ("$defs", "definitions") if key in schema}, **own}
        self._left -= len(json.dumps(own))
        if self._left < 0:  # definitions count for each property
            raise UsageError("the schemas of properties are too long")
        try:
            return f"{json.dumps(name + '=', ensure_ascii=False)} {self._value(read_schema(own))}"
        except UsageError:
            return ""


def _beginnings(functions: Sequence[Held]) -> str:
    """A regular expression for all that the parser could take for the beginning of a call, after white space.

    Words of JSON have spellings with escapes, and arguments may stand before the name: no text begins like that.
    """
    names = "|".join(re.escape(function.name) for function in functions)
    colon = f"{_BLANK}*:{_BLANK}*"
    member = "|".join(
        [
            rf'name"{colon}"(({names})"|[A-Za-z0-9_.\-]*\\)',
            rf'type"{colon}"(function"|[a-z]*\\)',
            rf'(parameters|arguments)"{colon}\{{',
            r"[a-z]*\\",
        ]
    )
    return "|".join(
        [
            rf'(\[{_BLANK}*)?\{{{_BLANK}*"({member})',
            rf"(\[{_BLANK}*)?({names})\(",
            f"<function=({names})>",
            r"<\|python_(tag|start)\|>",
        ]
    )
