"""Calls of tools in what a model writes: against what writes them, Python's parser, JSON's, and itself in pieces."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import time
import tokenize
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from herd.errors import UsageError
from herd.tokenizer import (
    ArgumentsDelta,
    Call,
    CallParser,
    CallStart,
    Delta,
    Message,
    TextDelta,
    Tokenizer,
    parse_calls,
)
from herd.tokenizer.chat import reading
from herd.tokenizer.chat.tools import BUILT_IN, code_call, json_call, pythonic_calls, search_call

FUNCTIONS = ["f", "g", "get_weather", "math.pi"]
TAGS = ("<|python_tag|>", "<|python_start|>")

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


# Values that JSON, a Python literal and a `Call` can all say; floats keep their sign of zero.
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
hostile = st.sampled_from(
    [
        *(
            '"',
            "'",
            '"""',
            "\\",
            "\\u00e9",
            "[f(a=1)]",
            '{"name": "f", "parameters": {}}',
            "</function>",
            "f(a=1)",
            "]",
        ),
        *(
            "<function=f>{}",
            "<|python_tag|>",
            "<|python_end|>",
            "})",
            "\n",
            "\x00\x1f\x7f",
            "\u2028",
            "🦙",
            "\ud83d",
            "()",
        ),
    ]
)
texts = st.text() | st.lists(hostile | st.text(max_size=3), max_size=6).map("".join)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
identifiers = st.from_regex(r"[A-Za-z_é][A-Za-z0-9_é]{0,8}", fullmatch=True)


def same(one: object, other: object) -> bool:
    """Equal, types and signs of zero included."""
    return repr(one) == repr(other)


# What tools.py writes.


@settings(deadline=None)
@given(name=st.text(min_size=1), arguments=st.dictionaries(texts, values, max_size=4), data=st.data())
def test_json_calls_come_back(name: str, arguments: dict[str, Any], data: st.DataObject) -> None:
    call = Call(name, arguments)
    written = json_call(call)
    others = data.draw(st.lists(st.text(min_size=1)))
    for before in ("", "\n ", *TAGS, "  <|python_tag|>\n"):
        content, [found] = parse_calls(before + written + data.draw(st.sampled_from(["", "\n", " ;"])), [*others, name])
        assert content == "" and same(found, call)
    several = data.draw(st.sampled_from(["; ", "\n", ";", " ", "<|python_tag|>"])).join([written] * 3)
    for text in (several, f"[{written}, {written},{written}]"):
        content, found = parse_calls(text, [name])
        assert content == "" and same(found, [call] * 3)
    content, found = parse_calls(f"Well {written} so", [name])
    assert (content, same(found, [call])) == ("Well  so", True)
    assert parse_calls(written, others) == (written, []) or name in others


@settings(deadline=None)
@given(
    calls=st.lists(
        st.builds(
            Call,
            st.lists(identifiers, min_size=1, max_size=3).map(".".join),
            st.dictionaries(identifiers, values, max_size=4),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_pythonic_calls_come_back(calls: list[Call]) -> None:
    names = [call.name for call in calls]
    written = pythonic_calls(calls)
    for text in (written, f"\n{written}\n", f"<|python_tag|>{written}", f"<|python_start|>{written}<|python_end|>"):
        content, found = parse_calls(text, names)
        assert content == "" and same(found, calls)
    content, found = parse_calls(f"Well, {written} {written}, so", names)
    assert content == "Well, , so" and same(found, calls * 2)
    # without the brackets only where nothing else is written
    bare = pythonic_calls(calls[:1])[1:-1]
    for text in (bare, f" {bare}\n", f"<|python_tag|>{bare}", f"Well:<|python_start|>{bare}<|python_end|>"):
        content, found = parse_calls(text, names)
        assert content in ("", "Well:") and same(found, calls[:1])
    for text in (f"{bare} so", f"{bare}; {bare}", f"Well, {bare}"):
        assert parse_calls(text, names)[0] == text or " [" in text or " {" in text or "<" in text


@settings(deadline=None)
@given(query=texts, name=st.sampled_from(["brave_search", "wolfram_alpha"]))
def test_searches_come_back(query: str, name: str) -> None:
    call = Call(name, {"query": query})
    for before in ("", *TAGS):
        content, found = parse_calls(before + search_call(call), [], BUILT_IN)
        assert content == "" and same(found, [call])
    closed = f"<|python_start|>{search_call(call)}<|python_end|>"
    assert parse_calls(closed, [], [name]) == ("", [call])
    written = f"<|python_tag|>{search_call(call)}"
    assert parse_calls(written, ["f"], ["code_interpreter"])[1] == [
        Call("code_interpreter", {"code": search_call(call)})
    ]
    if not any(mark in query for mark in ("<", "[", "{")):
        assert parse_calls(written, ["f"]) == (written, [])


@settings(deadline=None)
@given(code=texts)
def test_code_comes_back(code: str) -> None:
    assume(code.strip() and not code.strip().startswith("<|python_"))  # something, and not a second mark
    call = Call("code_interpreter", {"code": code})
    assert same(parse_calls("<|python_tag|>" + code_call(call), [], ["code_interpreter"]), ("", [call]))
    assert same(parse_calls("So:<|python_tag|>" + code, [], BUILT_IN), ("So:", [call]))
    if "<|python_end|>" not in code:
        text = f"<|python_start|>{code}<|python_end|>"
        assert same(parse_calls(text, [], ["code_interpreter"]), ("", [call]))
        assert same(parse_calls(text + " so", [], ["code_interpreter"]), (" so", [call]))


def test_every_format_writes_what_is_read(small_llama3: Tokenizer, small_llama4: Tokenizer) -> None:
    """From a dialogue to ids, and from the assistant's own ids back to its calls."""
    tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    weather = Call("get_weather", {"city": 'São "Paulo"', "days": [1, 2.5, None, True]})
    code = Call("code_interpreter", {"code": "print(1 < 2)\n"})
    question: Message = {"role": "user", "content": "?"}
    for tokenizer, built_in in (
        (small_llama3, BUILT_IN),
        (small_llama3.with_chat_format("llama3.2"), BUILT_IN),
        (small_llama3.with_chat_format("llama3.3"), BUILT_IN),
        (small_llama4, ("code_interpreter",)),
    ):
        several = tokenizer is not small_llama3
        for calls in ([weather], [code], [weather, weather] if several else [weather]):
            answer: Message = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in calls],
            }
            tools = [tool, *built_in] if tokenizer is not small_llama4 else [tool]
            ids, own = tokenizer.encode_dialog([question, answer], tools)
            written = [i for i, mine in zip(ids, own, strict=True) if mine]
            assert parse_calls(tokenizer.decode(written[:-1]), ["get_weather"], built_in) == ("", calls)


# In pieces.

FRAGMENTS = [
    *(
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "()",
        "}}",
        ": ",
        ":",
        ", ",
        ",",
        "=",
        ";",
        " ",
        "\n",
        "\\",
        "<",
        "é",
        "\x01",
        "\ud83d",
    ),
    *(
        '"name"',
        '"type"',
        '"function"',
        '"parameters"',
        '"arguments"',
        '"f"',
        '"g"',
        '"unknown"',
        '"x"',
        "'y'",
        '"""',
        '"',
    ),
    *("f", "f(", "g()", "unknown(", "a=", "b=", "1", "-2.5", "true", "None", '\\"', "\\u00e9", "\\u", "text", "Sure. "),
    *("<|python_tag|>", "<|python_start|>", "<|python_end|>", "<function=", "f>", "</function>", "brave_search.call("),
    *(
        '{"name": "f", "parameters": {',
        '{"name": "f", ',
        '"parameters": {"a": 1}',
        '"type": "function"',
        '"g"}',
        "query=",
    ),
    *(
        "[f(a=1)",
        '[f(a=1), g(b="x")]',
        "<function=f>{",
        '[{"name": "f", "parameters": {}}',
        "brave_search.call(query='x')",
    ),
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
@example('{"name": "f", "parameters": {}, "x": 1} [f(a=1)]', (FUNCTIONS, ()), [3], (5, 64, 1000))
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


# JSON, against Python's reader of it.


@settings(max_examples=300, deadline=None)
@given(
    members=st.lists(
        st.tuples(
            st.sampled_from(["name", "type", "parameters", "arguments", "parameters", "name", "id"]),
            st.sampled_from(["f", "unknown", "function"]) | st.dictionaries(texts, values, max_size=3) | values,
        ),
        max_size=5,
        unique_by=lambda member: member[0],
    ),
    layout=st.sampled_from([(None, (", ", ": ")), (2, None), (None, (",", ":")), ("\t", (" ,", " :"))]),
    ascii_only=st.booleans(),
)
def test_an_object_is_a_call_by_its_members(members: list[tuple[str, Any]], layout: Any, ascii_only: bool) -> None:
    given_members = dict(members)
    text = json.dumps(given_members, indent=layout[0], separators=layout[1], ensure_ascii=ascii_only)
    assume(len(text) < 2000)
    expected: list[Call] = []
    seen: dict[str, Any] = {}
    for key, value in members:
        kind = "arguments" if key == "parameters" else key
        right = {"name": value == "f", "type": value == "function", "arguments": isinstance(value, dict)}
        if not right.get(kind, False) or (kind != "type" and kind in seen):
            break
        seen[kind] = value
        if {"name", "arguments"} <= set(seen):  # the rest is read over
            expected = [Call("f", seen["arguments"])]
            break
    content, found = parse_calls(text, ["f"])
    assert same(found, expected) and content == ("" if expected else text)
    content, found = parse_calls(f"[{text}]", ["f"])
    assert same(found, expected) and content == ("" if expected else f"[{text}]")


def test_members_in_every_order() -> None:
    members = ['"type": "function"', '"name": "f"', '"parameters": {"a": {"b": [1]}}']
    for order in itertools.chain(itertools.permutations(members), itertools.permutations(members[1:])):
        for text in ("{" + ", ".join(order) + "}", "{\n  " + ",\n  ".join(order) + "\n}"):
            assert parse([text]) == ("", ["f"], ['{"a": {"b": [1]}}'])
            assert parse([text.replace("parameters", "arguments")]) == ("", ["f"], ['{"a": {"b": [1]}}'])
            assert parse([text.replace('"f"', '"\\u0066"')]) == ("", ["f"], ['{"a": {"b": [1]}}'])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f"}',
        '{"name": "f", "parameters": null}',
        '{"name": "f", "parameters": "{}"}',
        '{"name": "f", "parameters": [1]}',
        '{"name": "f", "description": "…", "parameters": {"type": "object"}}',
        '{"type": "object", "name": "f", "parameters": {}}',
        '{"type": "func", "name": "f", "parameters": {}}',
        '{"type": "function", "function": {"name": "f", "parameters": {}}}',
        '{"name": "f", "name": "f", "parameters": {}}',
        '{"name": f, "parameters": {}}',
        "{'name': 'f', 'parameters': {}}",
        '{"name": "unknown", "parameters": {"x": [{"name": "f", "parameters": {}}, " [f(a=1)]"]}}',
        '{"answer": [1, {"name": "f", "parameters": {}}]}',
        '[{"name": "unknown", "parameters": {}}, {"name": "f", "parameters": {}}]',
        '[1, {"name": "f", "parameters": {}}]',
        "[f(), {'name': 'f', 'parameters': {}}]",
        '[f(), {"name": "f", "parameters": {}}]',
        '{"parameters": {"a": tru}, "name": "f"}',
        'x={"name": "f", "parameters": {}}',
        '`{"name": "f", "parameters": {}}`',
        '<function=unknown>{"a": {"name": "f", "parameters": {}}}</function>',
        "<function=f></function>",
        '<function=f>"x"</function>',
        "<function=f",
        "[f(a=1), unknown(b=' [f(a=1)]')]",
        "[unknown(b='x'), f(a=1)]",
        "unknown(a=' [f()]')",
        "[f(1)]",
        "[f(a=1, a=2)]",
        "[f(a=(1, 2))]",
        "[f(a={1: 2})]",
        "[f(a={'x'})]",
        "[f(a=g())]",
        "[f(a=b)]",
        "[f(a=1 + 1)]",
        "[f(a=1j)]",
        "[f(a=0x10)]",
        "[f(a=01)]",
        "[f(a=[1,,2])]",
        "[fx(a=1)]",
        "<function=fx>{}</function>",
        "[get_weathe(a=1)]",
        "[f(,)]",
        "[f(=1)]",
        "[f(a.b=1)]",
        "[f(1a=1)]",
        "[f(a=1,,b=2)]",
        "[f(a=1 b=2)]",
        "[f(a='x)]",
        "[f(a='\\x4')]",
        "[f(a='\\U00110000')]",
        "[f(a='\\N{BULLET}')]",
        "[f(a=f'{g()}')]",
        "[f(a=__import__('os').system('true'))]",
        "[f(**{'a': 1})]",
        "[f(a=1)",
        "[f]",
        "[]",
        "f(a=1) or so",
        "f(a=1)\ng()",
        "print(f(a=1))",
        "The <|python_end|> of </function> it",
        "<|python_tag|>print(1)",
        "<|python_start|>print(1)<|python_end|>",
        "<|python_tag|>brave_search.call(query='x')",
        "<|python_tag|><|python_tag|>",
        "<|python_tag|>\n",
        "\n",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse([text]) == (text, [], []) == parse(text)


def test_broken_arguments_are_as_they_were_written() -> None:
    for text, arguments, content in (
        ('{"name": "f", "parameters": {"a": tru}}', '{"a": tru', "}}"),
        ('{"name": "f", "parameters": {"a": "x\\y"}} [g()]', '{"a": "x\\', 'y"}} '),
        ('<function=f>{"a": 1,}</function>', '{"a": 1,', "}</function>"),
        ('{"name": "f", "parameters": {"a": [' + "[" * 64, '{"a": [' + "[" * 62, "[["),
    ):
        assert parse([text])[:2] == (content, ["f", "g"] if "g" in text else ["f"])
        assert parse([text])[2][0] == arguments
        assert parse_calls(text, FUNCTIONS)[1] == ([Call("g", {})] if "g" in text else [])


def test_line_breaks_in_strings_are_escaped() -> None:
    call = Call("f", {"a": "one\ntwo\t", "b": 1})
    for text in ('{"name": "f", "parameters": {"a": "one\ntwo\t", "b": 1}}', '[f(a="one\ntwo\t", b=1)]'):
        assert parse_calls(text, FUNCTIONS) == ("", [call])


# Python's form, against Python's parser.


def python_says(text: str) -> list[Call] | None:
    """The calls in a list, or None where it is not one of calls with named arguments that JSON can say."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Dict(keys, items):
                names = [value(key) for key in keys if key]
                if len(names) != len(keys) or not all(isinstance(name, str) for name in names):
                    raise ValueError
                return dict(zip(names, map(value, items), strict=True))
            case ast.List(items):
                return [value(item) for item in items]
            case ast.Constant() | ast.UnaryOp(ast.USub(), ast.Constant()):
                found = ast.literal_eval(node)
                if isinstance(found, (complex, bytes)) or found is ...:
                    raise ValueError
                return found
        raise ValueError

    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = []
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) not in FUNCTIONS:
                return None
            if any(keyword.arg is None for keyword in call.keywords):
                return None
            arguments = {str(keyword.arg): value(keyword.value) for keyword in call.keywords}
            calls.append(Call(ast.unparse(call.func), arguments))
        return calls
    except (SyntaxError, ValueError):
        return None


def only_pythons(text: str) -> bool:
    """Whether it has what is left out here: strings side by side, and a minus away from its number."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    return any(
        (one.type == other.type == tokenize.STRING) or (one.string == "-" and one.end != other.start)
        for one, other in itertools.pairwise(tokens)
    )


PYTHON = [
    *(
        "f(",
        "g(",
        "math.pi(",
        "unknown(",
        "f()",
        ")",
        ")",
        ", ",
        ", ",
        ",",
        "a=",
        "b=",
        "c = ",
        "[",
        "]",
        "{",
        "}",
        "]",
    ),
    *(
        '"k": ',
        "'k':",
        "1",
        "-2",
        "0.5",
        "1e-3",
        "True",
        "None",
        "'it'",
        '"x"',
        "'\\''",
        '"\\\\"',
        "'\\n'",
        '""',
        " ",
        "\n",
    ),
    *('"""a"b\n"""', "''''''", "'\\x41\\u00e9\\101'", '"é🦙"', "f(a=1)", 'g(b={"k": [1, 2, {}]}, c="")', "-", "*"),
]


@settings(max_examples=1500, deadline=None)
@given(inner=st.lists(st.sampled_from(PYTHON), max_size=10).map("".join))
@example("f(a=1,),")
@example("f(a=[1,],b={'k':1,},)")
@example("f(a=' [f(a=1)]')")
def test_lists_are_what_python_takes_them_for(inner: str) -> None:
    text = f"[{inner}]"
    expected = python_says(text)
    content, calls = parse_calls(text, FUNCTIONS)
    if expected is not None and not only_pythons(text):
        assert (content, calls) == ("", expected)
    elif expected is not None:
        assert (content, calls) == (text, [])
    elif content == "":  # several lists one after the other, or a line break in a string
        assert re.search(r"\][;\s]*\[|\n", text)


@settings(deadline=None)
@given(value=values)
def test_python_literals_in_any_quotes(value: object) -> None:
    """repr() is an independent writer: it chooses quotes by the text and escapes by itself."""
    text = f"[f(a={value!r}, b={[value]!r})]"
    content, [call] = parse_calls(text, FUNCTIONS)
    assert content == "" and same(call.arguments, {"a": value, "b": [value]})


@settings(deadline=None)
@given(text=texts, quotes=st.sampled_from(['"""', "'''", '"', "'"]))
def test_quotes_and_escapes_are_pythons(text: str, quotes: str) -> None:
    literal = quotes + text + quotes
    try:
        expected = ast.literal_eval(literal)
    except (SyntaxError, ValueError):
        return
    # Python reads a carriage return as a line feed.
    assume(isinstance(expected, str) and not only_pythons(literal) and "\r" not in text and "\\N" not in text)
    content, calls = parse_calls(f"[f(a={literal})]", FUNCTIONS)
    assert (content, calls) == ("", [Call("f", {"a": expected})])


@pytest.mark.parametrize(
    ("literal", "written"),
    [
        *((".5", "0.5"), ("5.", "5.0"), ("-5.e3", "-5.0e3"), ("1_000", "1000"), ("1e5", "1e5"), ("-0.0", "-0.0")),
        *(("true", "true"), ("null", "null"), ("9" * 500, "9" * 500), ("'\\ud83d\\ude00'", '"\\ud83d\\ude00"')),
        *(("'\\\n'", '""'), ("'\\q'", '"\\\\q"'), ("'\\0'", '"\\u0000"'), ("'\ud83d'", '"\\ud83d"')),
    ],
)
def test_python_to_json(literal: str, written: str) -> None:
    assert parse([f"[f(a={literal})]"]) == ("", ["f"], [f'{{"a": {written}}}'])
    written.encode()  # half a character is escaped, so that the arguments can be sent


# Whole messages.


@pytest.mark.parametrize(
    ("text", "built_in", "content", "calls"),
    [
        ('Let me see.\n\n{"name": "f", "parameters": {}}', (), "Let me see.\n\n", [Call("f", {})]),
        (
            '[f(a=1)]\n[g()] ; {"name": "f", "parameters": {}}\n',
            (),
            "",
            [Call("f", {"a": 1}), Call("g", {}), Call("f", {})],
        ),
        ("[f(a=1)]; and then", (), "; and then", [Call("f", {"a": 1})]),
        ('<function=f>{"a": 1}</function>\n<function=g>{}</function>', (), "", [Call("f", {"a": 1}), Call("g", {})]),
        ("So<function=f> {}", (), "So", [Call("f", {})]),
        ("<|python_start|>[f()]<|python_end|> Wait.", (), " Wait.", [Call("f", {})]),
        ('<|python_tag|><function=f>{"a": "</function>"}</function>', (), "", [Call("f", {"a": "</function>"})]),
        ("<|python_tag|>f(a=1)", BUILT_IN, "", [Call("f", {"a": 1})]),
        ("<|python_tag|>f(a=1) + 1", BUILT_IN, "", [Call("code_interpreter", {"code": "f(a=1) + 1"})]),
        ("<|python_tag|>[f(x) for x in y]", BUILT_IN, "", [Call("code_interpreter", {"code": "[f(x) for x in y]"})]),
        ("<|python_tag|>  x = 1", BUILT_IN, "", [Call("code_interpreter", {"code": "  x = 1"})]),
        ("<|python_tag|>\n", BUILT_IN, "<|python_tag|>\n", []),
        ("<|python_start|>p(a=1)<|python_end|>", BUILT_IN, "", [Call("code_interpreter", {"code": "p(a=1)"})]),
        ("print(1)", BUILT_IN, "print(1)", []),
        (
            '{"name": "brave_search", "parameters": {"query": "x"}}',
            BUILT_IN,
            "",
            [Call("brave_search", {"query": "x"})],
        ),
        ('[brave_search(query="x")]', BUILT_IN, "", [Call("brave_search", {"query": "x"})]),
        ('{"name": "f", "parameters": {"a": 1}', (), "", [Call("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": 1}, "id": "7"}', (), "", [Call("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": 1}, "ty', (), "", [Call("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": 1}\n\nDone', (), "\n\nDone", [Call("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": 1', (), "", []),
        ('{"name": "f", "para', (), '{"name": "f", "para', []),
        ("[f(a=1), g(", (), "[f(a=1), g(", []),
        ('[{"name": "f", "parameters": {}}', (), "", [Call("f", {})]),
        ('[{"name": "f", "parameters": {}}, {"na', (), ', {"na', [Call("f", {})]),
        ('[{"name": "f", "parameters": {}},]', (), ",]", [Call("f", {})]),
        (
            '[{"name": "f", "parameters": {}}, 1, {"name": "g", "parameters": {}}] [g()]',
            (),
            ', 1, {"name": "g", "parameters": {}}] ',
            [Call("f", {}), Call("g", {})],
        ),
        (
            '[{"name": "f", "parameters": {}}, {"name": "unknown", "parameters": {}}]',
            (),
            ', {"name": "unknown", "parameters": {}}]',
            [Call("f", {})],
        ),
        ("[ [ {[f(a=1)] [g()]", (), "[ [ {[f(a=1)] ", [Call("g", {})]),
        ("{ [f()]", (), "{ ", [Call("f", {})]),
    ],
)
def test_messages(text: str, built_in: tuple[str, ...], content: str, calls: list[Call]) -> None:
    assert parse_calls(text, FUNCTIONS, built_in) == (content, calls)


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
