"""Grammars that an answer can be made to follow, as plain values; what may be asked is checked here, without a model.

A JSON schema is read as draft 2020-12 and copied keyword by keyword: what only describes is left out, and what could
not be followed to the letter is refused by name, so that a finished answer is valid wherever it is checked.
`constraint.py` compiles a grammar for a model's tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import unquote

from herd.errors import UsageError, near

MAX_BYTES = 1 << 16
"""UTF-8 bytes of a grammar, of a JSON schema without its descriptions."""
MAX_DEPTH = 64
"""Objects and lists inside one another in a JSON schema."""

_LARGEST = 2**53  # whole numbers up to here are exact in every reader of JSON
_EXACT = "a number up to 2**53, with 15 digits if it has a fraction"
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ONE_SCHEMA = ("items", "additionalProperties")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_OTHERS = ("type", "enum", "const", "required", "pattern", "format", "$ref")
_FOLLOWED = (*_OTHERS, *_COUNTS, *_BOUNDS, *_ONE_SCHEMA, *_LISTS_OF_SCHEMAS, *_NAMED_SCHEMAS)
_NOT_FOLLOWED = {"not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"}
_NOT_FOLLOWED |= {"dependentSchemas", "dependentRequired", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef"}
# They say nothing about which answers are valid. `$id` counts at the top only, where nothing depends on it.
_DESCRIPTIONS = {"$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly"}
_DESCRIPTIONS |= {"writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "discriminator"}
# A space, or a line break with indentation: without a bound, a model may go on with blanks for ever.
_WHITESPACE = r" |\n[ \t]{0,20}"
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_PATTERN_PARTS = re.compile(r"\\.|\[\^?\]?|&&|--|~~|.", re.DOTALL)
# Characters that all readers have in these classes, and those that any of them has.
_CLASSES = {
    "d": (r"0-9", r"\p{Nd}"),
    "w": (r"0-9A-Za-z_", r"\p{L}\p{M}\p{N}_"),
    "s": (
        r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
        r"\t-\r\x1c-\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
    ),
}
_ANY = r"[^\n\r\u2028\u2029]"  # for ECMAScript all of these end a line
_BLANKS = re.compile(r"\s*")
# A schema, and what may hold its word: a comment, a string, a regular expression.
_LARK_PARTS = re.compile(r'%json|(?://|#)[^\n]*|"(?:\\.|[^"\\\n])*"?|/(?:\\.|[^/\\])*/?')


@dataclass(frozen=True)
class Grammar:
    """What an answer may be, made by one of the class methods; `Sampling(grammar=…)` makes an answer follow it."""

    kind: Literal["JSON schema", "Lark grammar", "regular expression"]
    text: str
    """A schema as JSON with the settings of llguidance, a Lark grammar, or a regular expression."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool, *, compact: bool = False) -> Grammar:
        """One JSON value that is valid under a JSON schema (draft 2020-12, whatever `$schema` says).

        Properties come in the schema's order, further ones after them. Blanks may stand where JSON allows them: one
        space, or one line break with indentation; with `compact` none. Formats are followed in form: the 29th of
        February may be in any year.
        Raises UsageError for a keyword that is not followed (`not`, `if`, `uniqueItems`, …), a `$ref` to elsewhere,
        more than 64 KiB or 64 levels. A `oneOf` must be of alternatives that exclude each other visibly: by type, or
        by a required property with different constants.
        """
        return cls("JSON schema", _fitting(_dumped(_read_schema(schema, compact)), "JSON schema"))

    @classmethod
    def json_object(cls, *, compact: bool = False) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, compact=compact)

    @classmethod
    def regex(cls, text: str) -> Grammar:
        """The whole answer matches a regular expression, in the syntax of Rust's `regex` crate.

        There are no look-around and back-references, and `a*?` means the same as `a*`.
        """
        return cls("regular expression", _fitting(text, "regular expression"))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """The answer is a sentence of a Lark grammar, in llguidance's dialect, from its rule `start`.

        `%json {…}` stands for a JSON value of a schema, read as `json_schema` reads it. Control tokens have no name
        here (`<|eot_id|>` is refused) and no number: content never becomes control.
        """
        return cls("Lark grammar", _fitting(_with_read_schemas(_fitting(text, "Lark grammar")), "Lark grammar"))

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """One of these texts."""
        if isinstance(options, str) or not options or not all(isinstance(option, str) for option in options):
            raise UsageError("a choice is of at least one text", allowed="a list of strings")
        return cls.lark("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(option) for option in options))


def _fitting(text: str, kind: str) -> str:
    """The text of a grammar, unless it is none or too long."""
    if not isinstance(text, str):
        raise UsageError(f"a {kind} is a text", value=type(text).__name__)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"the {kind} is no Unicode text", value=text) from None
    if size > MAX_BYTES:
        raise UsageError(f"the {kind} is too long", value=f"{size} bytes", allowed=f"up to {MAX_BYTES}")
    return text


def _dumped(schema: Any) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _with_read_schemas(text: str) -> str:
    """A Lark grammar with each schema after `%json` as `_read_schema` gives it."""
    parts, position, at = [], 0, 0
    while found := _LARK_PARTS.search(text, at):
        at = found.end()
        if found[0] != "%json":
            continue
        blanks = _BLANKS.match(text, at)
        start = blanks.end() if blanks else at
        try:
            schema, at = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            raise UsageError("no JSON schema follows %json", value=text[found.start() :][:80]) from None
        parts += [text[position:start], _dumped(_read_schema(schema, compact=False))]
        position = at
    return "".join([*parts, text[position:]])


def _read_schema(schema: object, compact: bool) -> Any:
    """A copy with what must be followed, and how llguidance is to write it. Raises UsageError as `json_schema` does."""
    reader = _Reader()
    read = reader.schema(schema, ())
    reader.settle()
    if isinstance(read, bool):
        read = {} if read else {"enum": []}  # the settings need a place
    settings = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _WHITESPACE}
    return {"x-guidance": settings, **read}


Path = tuple[str, ...]


class _Reader:
    """Reads one schema. Recursion ends at MAX_DEPTH, and everything at a count that no short enough text exceeds."""

    def __init__(self) -> None:
        self._left = MAX_BYTES // 2  # each takes two bytes at least, with what stands around it
        self._schemas: dict[Path, Any] = {}
        self._refs: list[tuple[Path, str]] = []
        self._one_ofs: list[dict[str, Any]] = []

    def schema(self, node: object, path: Path) -> Any:
        self._count(path)
        if isinstance(node, bool):
            self._schemas[path] = node
            return node
        if not isinstance(node, Mapping):
            raise _refused("this is no schema", node, path, "an object, true or false")
        read: dict[str, Any] = {}
        self._schemas[path] = read
        for keyword, value in node.items():
            if keyword in _DESCRIPTIONS or (keyword == "$id" and not path):
                continue
            if keyword not in _FOLLOWED:
                allowed = ", ".join(_FOLLOWED) if keyword in _NOT_FOLLOWED else near(str(keyword), _FOLLOWED)
                raise _refused("this keyword of JSON Schema is not followed", keyword, path, allowed)
            read[keyword] = self._keyword(keyword, value, (*path, keyword))
        self._check_min_properties(read, path)
        if "oneOf" in read:
            self._one_ofs.append(read)
        return read

    def settle(self) -> None:
        """What needs the whole schema: references must lead to a schema of it, alternatives be told apart."""
        for path, ref in self._refs:
            if _pointed_at(ref) not in self._schemas:
                raise _refused("$ref leads to no schema of this document", ref, path, '"#/$defs/name"')
        for read in self._one_ofs:
            if self._exclusive(read["oneOf"]) and "anyOf" not in read:
                read["anyOf"] = read.pop("oneOf")

    def _keyword(self, keyword: str, value: Any, path: Path) -> Any:
        self._count(path)
        if keyword in _ONE_SCHEMA:
            if isinstance(value, list | tuple):
                raise _refused("a list of schemas here is of an older draft", value, path, "prefixItems for the list")
            return self.schema(value, path)
        if keyword in _LISTS_OF_SCHEMAS:
            options = _sequence(value, path)
            return [self.schema(option, (*path, str(i))) for i, option in enumerate(options)]
        if keyword in _NAMED_SCHEMAS:
            if not isinstance(value, Mapping):
                raise _refused("this is no object", value, path, "names with their schemas")
            named = {self._name(name, keyword, path): self.schema(v, (*path, str(name))) for name, v in value.items()}
            if len(named) < len(value):
                raise _refused("two of these patterns are the same", list(value), path, "allOf for what both ask for")
            return named
        if keyword == "const":
            return self._value(value, path)
        if keyword == "enum":
            return [self._value(v, (*path, str(i))) for i, v in enumerate(_sequence(value, path))]
        if keyword in _COUNTS:
            return _checked(value, path, f"a whole number from 0 to {2**31 - 1}", _is_count)
        if keyword in _BOUNDS:
            _checked(value, path, _EXACT, _is_exact)
            return _apart(value, keyword) if keyword.startswith("exclusive") else value
        if keyword == "type":
            types = [value] if isinstance(value, str) else _sequence(value, path)
            for kind in types:
                self._count(path)
                _checked(kind, path, ", ".join(_TYPES), lambda v: v in _TYPES)
            return value if isinstance(value, str) else list(types)
        if keyword == "required":
            return [self._name(name, "properties", path) for name in _sequence(value, path)]
        text: str = _checked(value, path, "a text", lambda v: isinstance(v, str))
        if keyword == "format":
            _checked(text, path, ", ".join(_FORMATS), lambda v: v in _FORMATS)
        if keyword == "pattern":
            self._count(path, len(text))
            return _narrowed(text, path)
        if keyword == "$ref":
            self._refs.append((path, text))
        return text

    def _value(self, value: Any, path: Path) -> Any:
        """A constant: any JSON value."""
        self._count(path)
        if isinstance(value, list | tuple):
            return [self._value(v, (*path, str(i))) for i, v in enumerate(value)]
        if isinstance(value, Mapping):
            return {self._name(name, "const", path): self._value(v, (*path, str(name))) for name, v in value.items()}
        if value is None or isinstance(value, bool | str):
            return value
        return _checked(value, path, f"a JSON value; {_EXACT}", _is_exact)

    def _name(self, name: object, keyword: str, path: Path) -> str:
        self._count(path)
        text: str = _checked(name, path, "a name that is a text", lambda v: isinstance(v, str))
        if keyword == "patternProperties":
            self._count(path, len(text))
            return _narrowed(text, path)
        # Such a name has several spellings in JSON, so that it could come twice.
        _checked(text, path, "a name without control characters", lambda v: not _CONTROL_CHARACTER.search(v))
        return text

    def _count(self, path: Path, bytes_: int = 2) -> None:
        self._left -= bytes_ // 2
        if self._left < 0:
            raise UsageError("the JSON schema is too long", allowed=f"up to {MAX_BYTES} bytes")
        if len(path) > MAX_DEPTH:
            raise UsageError("the JSON schema is nested too deep", value=f"{len(path)} levels", allowed=f"{MAX_DEPTH}")

    def _check_min_properties(self, read: dict[str, Any], path: Path) -> None:
        """Names outside `properties` may come twice, and then count once."""
        least, named = read.get("minProperties", 0), len(set(read.get("required", ())))
        if least > max(1, named):
            raise _refused(
                "minProperties asks for properties without names", least, path, f"up to {max(1, named)} here"
            )

    def _exclusive(self, options: list[Any]) -> bool:
        """Whether the alternatives are objects with a required property that has another constant in each."""
        resolved = [self._resolved(option) for option in options]
        if not resolved or not all(isinstance(option, dict) and option.get("type") == "object" for option in resolved):
            return False
        common = set.intersection(*(set(option.get("required", ())) for option in resolved))
        return any(self._tells_apart(name, resolved) for name in common)

    def _tells_apart(self, name: str, options: list[Any]) -> bool:
        seen: set[str] = set()
        for option in options:
            values = _constants(option.get("properties", {}).get(name))
            if not values or values & seen:
                return False
            seen |= values
        return True

    def _resolved(self, option: Any) -> Any:
        """The schema that an alternative stands for, where that is only a reference; None in a circle of them."""
        for _ in range(MAX_DEPTH):
            if not isinstance(option, dict) or set(option) != {"$ref"}:
                return option
            option = self._schemas[_pointed_at(option["$ref"]) or ()]
        return None


def _constants(schema: Any) -> set[str]:
    """The strings that a property is one of; none where it may be something else."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return set(values) if all(isinstance(value, str) for value in values) else set()


def _pointed_at(ref: str) -> Path | None:
    """The place that a JSON pointer of this document names; None for another kind of reference."""
    pointer = unquote(ref)
    if pointer == "#":
        return ()
    if not pointer.startswith("#/"):
        return None
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in pointer[2:].split("/"))


def _narrowed(pattern: str, path: Path) -> str:
    """A pattern that matches what every reader of JSON Schema takes it to match, be it ECMAScript, Python or Rust.

    What they read differently to no end is refused: brackets and doubled signs inside a class.
    """
    parts, inside, negated = [], False, False
    for part in _PATTERN_PARTS.findall(pattern):
        if (part[0] == "[" and (inside or part[-1] == "]")) or (inside and part in ("&&", "--", "~~")):
            raise _refused(
                "a class of characters that is read in two ways", pattern, path, "\\ before such a character"
            )
        if part[0] == "[":
            inside, negated = True, part == "[^"
        elif part == "]":
            inside = False
        elif part == "." and not inside:
            part = _ANY
        elif part[1:].lower() in _CLASSES and part[0] == "\\":
            complement = part[1:].isupper()
            characters = _CLASSES[part[1:].lower()][complement != (inside and negated)]
            part = f"[^{characters}]" if complement else characters if inside else f"[{characters}]"
        parts.append(part)
    return "".join(parts)


def _is_exact(value: Any) -> bool:
    """llguidance keeps numbers as float64 and writes 15 digits of a fraction."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        return False
    return value == int(value) or float(f"{value:.15g}") == value


def _apart(bound: float, keyword: str) -> float:
    """An exclusive bound that is no whole number: the next one of 15 digits, or 1e-9 away.

    Of a whole number, llguidance takes the number itself where the other bound is less than 1 away.
    """
    if bound != int(bound):
        return bound
    digits = len(str(abs(int(bound))))
    step = Decimal(10) ** max(-9, digits - 15)
    return float(Decimal(int(bound)) + (step if keyword == "exclusiveMinimum" else -step))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _sequence(value: Any, path: Path) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _refused("this is no list", value, path, "a list")
    return value


def _checked(value: Any, path: Path, allowed: str, good: Callable[[Any], bool]) -> Any:
    if not good(value):
        raise _refused("a value that cannot be followed", value, path, allowed)
    return value


def _refused(what: str, value: object, path: Path, allowed: str) -> UsageError:
    place = "/".join(["#", *path])
    if not isinstance(value, str | float | bool) and not (isinstance(value, int) and value.bit_length() <= 64):
        value = type(value).__name__  # what has no bounds is not written out
    return UsageError(f"in the JSON schema at {place[:200]!r}: {what}", value=value, allowed=allowed)
