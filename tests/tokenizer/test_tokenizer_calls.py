"""Calls of tools in what a model writes: against what writes them, Python's parser and JSON's."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
import warnings
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from herd.tokenizer import ArgumentsDelta, Call, CallParser, CallStart, Message, Tokenizer, parse_calls
from herd.tokenizer.chat.tools import BUILT_IN, code_call, json_call, pythonic_calls, search_call

FUNCTIONS = ["f", "g", "get_weather", "math.pi"]
TAGS = ("<|python_tag|>", "<|python_start|>")

# Values that JSON, a Python literal and a `Call` can all say; floats keep their sign of zero.
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
HOSTILE_TEXT = r"""
" ' \ \u00e9 [f(a=1)] </function> <function=f>{} <|python_tag|> <|python_end|> f(a=1) ] }) 🦙 ()
"""
HOSTILE = HOSTILE_TEXT.split()
HOSTILE += ['"""', '{"name": "f", "parameters": {}}', "\n", "\x00\x1f\x7f", "\u2028", "\ud83d"]
hostile = st.sampled_from(HOSTILE)
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
            for same_text in (text, text.replace("parameters", "arguments"), text.replace('"f"', '"\\u0066"')):
                assert parse_calls(same_text, FUNCTIONS) == ("", [Call("f", {"a": {"b": [1]}})])


NO_CALLS_TEXT = r"""
{"name": "f"}
{"name": "f", "parameters": null}
{"name": "f", "parameters": "{}"}
{"name": "f", "parameters": [1]}
{"name": "f", "description": "…", "parameters": {"type": "object"}}
{"type": "object", "name": "f", "parameters": {}}
{"type": "func", "name": "f", "parameters": {}}
{"type": "function", "function": {"name": "f", "parameters": {}}}
{"name": "f", "name": "f", "parameters": {}}
{"name": f, "parameters": {}}
{'name': 'f', 'parameters': {}}
{"name": "unknown", "parameters": {"x": [{"name": "f", "parameters": {}}, " [f(a=1)]"]}}
{"answer": [1, {"name": "f", "parameters": {}}]}
[{"name": "unknown", "parameters": {}}, {"name": "f", "parameters": {}}]
[1, {"name": "f", "parameters": {}}]
[f(), {'name': 'f', 'parameters': {}}]
[f(), {"name": "f", "parameters": {}}]
{"parameters": {"a": tru}, "name": "f"}
x={"name": "f", "parameters": {}}
`{"name": "f", "parameters": {}}`
<function=unknown>{"a": {"name": "f", "parameters": {}}}</function>
<function=f></function>
<function=f>"x"</function>
<function=f
[f(a=1), unknown(b=' [f(a=1)]')]
[unknown(b='x'), f(a=1)]
unknown(a=' [f()]')
[f(1)]
[f(a=1, a=2)]
[f(a=(1, 2))]
[f(a={1: 2})]
[f(a={'x'})]
[f(a=g())]
[f(a=b)]
[f(a=1 + 1)]
[f(a=1j)]
[f(a=0x10)]
[f(a=01)]
[f(a=[1,,2])]
[fx(a=1)]
<function=fx>{}</function>
[get_weathe(a=1)]
[f(,)]
[f(=1)]
[f(a.b=1)]
[f(1a=1)]
[f(a=1,,b=2)]
[f(a=1 b=2)]
[f(a='x)]
[f(a='\x4')]
[f(a='\U00110000')]
[f(a='\N{BULLET}')]
[f(a=f'{g()}')]
[f(a=__import__('os').system('true'))]
[f(**{'a': 1})]
[f(a=1)
[f]
[]
f(a=1) or so
print(f(a=1))
The <|python_end|> of </function> it
<|python_tag|>print(1)
<|python_start|>print(1)<|python_end|>
<|python_tag|>brave_search.call(query='x')
<|python_tag|><|python_tag|>
"""
NO_CALLS = NO_CALLS_TEXT.strip().split("\n")


@pytest.mark.parametrize("text", [*NO_CALLS, "f(a=1)\ng()", "<|python_tag|>\n", "\n"])
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse_calls(text, FUNCTIONS) == (text, [])


def test_escapes_are_jsons_and_pythons() -> None:
    """A backslash before every character, and what can follow some of them."""
    more = ["u00e9", "uD83D\\uDE00", "101", "18", "x41", "400", "U0001F999", "\r\n"]
    for escape in [*map(chr, range(1, 128)), *more]:
        text = f'{{"a": "\\{escape}"}}'
        try:
            expected = [Call("f", json.loads(text))]
        except ValueError:
            expected = []
        content, calls = parse_calls(f"<function=f>{text}", FUNCTIONS)
        assert calls == expected and (content == "") == (calls != [])
        if escape not in ("\r", "N", "x", "u", "U", '"', "uD83D\\uDE00"):  # broken ones, and those JSON joins
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = ast.literal_eval(f'"\\{escape}"')
            assert parse_calls(f'[f(a="\\{escape}")]', FUNCTIONS) == ("", [Call("f", {"a": value})])


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


PYTHON_TEXT = r"""
f( g( math.pi( unknown( f() ) ) , a= b= [ ] ] { } 'k': 1 -2 0.5 1e-3 True None 'it' "x" '\'' "\\" '\n' "" '''''' - *
'\x41\u00e9\101' "é🦙" f(a=1)
"""
PYTHON = PYTHON_TEXT.split()
PYTHON += [", ", ", ", "c = ", '"k": ', " ", "\n", '"""a"b\n"""', 'g(b={"k": [1, 2, {}]}, c="")']


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
    deltas = CallParser(FUNCTIONS).push(f"[f(a={literal})]")
    assert deltas == [CallStart(0, "f"), ArgumentsDelta(0, f'{{"a": {written}}}')]
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
        ('[{"name": "f", "parameters": {}}, {', (), ", {", [Call("f", {})]),
        ('{"name": "f", "parameters": {}}\n{', (), "\n{", [Call("f", {})]),
        ('{"a": "open\n {"name": "f", "parameters": {}}', (), '{"a": "open\n ', [Call("f", {})]),
        ("[ [ {[f(a=1)] [g()]", (), "[ [ {[f(a=1)] ", [Call("g", {})]),
        ("{ [f()]", (), "{ ", [Call("f", {})]),
    ],
)
def test_messages(text: str, built_in: tuple[str, ...], content: str, calls: list[Call]) -> None:
    assert parse_calls(text, FUNCTIONS, built_in) == (content, calls)
