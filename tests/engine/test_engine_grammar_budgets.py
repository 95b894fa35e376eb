"""What a grammar may take of a processor that others wait for, and what of grammars is not held against them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import LLM, UsageError, tokenizer
from herd.engine import Grammar, Sampling
from herd.engine import grammar_trial as trials
from herd.engine.constraint import BEYOND_S, TOKEN_S, Constraint, GrammarFailed, Grammars

pytest.importorskip("llguidance")

WORD = Grammar.regex("[a-f]{5}")
AMBIGUOUS = Grammar.lark("start: s\ns: s s | /[a-z]/")


class Held:
    """Compiling for answers waits here, one after the other, until it is let on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.on = threading.Event()
        self._matcher = trials._matcher
        monkeypatch.setattr(trials, "_matcher", self.matcher)

    def matcher(self, *arguments: Any) -> Any:
        self.begun += 1
        assert self.on.wait(20)
        return self._matcher(*arguments)


@pytest.fixture
def held(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    llm.generate("x", grammar=WORD, max_tokens=1)  # known from here on
    held = Held(monkeypatch)
    yield held
    held.on.set()


def test_nobody_waits_while_a_grammar_is_compiled(llm: LLM, held: Held) -> None:
    held.on.set()
    options: dict[str, Any] = {"grammar": WORD, "seed": 3, "max_tokens": 20}
    expected = [answer.token_ids for answer in llm.generate("y", n=3, **options)]  # type: ignore[union-attr]
    held.on.clear()
    held.begun = 0
    (free,) = llm.begin(llm._encode("x"), Sampling(max_tokens=60, seed=1, ignore_eos=True))
    bound = llm.begin(llm._encode("y"), Sampling(**options), n=3)
    for _ in range(30):
        llm.step()
    assert len(free.choices) >= 28 and not any(sequence.choices for sequence in bound)
    assert held.begun == 1  # one after the other
    held.on.set()
    while not all(sequence.completion for sequence in bound):
        llm.step()
    assert [sequence.completion.token_ids for sequence in bound if sequence.completion] == expected
    assert held.begun == 3
    llm.cancel([free])


def test_what_nobody_waits_for_is_not_compiled(llm: LLM, held: Held) -> None:
    (free,) = llm.begin(llm._encode("x"), Sampling(max_tokens=60, seed=1, ignore_eos=True))
    bound = llm.begin(llm._encode("y"), Sampling(grammar=WORD, max_tokens=20), n=5)
    for _ in range(3):
        llm.step()
    llm.cancel(bound)
    held.on.set()
    assert llm.generate("y", grammar=WORD, max_tokens=20).finish_reason in ("stop", "length")
    assert held.begun == 2  # what had begun, and the last one
    llm.cancel([free])


def test_an_answer_that_can_be_read_in_too_many_ways_ends(llm: LLM) -> None:
    """Its masks take longer with every token, without an end: 0.5 s each after 150 tokens."""
    no_end = {i: -100.0 for i in llm.tokenizer.stop_ids}
    began = time.thread_time()
    with pytest.raises(GrammarFailed, match="too large: the number of ways to read a text"):
        llm.generate("x", grammar=AMBIGUOUS, max_tokens=180, seed=0, temperature=1.0, logit_bias=no_end)
    assert time.thread_time() - began < 10 * (BEYOND_S + 180 * TOKEN_S)
    few = llm.generate("x", grammar=AMBIGUOUS, max_tokens=10, seed=0, temperature=1.0, logit_bias=no_end)
    assert few.usage.completion_tokens == 10


def test_a_long_answer_has_its_time_token_by_token(llm: LLM) -> None:
    grammar = Grammar.lark('start: "[" (OBJECT ","){1000} "]"\nOBJECT: /\\{"[a-z]{1,9}": [0-9]{1,9}\\}/')
    answer = llm.generate("x", grammar=grammar, max_tokens=180, seed=0, temperature=1.0)
    assert answer.usage.completion_tokens == 180


def test_many_optional_properties_may_stand_on_lines(shared_data: Path) -> None:
    """Behind a line break, each of so many properties may follow each of Llama 3's tokens of blanks."""
    tok = tokenizer.load(shared_data / "tokenizers" / "llama3.tokenizer.model")
    grammars = Grammars(tok)
    grammar = Grammar.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}})
    grammars.check(grammar)
    constraint = Constraint(grammars, grammar, tok.stop_ids)
    for text in ("{", "\n", "   "):
        constraint.allowed()
        constraint.commit(tok.encode(text)[0])
    allowed = np.flatnonzero(np.unpackbits(constraint.allowed(), bitorder="little"))
    assert tok.encode(' "')[0] in allowed and tok.encode("x")[0] not in allowed


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (lambda: Grammar.choice(['a%json {"x": 1}']), 'a%json {"x": 1}'),
        (lambda: Grammar.lark('start: "%json" A\nA: "\\"%json"'), '%json"%json'),
        (lambda: Grammar.lark('start: /%json \\/%json/ # %json "\n// %json\n'), "%json /%json"),
        (lambda: Grammar.lark('# "\nstart: "%json" %json {"const": 7, "title": "/"} /,/'), "%json7,"),
    ],
)
def test_only_a_schema_is_read_as_one(llm: LLM, grammar: Any, text: str) -> None:
    answer = llm.generate("x", grammar=grammar(), max_tokens=40)
    assert (answer.text, answer.finish_reason) == (text, "stop")


def test_schemas_between_strings_are_still_read() -> None:
    for before in ('start: "a" ', '# "\nstart: ', "// /\nstart: ", 'start: /"/ ', 'start: "\\\\" '):
        with pytest.raises(UsageError, match="keyword of JSON Schema is not followed; got not"):
            Grammar.lark(before + '%json {"not": {}}')


@pytest.mark.parametrize("unit", ['"', '\\"', '"\\', "/", "\\/", "/\\", "#", '"\\"\n'])
def test_a_lark_grammar_is_read_in_linear_time(unit: str) -> None:
    """The longest takes some 20 ms; were every beginning read to the end, it would be minutes."""
    began = time.process_time()
    Grammar.lark(unit * (60_000 // len(unit)))
    assert time.process_time() - began < 2


def test_the_other_process_has_nothing_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitiser takes terabytes of addresses, which that process has not."""
    monkeypatch.setenv("LD_PRELOAD", "")
    trials.trial.end()
    assert trials.trial.error('{"grammars": [{"lark_grammar": "start: \\"a\\""}]}') == ""
    assert trials.trial._process is not None
    environment = Path(f"/proc/{trials.trial._process.pid}/environ")
    if not environment.exists():
        pytest.skip("only Linux shows what another process was given")
    names = {line.split(b"=")[0] for line in environment.read_bytes().split(b"\0")}
    assert b"PATH" in names and b"LD_PRELOAD" not in names
