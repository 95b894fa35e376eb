"""Answers that follow a grammar, against independent oracles: jsonschema, `re`, a parser by hand, brute force.

Most answers here come from logits that are drawn anew for every token, so that all of a grammar is visited; what the
engine adds (batches, forks, guesses, places given up) is tested with the tiny model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herd import LLM, UsageError, checkpoint, tokenizer
from herd.engine import Grammar, Sampling
from herd.engine.constraint import Constraint, GrammarFailed, Grammars
from herd.engine.grammar import MAX_BYTES
from herd.engine.grammar_trial import trial
from herd.engine.sampler import SamplerRow, fold_seed, sample
from herd.errors import MissingDependency

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SUM = Grammar.lark('start: expr\nexpr: expr "+" term | term\nterm: /[0-9]{1,3}/ | "(" expr ")"')
GRAMMARS = {
    "schema": Grammar.json_schema(PERSON),
    "compact": Grammar.json_schema(PERSON, compact=True),
    "regex": Grammar.regex("[a-f]{2,5}(-[0-9]+)?"),
    "choice": Grammar.choice(["yes", "no", "maybe so", "ж"]),
    "lark": SUM,
}


@pytest.fixture(scope="module")
def tok(tiny: Path) -> tokenizer.Tokenizer:
    return tokenizer.load(tiny)


@pytest.fixture(scope="module")
def grammars(tok: tokenizer.Tokenizer) -> Grammars:
    return Grammars(tok)


def walk(
    grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar, seed: int, *, longest: int = 100, ends: float = 4.0
) -> str | None:
    """An answer under logits that are noise, with quotes, brackets and stop tokens likelier by `ends`; None if cut."""
    rng = np.random.default_rng(seed)
    row = SamplerRow(Sampling(temperature=1.0, top_p=1.0, grammar=grammar), seed, (), start(grammars, tok, grammar))
    likely = [i for i in range(tok.vocab_size) if tok.token_bytes(i) in (b'"', b"}", b"]", b")")] + list(tok.stop_ids)
    ids: list[int] = []
    for _ in range(longest):
        logits_V = rng.normal(0, 1.5, tok.vocab_size).astype(np.float32)
        logits_V[likely] += ends
        (choice,) = sample(logits_V[None], [row])
        if choice.token_id in tok.stop_ids:
            return tok.decode(ids, keep_first_space=True)
        assert choice.token_id not in tok.specials.values()
        ids.append(choice.token_id)
    return None


def start(grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar) -> Constraint:
    return Constraint(grammars, grammar, tok.stop_ids)


def ids_allowed(constraint: Constraint) -> set[int]:
    """One bit after the other, as the definition says."""
    bits = constraint.allowed().tolist()
    return {8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte >> j & 1}


def accepts(grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether a text can be written, always with the longest token that is allowed, and may end there."""
    constraint, rest = start(grammars, tok, grammar), text.encode()
    while rest:
        allowed = ids_allowed(constraint) - set(tok.specials.values())
        fitting = [i for i in allowed if rest.startswith(tok.token_bytes(i))]
        if not fitting:
            return False
        token_id = max(fitting, key=lambda i: len(tok.token_bytes(i)))
        rest = rest[len(tok.token_bytes(token_id)) :]
        constraint.commit(token_id)
    return tok.eos_id in ids_allowed(constraint)


# -- JSON schemas ------------------------------------------------------------------------------------------------------

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
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
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


# -- regular expressions, choices, Lark --------------------------------------------------------------------------------

ATOMS = st.sampled_from(["a", "b", "é", "[ab]", "[^a]", "[0-9]", ".", "(?:ab)", r"\n", "/", r"\\", "日"])
REGEXES = st.recursive(
    st.one_of(ATOMS, st.just("")),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(regex=REGEXES, seed=st.integers(0, 2**32), data=st.data())
def test_regular_expressions_mean_what_they_mean_in_python(
    grammars: Grammars, tok: tokenizer.Tokenizer, regex: str, seed: int, data: st.DataObject
) -> None:
    """What comes out matches, and what matches can come out."""
    grammar = Grammar.regex(regex)
    grammars.check(grammar)
    for i in range(3):
        text = walk(grammars, tok, grammar, seed + i, longest=40)
        assert text is None or re.fullmatch(regex, text), (regex, text)
    text = data.draw(st.from_regex(regex, fullmatch=True))
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert accepts(grammars, tok, grammar, text), (regex, text)


@settings(deadline=None, max_examples=60)
@given(options=st.lists(st.text(max_size=12).filter(lambda s: s.isprintable()), min_size=1, max_size=6), seed=SMALL)
def test_a_choice_is_one_of_its_options(
    grammars: Grammars, tok: tokenizer.Tokenizer, options: list[str], seed: int
) -> None:
    """Against brute force: a token may come exactly where what is written then begins an option."""
    grammar = Grammar.choice(options)
    grammars.check(grammar)
    written, goals = b"", [option.encode() for option in options]
    constraint, rng = start(grammars, tok, grammar), np.random.default_rng(seed)
    content = sorted(set(range(tok.vocab_size)) - set(tok.specials.values()))
    while True:
        allowed = ids_allowed(constraint)
        possible = {i for i in content if any(goal.startswith(written + tok.token_bytes(i)) for goal in goals)}
        assert allowed - tok.stop_ids <= possible
        assert (tok.stop_ids <= allowed) == (not allowed.isdisjoint(tok.stop_ids)) == (written in goals)
        nexts = {goal[len(written)] for goal in goals if goal.startswith(written) and len(goal) > len(written)}
        if len(nexts) > 1 or written in goals:  # nothing is certain: every token that fits may come
            assert allowed - tok.stop_ids == possible
        if not possible:
            return
        token_id = int(rng.choice(sorted(allowed - tok.stop_ids)))
        constraint.commit(token_id)
        written += tok.token_bytes(token_id)


def is_sum(text: str) -> bool:
    """Whether a text is a sum, read from left to right by hand."""

    def expr(i: int) -> int:
        i = term(i)
        while 0 <= i < len(text) and text[i] == "+":
            i = term(i + 1)
        return i

    def term(i: int) -> int:
        if i < 0 or i >= len(text):
            return -1
        if text[i] == "(":
            i = expr(i + 1)
            return i + 1 if 0 <= i < len(text) and text[i] == ")" else -1
        n = len(re.match("[0-9]*", text[i:]).group())  # type: ignore[union-attr]
        return i + n if 1 <= n <= 3 else -1

    return expr(0) == len(text)


def test_a_lark_grammar_against_a_parser_by_hand(grammars: Grammars, tok: tokenizer.Tokenizer) -> None:
    grammars.check(SUM)
    texts = [walk(grammars, tok, SUM, seed, longest=40, ends=1.0) for seed in range(60)]
    finished = [text for text in texts if text is not None]
    assert len(finished) > 20 and all(map(is_sum, finished)) and any("(" in text for text in finished)
    for text in ("1+2", "(1)", "((12)+345)+6", "007"):
        assert is_sum(text) and accepts(grammars, tok, SUM, text)
    for text in ("", "1+", "(1", "1234", "+1", "1 + 2"):
        assert not is_sum(text) and not accepts(grammars, tok, SUM, text)


def test_schemas_inside_lark_are_read_the_same_way(grammars: Grammars, tok: tokenizer.Tokenizer) -> None:
    grammar = Grammar.lark('start: "call " %json {"type": "boolean", "title": "x"} ";"\n')
    grammars.check(grammar)
    assert accepts(grammars, tok, grammar, "call true;") and not accepts(grammars, tok, grammar, "call 1;")
    for schema, said in (('{"not": {}}', "not followed"), ('{"x-guidance": {}}', "x-guidance"), ("nothing", "%json")):
        with pytest.raises(UsageError, match=said):
            Grammar.lark("start: %json " + schema)
    with pytest.raises(UsageError, match="no JSON schema follows"):
        Grammar.lark("start: %json " + "[" * 50_000)


# -- control tokens ----------------------------------------------------------------------------------------------------


def test_no_grammar_yields_control_tokens(grammars: Grammars, tok: tokenizer.Tokenizer) -> None:
    specials = set(tok.specials.values())
    anything = [Grammar.lark("start: <[*]>{1,5}"), Grammar.regex("(?s:.*)"), Grammar.lark("start: T\nT: ~/a/")]
    for grammar in [*anything, *GRAMMARS.values()]:
        grammars.check(grammar)
        constraint = start(grammars, tok, grammar)
        for _ in range(6):
            allowed = ids_allowed(constraint)
            assert allowed & specials in (set(), tok.stop_ids)
            if not allowed - specials:
                break
            constraint.commit(max(allowed - specials))
    name = next(name for name in tok.specials if name.startswith("<|"))
    for text in (f"start: {name}", "start: <|system|>", f"start: <[{min(specials)}]>"):
        with pytest.raises(UsageError):
            grammars.check(Grammar.lark(text))
    spelled = Grammar.choice([name])  # its letters are content like any other
    grammars.check(spelled)
    assert walk(grammars, tok, spelled, 0) == name
    assert not set(tok.encode(name)) & specials


# -- what is too large -------------------------------------------------------------------------------------------------

ALTERNATIVES = {
    "allOf": [
        {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"type": "string"}}} for j in range(2)]}
        for i in range(10)
    ]
}
DOUBLING = [f"{{0}}{i}: {{0}}{i + 1} {{0}}{i + 1}" for i in range(60)]
PATTERNS_TOGETHER = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}c"} for i in range(10, 30)]
LENIENT = '{"grammars": [{"json_schema": {"x-guidance": {"lenient": true}, "not": {}}}]}'
HOSTILE: dict[str, Callable[[], Grammar]] = {
    "a repetition": lambda: Grammar.regex("a{1000000}"),
    "repetitions of repetitions": lambda: Grammar.regex("(a{1000}){1000}"),
    "doubling": lambda: Grammar.regex("(" * 30 + "a" + "){2}" * 30),
    "a large repetition in a rule": lambda: Grammar.lark('start: "a"{1000000}'),
    "doubling terminals": lambda: Grammar.lark("\n".join(["start: T0", *DOUBLING, '{0}60: "a"']).replace("{0}", "T")),
    "doubling rules": lambda: Grammar.lark("\n".join(["start: r0", *DOUBLING, '{0}60: "a"']).replace("{0}", "r")),
    "brackets": lambda: Grammar.lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "left recursion without an end": lambda: Grammar.lark("start: start"),
    "a circle of rules": lambda: Grammar.lark('start: a\na: b "x"\nb: a'),
    "a circle of references": lambda: Grammar.json_schema({"$ref": "#"}),
    "alternatives of alternatives": lambda: Grammar.json_schema(ALTERNATIVES),
    "intersections": lambda: Grammar.json_schema({"allOf": PATTERNS_TOGETHER}),
    "patterns of names": lambda: Grammar.json_schema({"patternProperties": {f"^p{i}a*$": {} for i in range(1500)}}),
    "optional properties": lambda: Grammar.json_schema({"properties": {f"p{i}": {} for i in range(3000)}}),
    "nothing": lambda: Grammar.json_schema(False),
    "an empty class": lambda: Grammar.regex("[a&&b]"),
    "contradiction": lambda: Grammar.json_schema({"type": "string", "minLength": 3, "maxLength": 2}),
    "look-ahead": lambda: Grammar.regex("(?=a)b"),
    "a back-reference": lambda: Grammar.regex(r"(a)\1"),
    "nonsense": lambda: Grammar.lark('start: / "test"\n'),
    "no start": lambda: Grammar.lark('begin: "a"'),
    "a list of grammars": lambda: Grammar.lark(LENIENT),
    "too long": lambda: Grammar.regex("a" * (MAX_BYTES + 1)),
    "no text": lambda: Grammar.lark(7),  # type: ignore[arg-type]
    "no Unicode": lambda: Grammar.regex("\ud800"),
    "no options": lambda: Grammar.choice([]),
    "a text for options": lambda: Grammar.choice("ab"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_followed_is_refused_in_time(grammars: Grammars, name: str) -> None:
    grammars.check(Grammar.regex("a"))  # the other process runs
    began = time.perf_counter()
    with pytest.raises(UsageError) as refused:
        grammars.check(HOSTILE[name]())
    assert time.perf_counter() - began < 6  # 2 on a machine that does nothing else
    assert str(refused.value).isprintable() and len(str(refused.value)) < 800


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.lark("\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(4000)), 'r4000: "a"'])),
        Grammar.lark("\n".join(["start: T0", *(f'T{i}: T{i + 1} "a"' for i in range(3500)), 'T3500: "a"'])),
        Grammar.json_schema(
            {"$defs": {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1000)}
             | {"a1000": {"type": "object"}}, "$ref": "#/$defs/a0"}
        ),
        Grammar.lark('start: start "a" | "a"'),
        Grammar.regex("(a+)+b"),
    ],
    ids=["rules", "terminals", "references", "left recursion", "backtracking"],
)  # fmt: skip
def test_what_ends_other_parsers_is_followed(grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar) -> None:
    """Long chains overflow the stack of a thread of usual size (llguidance 1.9.1: the process ends)."""
    results: list[str | None] = []

    def run() -> None:
        grammars.check(grammar)
        results.append(walk(grammars, tok, grammar, 0, longest=20))

    before = threading.stack_size(512 * 1024)
    thread = threading.Thread(target=run)
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert len(results) == 1


def test_the_other_process_may_end(grammars: Grammars) -> None:
    grammars.check(Grammar.regex("abc+"))
    assert trial._process is not None
    trial._process.kill()
    trial._process.wait()
    grammars.check(Grammar.regex("abcd+"))
    assert trial.error("no grammar") and trial.error('{"grammars": []}')


def test_nothing_is_asked_of_llguidance_before_a_grammar_comes(tiny: Path) -> None:
    script = "import sys, herd.engine, herd\nherd.LLM(sys.argv[1]).generate('x', max_tokens=2)\n"
    script += "assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(tiny)], check=True, timeout=100)


def test_without_llguidance_the_error_names_it(tok: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependency, match="pip install"):
        Grammars(tok).check(Grammar.regex("a"))


# -- in the sampler and in the engine ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    which=st.sampled_from(list(GRAMMARS)),
    options=st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.7, 3.0])},
        optional={"top_k": st.integers(1, 80), "top_p": st.sampled_from([0.0, 0.5, 1.0]), "min_p": st.just(0.1),
                  "typical_p": st.just(0.5), "repetition_penalty": st.just(1.7), "logit_bias": st.just({5: 9.0})},
    ),
)  # fmt: skip
def test_choices_are_those_among_what_is_allowed(
    grammars: Grammars, tok: tokenizer.Tokenizer, seed: int, which: str, options: dict[str, Any]
) -> None:
    """Equal to the choice without a grammar where every other token has a logit of -inf; log-probabilities are not."""
    rng = np.random.default_rng(seed)
    free = Sampling.from_options({**options, "logprobs": True})
    bound = Sampling.from_options({**options, "logprobs": True, "grammar": GRAMMARS[which]})
    row = SamplerRow(bound, seed, (), start(grammars, tok, GRAMMARS[which]))
    twin, other = SamplerRow(free, seed, ()), SamplerRow(free, seed + 1, ())
    assert row.constraint is not None
    padding = 40  # rows of the head that stand for no token
    for _ in range(12):
        logits_V = rng.normal(0, 3, tok.vocab_size + padding).astype(np.float32)
        allowed_V = np.isin(np.arange(tok.vocab_size + padding), list(ids_allowed(row.constraint)))
        only = np.where(allowed_V, logits_V, -np.inf).astype(np.float32)
        expected = sample(only[None], [twin])[0].token_id
        choice = sample(np.stack([logits_V, logits_V[::-1]]), [row, other])[0]
        assert choice.token_id == expected
        exact = logits_V.astype(np.float64)
        assert choice.logprob == pytest.approx(exact[expected] - np.log(np.exp(exact).sum()), abs=1e-6)
        if expected in tok.stop_ids:
            return


@pytest.fixture(scope="module")
def drafted(make_model: Callable[..., Path], tiny: Path) -> Iterator[dict[str, LLM]]:
    """The tiny model plain, with guesses from its text, and with guesses of a model that is nearly the same."""
    pytest.importorskip("herd._native")
    with checkpoint.open_checkpoint(tiny) as opened:
        rng = np.random.default_rng(1)
        near = {name: opened[name] + rng.normal(0, 0.02, opened.shape(name)).astype(np.float32) for name in opened}
        draft = tiny.parent / "near"
        checkpoint.save(draft, opened.config, near, format="hf", dtype="f32", tokenizer=opened.tokenizer)
    models = {
        "plain": LLM(tiny, kv="f32"),
        "ngram": LLM(tiny, kv="f32", draft="ngram"),
        "model": LLM(tiny, draft=draft),
    }
    models["plain16"] = LLM(tiny)
    yield models
    for model in models.values():
        model.close()


def ids_of(answers: Any) -> list[tuple[list[int], str, str]]:
    return [(answer.token_ids, answer.text, answer.finish_reason) for answer in answers]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("which", list(GRAMMARS))
def test_company_guesses_and_new_beginnings_change_nothing(
    drafted: dict[str, LLM], which: str, sampling: dict[str, Any]
) -> None:
    options = {"grammar": GRAMMARS[which], "max_tokens": 50, **sampling}
    prompts = ["def f(x):\n    return x\n" * 3, "import os", "x", "1+1+1+1+1+1"]
    plain = drafted["plain"]
    alone = ids_of(plain.generate(prompt, **options) for prompt in prompts)
    assert ids_of(plain.generate(prompts, **options)) == alone

    free = plain.begin(plain.tokenizer.encode("import sys"), Sampling(max_tokens=60, seed=1))  # others beside them
    others = [plain.begin(plain._encode("x"), Sampling(grammar=g, max_tokens=50, seed=2)) for g in GRAMMARS.values()]
    assert ids_of(plain.generate(prompts, **options)) == alone
    plain.cancel([*free, *(sequence for started in others for sequence in started)])

    again = []
    for prompt in prompts:
        for chunk in plain.stream(prompt, **options):
            plain.scheduler.make_way()  # its place is taken after every token
            if chunk.completion is not None:
                again.append(chunk.completion)
    assert ids_of(again) == alone

    assert ids_of(drafted["ngram"].generate(prompts, **options)) == alone
    usual = ids_of(drafted["plain16"].generate(prompts, **options))
    assert ids_of(drafted["model"].generate(prompts, **options)) == usual


@pytest.mark.parametrize("which", list(GRAMMARS))
def test_several_answers_have_a_state_each(llm: LLM, which: str) -> None:
    options = {"grammar": GRAMMARS[which], "max_tokens": 40, "temperature": 1.2}
    together = llm.generate("some prompt", n=5, seed=11, **options)
    assert isinstance(together, list)
    apart = [llm.generate("some prompt", seed=fold_seed(11, i), **options) for i in range(5)]
    assert ids_of(together) == ids_of(apart)
    assert len({answer.text for answer in together}) > 1


def test_how_an_answer_ends(llm: LLM) -> None:
    yes = llm.generate("x", grammar=Grammar.choice(["yes"]), temperature=0)
    assert (yes.text, yes.finish_reason, yes.usage.completion_tokens) == ("yes", "stop", len(yes.token_ids))
    assert yes.stop == yes.token_ids[-1] in llm.tokenizer.stop_ids
    n = len(yes.token_ids) - 1
    complete = llm.generate("x", grammar=Grammar.choice(["yes"]), temperature=0, max_tokens=n)
    assert (complete.text, complete.finish_reason, complete.stop) == ("yes", "stop", None)
    for grammar in (Grammar.regex("a{1,100}"), Grammar.regex("a{50}")):  # one may end, one may not
        bias = {i: -100.0 for i in llm.tokenizer.stop_ids}
        cut = llm.generate("x", grammar=grammar, temperature=0, max_tokens=3, logit_bias=bias)
        assert cut.finish_reason == "length" and set(cut.text) == {"a"}
    stopped = llm.generate("x", grammar=Grammar.regex("abcd"), stop="c")
    assert (stopped.text, stopped.stop) == ("ab", "c")
    letter = llm.tokenizer.encode("b")[0]
    early = llm.generate("x", grammar=Grammar.regex("[ab]{9}"), stop_token_ids=[letter], logit_bias={letter: 50.0})
    assert (early.text, early.stop, early.finish_reason) == ("", letter, "stop")


def test_options_that_make_no_sense(llm: LLM) -> None:
    with pytest.raises(UsageError, match="grammar is no Grammar"):
        llm.generate("x", grammar={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ignore_eos"):
        llm.generate("x", grammar=Grammar.regex("a"), ignore_eos=True)
    with pytest.raises(UsageError, match="no text leads"):
        llm.stream("x", grammar=Grammar.lark("start: start"))  # at once, not with the first chunk


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    answer = llm.generate("def ", grammar=GRAMMARS["schema"], logprobs=True, seed=3, max_tokens=30)
    prompt = llm._encode("def ")
    score = llm.score([*prompt, *answer.token_ids])
    assert answer.logprobs == pytest.approx(score.logprobs[len(prompt) - 1 :], abs=1e-3)


def test_an_answer_that_cannot_go_on_ends_alone(llm: LLM) -> None:
    """A way into a rule without an end: it shows only on that way."""
    trap = Grammar.lark('start: "ax" dead | "b"\ndead: dead "c"')
    a, b = llm.tokenizer.encode("a")[0], llm.tokenizer.encode("b")[0]
    assert llm.generate("x", grammar=trap, logit_bias={b: 90.0}).text == "b"
    expected = llm.generate("y", seed=1, max_tokens=20, grammar=SUM)
    (caught,) = llm.begin(llm._encode("x"), Sampling(grammar=trap, logit_bias={a: 90.0}, seed=0))
    (fine,) = llm.begin(llm._encode("y"), Sampling(seed=1, max_tokens=20, grammar=SUM))
    while fine.completion is None:
        llm.step()
    assert isinstance(caught.error, GrammarFailed) and "no text leads on" in str(caught.error)
    assert ids_of([fine.completion]) == ids_of([expected])
    assert llm.scheduler.idle
    with pytest.raises(UsageError, match="no text leads on"):
        llm.generate("x", grammar=trap, logit_bias={a: 90.0})


def test_a_limit_that_is_met_while_generating(llm: LLM) -> None:
    """Many states, one after the other: the answer ends with an error, and the same grammar works for the next one."""
    heavy = Grammar.regex("(.*a.{60}b)")
    (caught,) = llm.begin(llm._encode("x"), Sampling(grammar=heavy, max_tokens=150, seed=0, temperature=5.0))
    constraint = caught.row.constraint
    assert constraint is not None
    constraint.allowed()
    constraint._matcher.consume_token(llm.tokenizer.eos_id)  # nothing it could take: its state is an error
    constraint._bits = None
    llm.step()
    assert isinstance(caught.error, UsageError)
    assert llm.generate("x", grammar=heavy, max_tokens=20, seed=0).usage.completion_tokens == 20


def test_threads_share_a_model(llm: LLM) -> None:
    expected = {name: ids_of([llm.generate("x", grammar=g, seed=4, max_tokens=30)]) for name, g in GRAMMARS.items()}
    results: dict[str, Any] = {}

    def run(name: str) -> None:
        results[name] = ids_of([llm.generate("x", grammar=GRAMMARS[name], seed=4, max_tokens=30)])

    threads = [threading.Thread(target=run, args=[name]) for name in GRAMMARS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_a_sentencepiece_vocabulary(shared_data: Path, make_model: Callable[..., Path]) -> None:
    """Tokens that begin with a space, bytes that are tokens too, and the space that a chat would drop."""
    small = tokenizer.load(shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf")
    grammars = Grammars(small)
    for grammar, text in (
        (Grammar.regex("[a-z 日é\n]+"), "the day 日é\n"),
        (GRAMMARS["schema"], '{"name": "Ж", "age": 3}'),
    ):
        grammars.check(grammar)
        assert accepts(grammars, small, grammar, text)
    for seed in range(5):
        text = walk(grammars, small, GRAMMARS["compact"], seed, ends=9.0)
        assert text is None or jsonschema.validate(json.loads(text), PERSON) is None
    with LLM(make_model(small=small)) as llm:
        answer = llm.chat([{"role": "user", "content": "Hi"}], grammar=Grammar.choice([" yes", " no"]), max_tokens=20)
        assert (answer.text in (" yes", " no"), answer.finish_reason) == (True, "stop")
