"""Grammars that are too large, hostile or nonsense are refused in time; those that end other parsers are followed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from herd import UsageError, tokenizer
from herd.engine import Grammar
from herd.engine.constraint import Grammars
from herd.engine.grammar import MAX_BYTES
from herd.engine.grammar_trial import trial
from herd.errors import MissingDependency
from tests.engine.grammars import walk

pytest.importorskip("llguidance")

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
