"""What a kind of exercise is, and how a drafted expression becomes a question in English.

A kind draws a `Draft` (code to ask about) or a `Ready` (question and answer in full). `phrase` puts a draft into
words: about its value ("What is `len([4, 2])`?"), about what `print` shows, in plain English where the kind has
it ("How many items are in [4, 2]?"), or as a fenced program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Difficulty = Literal["easy", "medium", "hard"]
Proof = Literal["prints", "checks", "none"]


@dataclass(frozen=True, slots=True)
class Draft:
    """Code to ask about: the value of `expression` after the statements of `setup`.

    spoken: a question in plain English with the same answer as printing the expression ("" if there is none)."""

    expression: str
    setup: str = ""
    spoken: str = ""

    @property
    def key(self) -> str:
        """What the exercise is about, whatever the words: train and held-out never share a key."""
        return f"{self.setup}|{self.expression}"


@dataclass(frozen=True, slots=True)
class Ready:
    """A question put into words by its kind. answer None: the answer is what `program` prints."""

    question: str
    program: str
    answer: str | None
    proof: Proof
    key: str


@dataclass(frozen=True, slots=True)
class Kind:
    """One family of exercises. weight: how often it is drawn, relative to the others."""

    name: str
    difficulty: Difficulty
    make: Callable[[Random], Draft | Ready]
    weight: float = 1.0


_VALUE = (
    "What is {}?",
    "What is {}?",
    "What is the value of {}?",
    "What does {} give?",
    "What does {} evaluate to?",
    "Evaluate {}.",
    "Compute {}.",
    "Work out {}.",
    "Tell me the value of {}.",
    "Give me the result of {}.",
    "What is the result of {}?",
    "In Python, what is {}?",
    "What do I get from {}?",
    "{} equals what?",
    "Please evaluate {}.",
    "I typed {} into Python. What came back?",
)
_PRINT = (
    "What does {} print?",
    "What is printed by {}?",
    "What is the output of {}?",
    "What will {} print?",
    "I run {}. What do I see?",
    "Show me the output of {}.",
    "Tell me what {} prints.",
)
_VALUE_AFTER = (
    "After {setup}, what is {code}?",
    "Given {setup}, what is {code}?",
    "Given {setup}, evaluate {code}.",
    "If {setup}, what is {code}?",
    "First {setup}. Now what is {code}?",
    "Python runs {setup}. What is {code} now?",
)
_FENCED = (
    "What does this print?\n{}",
    "What is the output of this code?\n{}",
    "What will this program print?\n{}",
    "{}\nWhat does it print?",
    "Tell me what this prints:\n{}",
)


def phrase(draft: Draft, rng: Random) -> tuple[str, str]:
    """(question, program): the program prints the answer to the question."""
    setup = draft.setup + "\n" if draft.setup else ""
    shown = f"{setup}print({draft.expression})"
    if draft.spoken and rng.random() < 0.4:
        return casual(draft.spoken, rng), shown
    if "\n" in draft.setup or (draft.setup and rng.random() < 0.3):
        return rng.choice(_FENCED).format(fenced(shown)), shown
    if draft.setup:
        question = rng.choice(_VALUE_AFTER).format(setup=f"`{draft.setup}`", code=f"`{draft.expression}`")
        return casual(question, rng), f"{setup}print(repr({draft.expression}))"
    if rng.random() < 0.35:
        return casual(rng.choice(_PRINT).format(f"`print({draft.expression})`"), rng), shown
    return casual(rng.choice(_VALUE).format(f"`{draft.expression}`"), rng), f"print(repr({draft.expression}))"


def fenced(code: str) -> str:
    """Code between fences, simple statements one a line."""
    return "```python\n" + code.replace("; ", "\n") + "\n```"


def casual(question: str, rng: Random) -> str:
    """Now and then as people type: no capital at the start, no mark at the end, no backticks."""
    if rng.random() < 0.85:
        return question
    if question[:1].isupper() and question[1:2].islower():
        question = question[0].lower() + question[1:]
    if question.endswith(("?", ".")):
        question = question[:-1]
    return question.replace("`", "") if rng.random() < 0.3 else question


def literals(values: Sequence[object]) -> str:
    """A list literal with double-quoted strings: `[1, 2]`, `["red", "fox"]`."""
    return "[" + ", ".join(map(literal, values)) + "]"


def literal(value: object) -> str:
    """A Python literal with double-quoted strings."""
    return f'"{value}"' if isinstance(value, str) else repr(value)
