"""Requests that nobody sends in good faith, made of the server's own description: every field of every route, mostly
as it is described, so that a request gets far, and in part not. The same seed makes the same requests, but for the ids
that the server gave."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

WORDS = [
    "", "x", "<|eot_id|>", "\x00", "\ud83d", "💥" * 50, "a" * 5000, "../../etc/passwd", "{{7*7}}", "%s%n", "null",
    "[[[[[[", '{"a":' * 40, "system", "tool", "auto", "tiny", "(a+)+$", "[" * 200, "(?:" * 100, "x{1,100000}",
    'start: start "a"', "start: /a*/", "start: s\ns: s s | /a/",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, 1, -1, 2**31, -(2**31), 2**63, 2**64, 1e308, -1e308, 1e-320, 0.5, 3.0, 10**30, True, False, None,
]  # fmt: skip
SCHEMAS: list[Any] = [
    {}, {"type": "object"}, {"$ref": "#"}, {"$ref": "http://x/y"}, {"anyOf": []}, {"enum": []}, {"type": "nonsense"},
    {"pattern": "(a+)+$", "type": "string"}, {"minLength": 10**9, "type": "string"},
    {"type": "array", "minItems": 10**9}, {"properties": {str(i): {} for i in range(500)}},
    {"allOf": [{"type": "string"}, {"type": "number"}]}, {"not": {}}, {"multipleOf": 0},
    {"type": ["string", "null"], "format": "date"}, {"type": "object", "properties": {"on": {"type": "boolean"}}},
]  # fmt: skip
SENSIBLE: dict[str, list[Any]] = {
    "model": ["tiny"],
    "name": ["f", "g"],
    "arguments": ["{}", '{"on": true}'],
    "grammar": ["(yes|no)", 'start: "a"', "[a-f]{3}"],
    "timeout": [5, 30],
    "n": [1, 2],
    "logit_bias": [{"5": -100}, {"7": 3.5}],
    "stop_token_ids": [[5]],
    **{name: [1, 2, 5] for name in ("max_tokens", "max_output_tokens", "max_completion_tokens")},
    **{name: SCHEMAS for name in ("schema", "parameters", "input_schema")},
    **{name: ["c1", "c2"] for name in ("id", "call_id", "tool_call_id", "tool_use_id")},
}
"""Of fields by their names: what the description cannot say."""


_REFERENCE = re.compile(r'"#/components/schemas/(\w+)"')


class Sent(NamedTuple):
    """A request, and the route that it is made for."""

    route: tuple[str, str]
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Hostile:
    """Makes requests for one caller. `kept`: ids that the server gave for responses, which the caller fills."""

    def __init__(self, description: dict[str, Any], rng: random.Random, keys: list[str]) -> None:
        self._schemas = description["components"]["schemas"]
        self._rng = rng
        self._keys = keys
        self._routes = [
            (method.upper(), path, operation)
            for path, operations in description["paths"].items()
            for method, operation in operations.items()
            for _ in range(6 if "requestBody" in operation else 1)
        ]
        self.kept = ["resp_x"]
        self.made: set[tuple[str, str]] = set()
        """Fields that came: names of the schemas that they are in, and their own."""

    @property
    def fields(self) -> set[tuple[str, str]]:
        """All that bodies may have, named like those that came."""
        found: set[tuple[str, str]] = set()
        left = [operation["requestBody"] for _, _, operation in self._routes if "requestBody" in operation]
        while left:
            part = left.pop()
            if isinstance(part, dict) and (name := str(part.get("$ref", "")).rpartition("/")[2]):
                fields = {(name, field) for field in self._schemas[name].get("properties", {})}
                left += [self._schemas[name]] if fields - found else []
                found |= fields
            elif isinstance(part, dict | list):
                left += part.values() if isinstance(part, dict) else part
        return found

    def requests(self, count: int) -> Iterator[Sent]:
        for _ in range(count):
            method, path, operation = self._rng.choice(self._routes)
            route = (method, path)
            target = self._target(path, operation.get("parameters", ()))
            headers = {
                "Host": "localhost",
                "Content-Type": "application/json",
                "x-api-key": self._rng.choice(self._keys),
            }
            data = b""
            if "requestBody" in operation:
                body = self._value(operation["requestBody"]["content"]["application/json"]["schema"])
                data = json.dumps(body).encode("utf-8", "surrogatepass")
            if self._chance(0.03):  # broken bytes
                cut = self._rng.randrange(len(data) + 1)
                data = data[:cut] + self._rng.randbytes(self._rng.randrange(9)) + data[cut + self._rng.randrange(4) :]
            if self._chance(0.03):
                method = self._rng.choice(["GET", "HEAD", "OPTIONS", "DELETE", "TRACE", "PATCH", "PUT", "POST"])
            if self._chance(0.03):
                target = self._rng.choice(["//", "/%00", "/v1/models/" + "a" * 300, "/v1/responses/x/cancel"])
            if self._chance(0.03):
                headers["Content-Type"] = self._rng.choice(["text/plain", "application/json; charset=utf-7", ""])
            if self._chance(0.02):
                headers["x-api-key"] = "nobody's"
            if self._chance(0.03):
                name = "X-" + "".join(self._rng.choices(string.ascii_letters, k=self._rng.randrange(1, 30)))
                headers[name] = self._rng.choice(["x", "x" * 1000, "x" * 20_000, "ü", "a\tb"])
            yield Sent(route, method, target, headers, data)

    def _chance(self, share: float) -> bool:
        return self._rng.random() < share

    def _target(self, path: str, parameters: Any) -> str:
        query = {}
        for parameter in parameters:
            name, schema = parameter["name"], parameter["schema"]
            if parameter["in"] == "path":
                known = self.kept[int(self._rng.random() * len(self.kept))] if name == "id" else "tiny"
                word = self._rng.choice(WORDS[1:]) if self._chance(0.1) else known
                path = path.replace(f"{{{name}}}", quote(word, safe="", errors="replace"))
            elif self._chance(0.3):
                query[name] = str(self._value(schema))
        if self._chance(0.03):
            query["x"] = "1"
        return path + ("?" + urlencode(query, errors="replace") if query else "")

    def _value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value as a schema of the description has it, or now and then any other."""
        if self._chance(0.015) or not schema.keys() & {"$ref", "anyOf", "oneOf", "const", "enum", "type"}:
            return self._anything(depth)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self._object(self._schemas[name], depth, name)
        for several in ("anyOf", "oneOf"):
            if several in schema:
                known = {name for name, _ in self.made}
                fresh = [each for each in schema[several] if set(_REFERENCE.findall(json.dumps(each))) - known]
                return self._value(self._rng.choice(fresh or schema[several]), depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._rng.choice(schema["enum"])
        kind = schema["type"]
        if kind == "object":
            return self._object(schema, depth, "")
        if kind == "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
            count = max(least, min(most, self._rng.choice([0, 1, 1, 2])))
            return [self._value(schema.get("items", {}), depth + 1) for _ in range(count)]
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", 0), schema.get("maximum", 9)
            return self._rng.choice([low, low, high, 1, 1, 0.5 if kind == "number" else 1])
        return {"boolean": self._chance(0.5), "null": None, "string": self._rng.choice(WORDS[1:])}[kind]

    def _object(self, schema: dict[str, Any], depth: int, name: str) -> Any:
        """An object with what must be in it, how long an answer may be, and some of the rest."""
        if "properties" not in schema and schema.get("type") != "object":
            return self._value(schema, depth)
        found = {}
        for field, of in schema.get("properties", {}).items():
            short = field in ("max_tokens", "max_output_tokens")
            share = (0.3 if depth else 0.1) if (name, field) in self.made else 0.6
            if short or field in schema.get("required", ()) or self._chance(share):
                self.made.add((name, field))
                found[field] = self._field(field, of, depth + 1)
        if isinstance(more := schema.get("additionalProperties"), dict):
            found |= {self._rng.choice(["5", "x", *WORDS]): self._value(more, depth + 1) for _ in range(2)}
        return found

    def _field(self, name: str, schema: Any, depth: int) -> Any:
        if name == "previous_response_id":
            return self.kept[int(self._rng.random() * len(self.kept))]
        if name in SENSIBLE and self._chance(0.9):
            return self._rng.choice(SENSIBLE[name])
        return self._value(schema, depth)

    def _anything(self, depth: int) -> Any:
        """A value of JSON, of the kind that breaks things."""
        kind = self._rng.random()
        if depth > 3 or kind < 0.35:
            return self._rng.choice(WORDS)
        if kind < 0.6:
            return self._rng.choice(NUMBERS)
        if kind < 0.65:
            return self._rng.choice(SCHEMAS)
        if kind < 0.8:
            return [self._anything(depth + 1) for _ in range(self._rng.randrange(4))]
        names = [*SENSIBLE, *WORDS[:8]]
        return {self._rng.choice(names): self._anything(depth + 1) for _ in range(self._rng.randrange(5))}
