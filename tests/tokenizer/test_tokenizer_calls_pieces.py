"""Calls of tools in text that comes in pieces: the same whatever the pieces, as early as possible, in linear time."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd.errors import UsageError
from herd.tokenizer import ArgumentsDelta, Call, CallParser, CallStart, Delta, TextDelta, parse_calls
from herd.tokenizer.chat import reading
from herd.tokenizer.chat.tools import BUILT_IN, json_call

FUNCTIONS = ["f", "g", "get_weather", "math.pi"]

Parsed = tuple[str, list[str], list[str]]


def together(deltas: list[Delta]) -> Parsed:
    """Content, names and arguments."""
    content, names, arguments = list[str](), list[str](), list[list[str]]()
    for delta in deltas:
        match delta:
            case TextDelta(text):
                content.append(text)
            case CallStart(index, name):
                assert index == len(names)
                names.append(name)
                arguments.append([])
            case ArgumentsDelta(index, text):
                assert index == len(names) - 1
                arguments[index].append(text)
    return "".join(content), names, ["".join(pieces) for pieces in arguments]


def parse(pieces: list[str] | str, functions: list[str] = FUNCTIONS, built_in: tuple[str, ...] = ()) -> Parsed:
    parser = CallParser(functions, built_in)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return together(deltas + parser.finish())


FRAGMENTS_TEXT = r"""
{ } [ ] ( ) () }} : , = ; \ \" \u00e9 \u < é " "name" "type" "function" "parameters" "arguments" "f" "g" "x" 'y'
"unknown" f f( g() unknown( a= b= 1 -2.5 true None text query= "g"} [f(a=1) <function=f>{ brave_search.call(
brave_search.call(query='x') <|python_tag|> <|python_start|> <|python_end|> <function= f> </function>
"""
FRAGMENTS = FRAGMENTS_TEXT.split()
FRAGMENTS += [" ", "\n", ": ", ", ", '"""', "\x01", "\ud83d", "Sure. ", '{"name": "f", "parameters": {']
FRAGMENTS += [
    '{"name": "f", ',
    '"parameters": {"a": 1}',
    '"type": "function"',
    '[f(a=1), g(b="x")]',
    '[{"name": "f", "parameters": {}}',
]
soups = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
offers = st.sampled_from([(FUNCTIONS, ()), (FUNCTIONS, BUILT_IN), (["f.x", "text"], ("brave_search",)), ([], BUILT_IN)])


@settings(max_examples=1500, deadline=None)
@given(
    text=soups | st.text(),
    offer=offers,
    cuts=st.lists(st.integers(0, 200), max_size=4),
    bounds=st.sampled_from([(256 * 1024, 64, 1000), (5, 64, 1000), (20, 1, 1000), (45, 2, 3)]),
)
@example(
    text='{"name": "f", "parameters": {}, "x": "what stands here is longer than may be held"} [f(a=1)]',
    offer=(FUNCTIONS, ()),
    cuts=[],
    bounds=(45, 64, 1000),
)
def test_pieces_do_not_matter(text: str, offer: Any, cuts: list[int], bounds: tuple[int, int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in zip(("MAX_HELD", "MAX_DEPTH", "MAX_TOKEN"), bounds, strict=True):
            patch.setattr(reading, name, bound)
        whole = parse([text], *offer)
        edges = [0, *sorted(cuts), len(text)]
        assert parse([text[i:j] for i, j in itertools.pairwise(edges)], *offer) == whole
        assert parse(text, *offer) == whole  # character by character
    content, names, arguments = whole
    assert names or content == text  # without a call nothing is changed
    for written in arguments:
        try:
            assert isinstance(json.loads(written), dict)
        except ValueError:  # broken off while it was streamed: as it was written, but for control characters
            assert written.replace("\\u0001", "\x01").replace("\\n", "\n").replace("\\ud83d", "\ud83d") in text
    assert all(name in (*offer[0], *offer[1]) for name in names)


@settings(deadline=None)
@given(soup=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), offer=offers)
def test_what_was_passed_on_stays(soup: str, offer: Any) -> None:
    """Every prefix's deltas are a prefix of the whole's: nothing is taken back."""
    parser = CallParser(*offer)
    so_far: list[Delta] = []
    for end in range(len(soup)):
        so_far += parser.push(soup[end])
        content, names, arguments = together(so_far)
        whole_content, whole_names, whole_arguments = parse([soup], *offer)
        assert whole_content.startswith(content) and whole_names[: len(names)] == names
        assert all(whole.startswith(part) for whole, part in zip(whole_arguments, arguments, strict=False))


def test_what_is_passed_on_when() -> None:
    """One character at a time: what each of them makes certain."""
    for text, expected in (
        ("So [x", [("S", "S"), ("o", "o"), (" ", " "), ("[", ""), ("x", "[x")]),
        ("  So", [(" ", ""), (" ", ""), ("S", "  S"), ("o", "o")]),
        ("get_x", [("g", ""), ("e", ""), ("t", ""), ("_", ""), ("x", "get_x")]),
        ("<fux", [("<", ""), ("f", ""), ("u", ""), ("x", "<fux")]),
        ("<<a", [("<", ""), ("<", "<"), ("a", "<a")]),
        ('{"ci', [("{", ""), ('"', ""), ("c", '{"c'), ("i", "i")]),
        ("[1,", [("[", ""), ("1", "[1"), (",", ",")]),
    ):
        parser = CallParser(FUNCTIONS)
        assert [(c, "".join(delta.text for delta in parser.push(c))) for c in text] == expected  # type: ignore[union-attr]
        parser.finish()


@pytest.mark.parametrize(
    "head",
    [
        '{"name": "f", "parameters": ',
        '[{"name": "f", "parameters": ',
        '{"type": "function", "name": "f", "arguments": ',
        "<function=f>",
    ],
)
def test_arguments_are_streamed(head: str) -> None:
    parser = CallParser(FUNCTIONS)
    assert parser.push(head) == []
    assert parser.push("{") == [CallStart(0, "f"), ArgumentsDelta(0, "{")]
    for piece in ('"a', '": "x', " y", "\\", '"', "\n", '", "b"', ": [", "true", ","):
        expected = "" if piece == "true" else "true," if piece == "," else piece.replace("\n", "\\n")
        assert parser.push(piece) == ([ArgumentsDelta(0, expected)] if expected else [])
    assert parser.push("2]}") == [ArgumentsDelta(0, "2]}")]
    assert parser.push({"<": "</function>", "{": "}", "[": "}]"}[head[0]]) == [] == parser.finish()


def test_code_is_streamed() -> None:
    parser = CallParser([], ["code_interpreter"])
    assert parser.push("<|python_tag|>") == []
    assert parser.push("if") == [CallStart(0, "code_interpreter"), ArgumentsDelta(0, '{"code": "if')]
    assert parser.push(" x:\n") == [ArgumentsDelta(0, " x:\\n")]
    assert parser.finish() == [ArgumentsDelta(0, '"}')]


def test_broken_arguments_are_as_they_were_written() -> None:
    for text, arguments, content in (
        ('{"name": "f", "parameters": {"a": tru}}', '{"a": tru', "}}"),
        ('{"name": "f", "parameters": {"a": "x\\y"}} [g()]', '{"a": "x\\', 'y"}} '),
        ('{"name": "f", "parameters": {"a": tru ;', '{"a": tru', " ;"),
        ('{"name": "f", "parameters": {"a": "\\u00e"}}', '{"a": "\\u00e', '"}}'),
        ('<function=f>{"a": 1,}</function>', '{"a": 1,', "}</function>"),
        ('{"name": "f", "parameters": {"a": [' + "[" * 64, '{"a": [' + "[" * 62, "[["),
    ):
        assert parse([text])[:2] == (content, ["f", "g"] if "g" in text else ["f"])
        assert parse([text])[2][0] == arguments
        assert parse_calls(text, FUNCTIONS)[1] == ([Call("g", {})] if "g" in text else [])


def test_bounds() -> None:
    deep = "[" * 64 + "]" * 64
    assert parse([f"[f(a={deep})]"])[1] == ["f"]
    assert parse([f"[f(a=[{deep}])]"]) == (f"[f(a=[{deep}])]", [], [])
    for build, count in (
        (lambda n: f'[f(a="{"x" * n}")]', 12),
        (lambda n: f'{{"parameters": {{"a": "{"x" * n}"}}, "name": "f"}}', 38),
    ):
        most = reading.MAX_HELD
        longest = next(n for n in range(most - count, most) if parse([build(n + 1)])[1] == [])
        assert parse([build(longest)])[1] == ["f"]
        for n in (longest, longest + 1):
            text = build(n)
            assert (
                parse([text])
                == parse([text[: n // 2], text[n // 2 :]])
                == parse([text[i : i + 999] for i in range(0, len(text), 999)])
            )
    for digits, names in ((reading.MAX_TOKEN - 1, ["f"]), (reading.MAX_TOKEN, []), (2 * reading.MAX_TOKEN, [])):
        text = f"[f(a={'1' * digits})]"
        assert parse([text])[1] == names
        assert parse([text]) == parse([text[:700], text[700:1400], text[1400:]])
    too_long = '[f(a="' + "x" * reading.MAX_HELD
    parser = CallParser(FUNCTIONS)
    assert parser.push(too_long) == [TextDelta(too_long)]
    assert parser.push(' [f()]")] [f()]') == [TextDelta(' [f()]")] '), CallStart(0, "f"), ArgumentsDelta(0, "{}")]
    streamed = '{"name": "f", "parameters": {"a": "' + "x" * 2 * reading.MAX_HELD + '"}}'
    assert parse([streamed])[1] == ["f"]


def test_the_end_is_the_end() -> None:
    parser = CallParser(FUNCTIONS)
    assert parser.push("[f(") == []
    assert parser.finish() == [TextDelta("[f(")]
    assert parser.finish() == []
    with pytest.raises(UsageError, match="finished"):
        parser.push("a=1)]")


@pytest.mark.parametrize(
    "unit",
    [
        "Hello, world. ",
        "[ ",
        "[f(a=' [",
        '{"name": "f", "parameters": {"a": ',
        "<function=f>{",
        "<|python_start|>",
        "[f(),",
        "<",
        " ",
        '[f(a="x")]\n',
        '{"name": "f", "parameters": {"a": "x"}};',
        '{"parameters": {"a": "',
        "<|python_start|>x<|python_end|>",
    ],
)
def test_time_is_linear(unit: str) -> None:
    """60,000 characters one by one take a tenth of a second; with a rescan for each of them it would be minutes."""
    text = unit * (60_000 // len(unit))
    for built_in in ((), BUILT_IN):
        parser = CallParser(FUNCTIONS, built_in)
        start = time.process_time()
        for character in text:
            parser.push(character)
        parser.finish()
        assert time.process_time() - start < 5


def test_a_megabyte_in_characters() -> None:
    """A second or two, of which a third is the test's own."""
    text = "Hello, world. " * 75_000
    start = time.process_time()
    assert parse(text) == (text, [], [])
    assert time.process_time() - start < 20


def test_long_arguments_in_characters() -> None:
    long = "Hello, world. " * 20_000
    text = json_call(Call("f", {"a": long}))
    start = time.process_time()
    assert parse(text) == ("", ["f"], [json.dumps({"a": long})])
    assert time.process_time() - start < 20
