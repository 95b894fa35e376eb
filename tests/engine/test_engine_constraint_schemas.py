"""Answers that follow a JSON schema, against jsonschema; and what of JSON Schema is refused by name."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herd import LLM, UsageError, tokenizer
from herd.engine import Grammar
from herd.engine.constraint import GrammarFailed, Grammars
from herd.engine.grammar import MAX_BYTES
from tests.engine.grammars import PERSON, accepts, walk

pytest.importorskip("llguidance")

NAMES = st.sampled_from(["a", "b", "kind", "é", "x y", '"q"', "a/b", "~"])
CONSTANTS = st.sampled_from(
    ["a", "", '"\\', "é\n\u0001", 1, -3, 1.5, 0, 0.1, 1e-5, 2**53, True, False, None, [1, "a", []], {"a": 1, "b": None}]
)
PATTERNS = st.sampled_from(
    [
        "^[ab]{1,3}$",
        "a",
        "b$",
        "^x",
        r"^\d{2}$",
        "a|^b",
        "^(ab|c)*$",
        "^[^a]+$",
        r"\.",
        "^.{2,4}$",
        r"[\]\[]",
        "^$",
        "é",
    ]
)
FORMATS = st.sampled_from(["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname", "duration"])
NUMBERS = st.sampled_from([-20, -1, 0, 1, 7, 2.5, -0.1, 0.3, 1e-3, 12345.678, 1e6, -(2**53)])
SMALL = st.integers(0, 3)


def some(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the optional keys, in any order: the order of keywords must not matter."""
    pairs = st.fixed_dictionaries(required, optional=optional).map(lambda d: list(d.items()))
    return pairs.flatmap(st.permutations).map(dict)


LEAVES = st.one_of(
    st.sampled_from([True, {}, {"type": "boolean"}, {"type": ["null", "integer"]}]),
    CONSTANTS.map(lambda value: {"const": value}),
    st.lists(CONSTANTS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    some({"type": st.just("string")}, {"pattern": PATTERNS, "minLength": SMALL, "maxLength": st.integers(2, 6)}),
    some({"type": st.just("string"), "format": FORMATS}, {}),
    some(
        {"type": st.sampled_from(["number", "integer"])},
        {"minimum": NUMBERS, "exclusiveMaximum": NUMBERS, "multipleOf": st.sampled_from([1, 3, 10, 0.5, 0.25])},
    ),
    some({"type": st.just("number")}, {"exclusiveMinimum": NUMBERS, "maximum": NUMBERS}),
    st.sampled_from(["#", "#/$defs/d", "#/$defs/a~1b", "#/properties/a"]).map(lambda ref: {"$ref": ref}),
)


def inside(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, schemas, max_size=3)
    optional = {
        "properties": properties,
        "required": st.lists(NAMES, max_size=2, unique=True),
        "additionalProperties": st.one_of(st.booleans(), schemas),
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "é", r"^k.*$", r"\d"]), schemas, max_size=1),
        "maxProperties": SMALL,
    }
    items = {"items": schemas, "prefixItems": st.lists(schemas, min_size=1, max_size=3)}
    combined = {kind: st.lists(schemas, min_size=1, max_size=3) for kind in ("anyOf", "oneOf", "allOf")}
    return st.one_of(
        some({"type": st.just("object")}, optional),
        some({"type": st.just("array")}, {**items, "minItems": st.integers(0, 2), "maxItems": SMALL}),
        some({}, {**combined, "type": st.sampled_from(["object", "array", "string"]), "properties": properties}),
    )


SCHEMAS = st.recursive(LEAVES, inside, max_leaves=8)


def followed(schema: Any) -> Grammar | None:
    """The grammar of a schema, None where it is refused."""
    try:
        return Grammar.json_schema(schema)
    except UsageError:
        return None


@settings(deadline=None, max_examples=150)
@given(schema=SCHEMAS, definition=SCHEMAS, other=SCHEMAS, seed=st.integers(0, 2**32))
def test_answers_are_valid_under_their_schema(
    grammars: Grammars, tok: tokenizer.Tokenizer, schema: Any, definition: Any, other: Any, seed: int
) -> None:
    if isinstance(schema, dict):
        schema = {**schema, "$defs": {"d": definition, "a/b": other}}
    grammar = followed(schema)
    assume(grammar is not None)
    assert grammar is not None
    try:
        grammars.check(grammar)
        texts = [walk(grammars, tok, grammar, seed + i, ends=2.0 + 2 * i) for i in range(3)]
    except GrammarFailed:
        return  # nothing is valid under it, or llguidance cannot follow it; and says so
    validator = jsonschema.Draft202012Validator(schema)
    for text in texts:
        if text is not None:
            value = json.loads(text)
            try:
                problems = [error.message for error in validator.iter_errors(value)]
            except RecursionError:  # an alternative leads back to itself, which jsonschema follows for ever
                continue
            assert not problems, (text, problems)


@settings(deadline=None, max_examples=25)
@given(schema=SCHEMAS, seed=st.integers(0, 2**20))
def test_answers_of_a_model_are_valid_under_their_schema(llm: LLM, schema: Any, seed: int) -> None:
    """As above with a model on each backend; by the bias it comes to an end."""
    schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": {"d": True, "a/b": {}}}
    grammar = followed(schema)
    assume(grammar is not None)
    ends = {i: 8.0 for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.token_bytes(i) in (b'"', b"}", b"]")}
    try:
        answers = llm.generate("x", grammar=grammar, n=3, seed=seed, temperature=1.0, logit_bias=ends, max_tokens=60)
    except GrammarFailed:
        return
    assert isinstance(answers, list)
    for answer in answers:
        if answer.finish_reason == "stop":
            try:
                jsonschema.validate(json.loads(answer.text), schema)
            except RecursionError:
                continue


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (PERSON, ['{"name": "Ada", "age": 36}', '{"name":"","age":0,"tags":["a","b"]}'], ['{"name": "Ada"}', "[]"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.5", "0.25"], ["0", "0.0", "-0.1"]),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5", "-0.25"], ["0", "-0", "-0.0"]),
        ({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 5}, ["3", "4"], ["2", "5", "3.0"]),
        ({"const": {"a": [1, None, "é\n"]}}, ['{"a": [1, null, "é\\n"]}', '{"a":[1,null,"é\\n"]}'], ['{"a":[1]}']),
        ({"type": "object", "minProperties": 1, "additionalProperties": {"const": 1}}, ['{"a":1}'], ["{}", '{"a":2}']),
        ({"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#"}}]}, ["1", "[1, [1]]", "[[]]"], ["[2]"]),
        (True, ["1", '{"a": [1, 2]}', "null"], ["{", "nul"]),
    ],
)  # fmt: skip
def test_schemas_accept_and_refuse(
    grammars: Grammars, tok: tokenizer.Tokenizer, schema: Any, good: list[str], bad: list[str]
) -> None:
    grammar = Grammar.json_schema(schema)
    grammars.check(grammar)
    validator = jsonschema.Draft202012Validator(schema)
    for text in good:
        assert validator.is_valid(json.loads(text)) and accepts(grammars, tok, grammar, text), text
    for text in bad:
        assert not accepts(grammars, tok, grammar, text), text


def test_alternatives_that_a_property_tells_apart(grammars: Grammars, tok: tokenizer.Tokenizer) -> None:
    """A tagged union as pydantic writes it: oneOf over references, which llguidance alone does not take."""
    cat = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}}
    dog = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "additionalProperties": False}
    union = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}}
    tagged = {**union, "$defs": {"cat": {**cat, "required": ["kind"]}, "dog": {**dog, "required": ["kind"]}}}
    grammar = Grammar.json_schema(tagged)
    grammars.check(grammar)
    assert accepts(grammars, tok, grammar, '{"kind": "cat", "lives": 9}')
    assert accepts(grammars, tok, grammar, '{"kind":"wolf"}')
    assert not accepts(grammars, tok, grammar, '{"kind": "dog", "lives": 9}')
    untold = {"cat": cat, "dog": dog}  # the tag may be missing
    alike = {"cat": {**cat, "required": ["kind"]}, "dog": {**cat, "required": ["kind", "lives"]}}
    for definitions in (untold, alike):
        with pytest.raises(UsageError, match="anyOf"):
            grammars.check(Grammar.json_schema({**union, "$defs": definitions}))


def test_blanks_are_bounded(grammars: Grammars, tok: tokenizer.Tokenizer) -> None:
    loose, compact = Grammar.json_object(), Grammar.json_object(compact=True)
    for text in ('{"a": 1, "b": [1, 2]}', '{\n    "a": 1\n}'):
        assert accepts(grammars, tok, loose, text) and not accepts(grammars, tok, compact, text)
    assert accepts(grammars, tok, compact, '{"a":1,"b":[1,2]}')
    for text in ('{"a":  1}', '{"a":\n\n1}', ' {"a":1}', '{"a":1} '):
        assert not accepts(grammars, tok, loose, text), text


DEEP: Any = {"type": "string"}
for _ in range(2000):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
CYCLE: dict[str, Any] = {"type": "object"}
CYCLE["properties"] = {"a": CYCLE, "b": CYCLE}
WIDE: Any = {"type": "string"}
for _ in range(25):
    WIDE = {"anyOf": [WIDE, WIDE]}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {"type": "null"}}, "'#'.*not followed; got not"),
        ({"properties": {"a": {"if": True, "then": {}}}}, "'#/properties/a'.*got if"),
        ({"type": "array", "uniqueItems": True}, "got uniqueItems; allowed: type, enum.*minItems.*definitions"),
        ({"$defs": {"d": {"contains": {}}}}, r"'#/\$defs/d'.*contains"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"propertes": {}}, "did you mean 'properties'"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "if": {}}, "got if"),
        ({"type": "string", "format": "unknown"}, "unknown.*allowed: date-time"),
        ({"type": "integer", "format": "int32"}, "int32"),
        ({"$ref": "http://example.com/schema"}, "example.com.*allowed"),
        ({"$ref": "other.json#/$defs/a"}, "other.json"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"properties": {"a": {"$id": "http://example.com/"}}}, r"\$id"),
        ({"items": [{"const": 1}]}, "prefixItems"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"properties": {"a\n": {}}}, "control characters"),
        ({"required": ["\u007f"]}, "control characters"),
        ({"exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"maximum": float("nan")}, "maximum"),
        ({"maximum": float("inf")}, "maximum"),
        ({"const": 2**53 + 1}, "const"),
        ({"const": 10**5000}, "const.*got int"),
        ({"enum": [0.1234567890123456789]}, "15 digits"),
        ({"maxLength": -1}, "maxLength"),
        ({"maxLength": 2.0}, "maxLength"),
        ({"type": "text"}, "allowed: object, array"),
        ({"type": ["string", {}]}, "allowed: object, array"),
        ({"pattern": "[[a]b]"}, "two ways"),
        ({"patternProperties": {"[a&&b]": {}}}, "two ways"),
        ({"pattern": "[]a]"}, "two ways"),
        ({"pattern": 5}, "pattern"),
        ({"properties": []}, "no object"),
        ({"properties": {1: {}}}, "a name that is a text"),
        ({"anyOf": {}}, "no list"),
        ({"enum": "ab"}, "no list"),
        ({"const": object()}, "got object"),
        ({"const": "\ud800"}, "no Unicode"),
        ({"items": "string"}, "no schema"),
        ("{}", "no schema"),
        (DEEP, "nested too deep"),
        (CYCLE, "nested too deep|too long"),
        (WIDE, "too long"),
        ({"enum": ["x" * MAX_BYTES]}, "too long; got 65"),
        ({"enum": list(range(40_000))}, "too long"),
    ],
)
def test_schemas_are_refused_by_name(schema: Any, said: str) -> None:
    began = time.perf_counter()
    with pytest.raises(UsageError, match=re.compile(said, re.DOTALL)):
        Grammar.json_schema(schema)
    assert time.perf_counter() - began < 2


def test_descriptions_are_left_out() -> None:
    plain = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    described: Any = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "http://x/", "title": "T", **plain,
        "description": "x" * 2 * MAX_BYTES, "default": {"title": {}}, "examples": [object()], "deprecated": True,
    }  # fmt: skip
    assert Grammar.json_schema(described) == Grammar.json_schema(plain)
    assert len({Grammar.json_schema(described), Grammar.json_schema(plain), Grammar.json_object()}) == 2
