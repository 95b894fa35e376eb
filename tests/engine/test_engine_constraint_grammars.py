"""Regular expressions, choices and Lark grammars, against `re`, brute force and a parser by hand; no control tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import UsageError, tokenizer
from herd.engine import Grammar
from herd.engine.constraint import Grammars
from tests.engine.grammars import GRAMMARS, SUM, accepts, ids_allowed, start, walk

pytest.importorskip("llguidance")

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
@given(
    options=st.lists(st.text(max_size=12).filter(lambda s: s.isprintable()), min_size=1, max_size=6),
    seed=st.integers(0, 3),
)
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
