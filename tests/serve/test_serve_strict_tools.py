"""Calls of strict functions satisfy their schemas whatever the model wants: adversarial choices, read as a server does.

The oracles are the `jsonschema` package and the parser's own view of what is a call.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from herd import tokenizer  # noqa: E402
from herd.engine.constraint import Constraint, Grammars  # noqa: E402
from herd.serve.api.tools import FunctionTool, Plan, Tool, plan_tools  # noqa: E402
from herd.tokenizer import CallParser  # noqa: E402

PLACE = {"lat": {"type": "number", "minimum": -90, "maximum": 90}, "near": {"type": "boolean"}}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F/K"]},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": PLACE, "required": ["lat"], "additionalProperties": False}},
}
TREE: dict[str, Any] = {  # no form of Python's, as it leads to itself
    "type": "object",
    "properties": {"value": {"type": "null"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value"],
    "additionalProperties": False,
    "minProperties": 1,
}
RUNS = 40
SCHEMAS = {"weather": WEATHER, "tree.walk-1": TREE}
FRAGMENTS = [
    *['{"name": "weather"', '{"name":"tree.walk-1"', '{ "name" : "note"', '{"type": "function", "name": "weather"'],
    *[
        ', "parameters": ',
        ', "arguments": ',
        '{"city": "x", "unit": "C"}',
        '{"city": 5, "bad": []}',
        "{}",
        "}",
        "]",
        ")",
    ],
    *[
        "[",
        "weather(",
        'city="a", ',
        'unit="C"',
        "unit='F/K'",
        "days=99",
        "days=0",
        'where={"lat": 1e5}',
        "note(x=None)",
    ],
    *["<function=weather>", "<function=note>", "</function>", "<|python_tag|>", "<|python_start|>", "<|python_end|>"],
    *[
        " ",
        "\n\n",
        "\t",
        "\x1c",
        "\x1f",
        "\x85",
        "\u2003",
        "\u3000",
        "\x0b",
        ";",
        ",",
        '"',
        "\\",
        "Sure. ",
        "tree.walk-1(",
    ],
    *[
        '{"parameters": {"city": 1}, "name": "weather"}',
        '{"na\\u006de": "weather", "parameters": {}}',
        '"a\\/b\\u0041"',
    ],
    *[
        '{"name": "we\\u0061ther", "parameters": {}}',
        '{"type": "function", "parameters": {}, "name": "weather"}',
        '{"a": "',
    ],
    *['"<function=weather>{}"', ' {"name": "weather", "parameters": {}}', '{"x": 1', '{"name": "note", "parameters": '],
    *['[1, {"name": "weather", "parameters": {}}]', '{"name": 3, "name": "weather", "parameters": {}}', "weather("],
]


def tools(**strict: bool) -> list[Tool]:
    schemas = {**SCHEMAS, "note": None}
    return [
        Tool(type="function", function=FunctionTool(name=name, parameters=schemas[name], strict=is_strict))
        for name, is_strict in strict.items()
    ]


class Adversary:
    """Chooses tokens: what it wants as far as that is allowed, then anything, above all what ends things."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = tokenizer.load(path)
        self.grammars = Grammars(self.tokenizer)
        self.bytes = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]

    def write(self, plan: Plan, wanted: list[str], rng: random.Random, most: int = 150) -> tuple[str, bool]:
        """An answer under the plan's grammar, and whether it came to its end."""
        assert plan.grammar is not None
        self.grammars.check(plan.grammar)
        stops = self.tokenizer.stop_ids
        constraint = Constraint(self.grammars, plan.grammar, stops)
        written = b""
        left = [fragment.encode() for fragment in wanted]
        for _ in range(most):
            ids = np.flatnonzero(np.unpackbits(constraint.allowed(), bitorder="little")).tolist()
            fitting: list[int] = []
            while left and not fitting:
                fitting = [i for i in ids if i not in stops and left[0].startswith(self.bytes[i])]
                if not fitting:
                    left.pop(0)
            if fitting:
                chosen = max(fitting, key=lambda i: len(self.bytes[i]))
                left[0] = left[0][len(self.bytes[chosen]) :]
                left = left[not left[0] :]
            else:
                ending = [i for i in ids if i in stops or self.bytes[i][:1] in (b'"', b"}", b"]", b")", b"C", b"1")]
                chosen = rng.choice(ending if ending and rng.random() < 0.8 else ids)
            if chosen in stops:
                return written.decode(), True
            written += self.bytes[chosen]
            constraint.commit(chosen)
        return written.decode(errors="replace"), False


@pytest.fixture(scope="module")
def adversary(model_path: Path) -> Adversary:
    return Adversary(model_path)


def without_ids(voice: Any) -> Any:
    return [call["function"] for call in voice.message().get("tool_calls", ())], voice.message()["content"]


def check(plan: Plan, text: str, whole: bool, strict: set[str]) -> list[str]:
    """Names of the calls that a server reads from a text; those of strict functions are valid."""
    voice, at_once = plan.voice(), plan.voice()
    for character in text:
        voice.push(character)
    voice.finish()
    at_once.push(text)
    at_once.finish()
    assert without_ids(voice) == without_ids(at_once)
    names = []
    for call in voice.message().get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        names.append(name)
        try:
            given = json.loads(arguments)
        except ValueError:
            assert not whole, text
            continue
        assert isinstance(given, dict)
        if name in strict:
            jsonschema.Draft202012Validator(SCHEMAS[name]).validate(given)
    return names


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    "strict",
    [{"weather": True}, {"weather": True, "note": False}, {"note": False, "tree.walk-1": True, "weather": True}],
)
def test_no_unchecked_call_comes_through(adversary: Adversary, strict: dict[str, bool], choice: Any) -> None:
    plan = plan_tools(tools(**strict), choice, None if choice == "auto" else True)
    rng = random.Random(len(strict))
    held = {name for name in strict if strict[name]} if choice == "auto" else set(strict) - {"note"}
    seen: dict[str, int] = {"": 0}
    ended = 0
    for _ in range(RUNS):
        wanted = rng.choices(FRAGMENTS, k=rng.randrange(1, 9))
        if rng.random() < 0.5:
            wanted.insert(0, rng.choice(FRAGMENTS[:4]))
        text, whole = adversary.write(plan, wanted, rng)
        names = check(plan, text, whole, held)
        ended += whole
        assert names or not whole or choice == "auto", text
        for name in names or [""]:
            seen[name] = seen.get(name, 0) + 1
    assert ended > RUNS // 3 and all(seen.get(name, 0) > 1 for name in strict), seen
    assert choice == "required" or seen[""] > RUNS // 10


FORMS = [
    '{"name": "weather", "parameters": {"city": "Rome", "unit": "C"}}',
    '\n\n{"type": "function", "name": "weather", "parameters": {"city": "x", "days": 2, "unit": "F/K"}}',
    '{"name": "weather", "arguments": {"city": "Rome", "unit": "C", "where": {"lat": 1.5}}}; '
    '{"name": "note", "parameters": {"a": [{}]}}',
    '[{"name": "note", "parameters": {}}, {"name": "weather", "parameters": {"city": "", "unit": "C"}}]',
    '<function=weather>{"city": "Rome", "unit": "C"}</function><function=note>{"x": 1}</function>',
    '[weather(city="Rome", unit="C")]',
    '[weather(city="Rome", days=9, unit="F/K", where={"lat": 2, "near": true}), '
    "note(x=None, y=[1, 'a'], z={\"k\": True})]",
    "[note()]",
]
TEXTS = [
    "",
    "It is warm.",
    'Sure. {"name": "weather", "parameters": {"city": 5}} and <function=weather>{} or [weather(city=5)]',
    '{"name": "Bob", "age": 3}',
    '{"type": "object", "name": "weather"}',
    '{"city": {"name": "weather", "parameters": {}}}\n{"name": "weather", "parameters": {}}',
    "[1](http://x) weather(city=5)",
    "<function=other>{}",
    '{"name": "weather2", "parameters": {}}',
    '```\n{"name": "weather", "parameters": {}}\n```',
]


def test_all_forms_of_calls_can_be_written(adversary: Adversary) -> None:
    """As they are, and they are read as the plain parser reads them."""
    plan = plan_tools(tools(weather=True, note=False), "auto", None)
    for form in FORMS:
        text, whole = adversary.write(plan, [form], random.Random(0))
        assert text.startswith(form) and whole, (form, text)
        names = check(plan, form, True, {"weather"})
        plain = CallParser({"weather", "note"})
        kinds = [delta.name for delta in (*plain.push(form), *plain.finish()) if hasattr(delta, "name")]
        assert names == kinds and names


def test_other_texts_are_free_and_hold_no_calls(adversary: Adversary) -> None:
    plan = plan_tools(tools(weather=True, note=False), "auto", None)
    plain = CallParser({"weather", "note"})
    assert any(getattr(delta, "name", "") == "weather" for delta in plain.push(TEXTS[2]))  # which it would be elsewhere
    for free in TEXTS:
        text, _ = adversary.write(plan, [free], random.Random(0), most=len(free.encode()) or 1)
        assert text.startswith(free), (free, text)
        voice = plan.voice()
        voice.push(free)
        voice.finish()
        message = voice.message()
        assert "tool_calls" not in message and message["content"] == free


@pytest.mark.parametrize(
    "refused",
    [
        '{"name": "weather", "parameters": {"city": 5',
        '{"name": "weather", "parameters": "',
        '{"name": "weather", "i',
        '{"type": "function", "p',
        '{"parameters": {',
        ' \t[ {"arguments" : {',
        '{"n\\',
        '{"name": "w\\',
        '[{"name": "weather", "parameters": {"x',
        "[weather(city=5",
        "[weather(u",
        '[weather(city="a", days=10',
        "[note(), weather(d",
        "[tree.walk-1(",
        "tree.walk-1(",
        "\x1c\u2003weather(",
        "<function=weather>[",
        '<function=weather>{"u',
        "<|python_tag|>",
        "\n<|python_start|>",
    ],
)
def test_what_no_answer_begins_like(adversary: Adversary, refused: str) -> None:
    """All but the last character can be written."""
    plan = plan_tools(tools(**{"weather": True, "note": False, "tree.walk-1": True}), "auto", None)
    for wanted, comes in ((refused, False), (refused[:-1], True)):
        text, _ = adversary.write(plan, [wanted], random.Random(0), most=len(wanted.encode()))
        assert text.startswith(wanted) == comes, (wanted, text)


def test_one_call_where_no_more_are_wanted(adversary: Adversary) -> None:
    call = '{"name": "weather", "parameters": {"city": "x", "unit": "C"}}'
    plan = plan_tools(tools(weather=True, note=False), "auto", False)
    for wanted in (
        [call, call],
        [call, ";", call],
        [f"[{call}, ", call, "]"],
        ['[weather(city="", unit="C"), ', "note()]"],
    ):
        text, whole = adversary.write(plan, wanted, random.Random(1))
        assert whole and len(check(plan, text, True, {"weather"})) == 1, text
