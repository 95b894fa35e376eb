"""Patterns of JSON schemas: what is written under them is valid for ECMAScript as for Python."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from herd import UsageError, tokenizer
from herd.engine import Grammar
from herd.engine.constraint import Constraint, Grammars

pytest.importorskip("llguidance")

# ECMAScript 2025, 12.2, 12.3 and 22.2.2.9: white space, line terminators, and the classes of regular expressions.
LINE_ENDS = set("\n\r\u2028\u2029")
SPACES = LINE_ENDS | set("\t\v\f\ufeff") | {c for c in map(chr, range(0x10000)) if unicodedata.category(c) == "Zs"}
DIGITS = set("0123456789")
WORDS = DIGITS | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
ECMA = {
    ".": lambda c: c not in LINE_ENDS,
    r"\.": lambda c: c == ".",
    r"\d": lambda c: c in DIGITS,
    r"\D": lambda c: c not in DIGITS,
    r"\w": lambda c: c in WORDS,
    r"\W": lambda c: c not in WORDS,
    r"\s": lambda c: c in SPACES,
    r"\S": lambda c: c not in SPACES,
    r"[.\d]": lambda c: c == "." or c in DIGITS,
    r"[\s\d]": lambda c: c in SPACES or c in DIGITS,
    r"[^\s]": lambda c: c not in SPACES,
    r"[^\d\w]": lambda c: c not in WORDS,
    r"[\D]": lambda c: c not in DIGITS,
    r"[^\D]": lambda c: c in DIGITS,
    r"[^\S]": lambda c: c in SPACES,
    r"[^\W]": lambda c: c in WORDS,
    r"[^x.]": lambda c: c not in "x.",
}
CHARACTERS = [*SPACES, *"aZx0 9_.-[^\\", *"\x00\x1c\x1f\x7f\x85é١²Ⅷжأ日𝟙🦙\u0301\u200b\u2060\u180e"]


@pytest.fixture(scope="module")
def small(tiny: Path) -> tokenizer.Tokenizer:
    return tokenizer.load(tiny)


@pytest.mark.parametrize("pattern", ECMA)
def test_a_pattern_means_the_same_everywhere(small: tokenizer.Tokenizer, pattern: str) -> None:
    grammars = Grammars(small)
    byte = {small.token_bytes(i): i for i in range(small.vocab_size) if len(small.token_bytes(i)) == 1}

    def written(schema: dict[str, object], text: str) -> bool:
        constraint = Constraint(grammars, Grammar.json_schema(schema), small.stop_ids)
        for i in (*[byte[bytes([b])] for b in text.encode()], small.eos_id):
            if not np.unpackbits(constraint.allowed(), bitorder="little")[i]:
                return False
            constraint.commit(i)
        return True

    found = 0
    for character in dict.fromkeys(CHARACTERS):
        if written({"type": "string", "pattern": f"^{pattern}$"}, json.dumps(character, ensure_ascii=False)):
            found += 1
            assert ECMA[pattern](character), ascii(character)
            assert re.search(f"^{pattern}$", character), ascii(character)
        else:  # refused only where there is some reader that would
            special = character == "\x7f" or character < " "  # may be written in another way
            assert (
                special
                or not (ECMA[pattern](character) and re.search(f"^{pattern}$", character))
                or (unicodedata.category(character)[0] == "M")
            ), ascii(character)
    assert found
    named = {"type": "object", "patternProperties": {f"^{pattern}$": {"const": 1}}, "additionalProperties": False}
    for character in "1.a \u2028":
        good = ECMA[pattern](character) and re.search(f"^{pattern}$", character) is not None
        assert written(named, json.dumps({character: 1}, ensure_ascii=False, separators=(",", ":"))) == good


def test_long_schemas_are_refused_before_they_are_read() -> None:
    """They are read where others wait: 5 MB of patterns took a second, and a tenth of it if cut into small ones."""
    for schema in (
        {"pattern": "a" * 5_000_000},
        {"anyOf": [{"pattern": "a" * 60_000}] * 80},
        {"patternProperties": {"a" * 60_000 + str(i): {} for i in range(80)}},
        {"enum": [1] * 1_000_000},
        {"required": ["a"] * 1_000_000},
        {"type": ["null"] * 6_000_000},
    ):
        began = time.thread_time()
        with pytest.raises(UsageError, match="too long"):
            Grammar.json_schema(schema)
        assert time.thread_time() - began < 0.4  # a tenth of it is usual
    for schema in (
        {"pattern": "a" * 65_000},
        {"enum": [1] * 32_700},
        {"anyOf": [{}] * 21_800},
        {"required": [""] * 21_800},
    ):
        assert len(Grammar.json_schema(schema).text) > 65_000  # and nothing that is short enough


def test_two_patterns_that_become_one_are_refused() -> None:
    with pytest.raises(UsageError, match="two of these patterns are the same"):
        Grammar.json_schema({"patternProperties": {r"^\d$": {"const": 1}, "^[0-9]$": {"minimum": 2}}})
