"""Exercises that ask for code: an expression or a small function with one canonical answer.

Each is proved: its program runs the answer on an example and compares with a value computed in another way."""

from __future__ import annotations

from random import Random

from .drafts import Kind, Ready, casual
from .words import COLLECTIONS, NAMES, TEXTS, VARIABLES, WORDS

_ASK = (
    "Write an expression for {}.",
    "How do I get {} in Python?",
    "How do I get {}?",
    "Give me an expression for {}.",
    "What is the Python expression for {}?",
    "Show me how to get {}.",
    "I need {}. What do I write?",
)
# What is asked for, the canonical answer, and the same value computed in another way, for a list of numbers {v} …
_OF_NUMBERS = (
    ("the length of `{v}`", "len({v})", "sum(1 for _ in {v})"),
    ("the number of items in `{v}`", "len({v})", "sum(1 for _ in {v})"),
    ("the first item of `{v}`", "{v}[0]", "list(reversed({v})).pop()"),
    ("the last item of `{v}`", "{v}[-1]", "{v}[len({v}) - 1]"),
    ("the sum of `{v}`", "sum({v})", "4 + 9 + 2 + 9"),
    ("the largest number in `{v}`", "max({v})", "sorted({v})[-1]"),
    ("the smallest number in `{v}`", "min({v})", "sorted({v})[0]"),
    ("a sorted copy of `{v}`", "sorted({v})", "[2, 4, 9, 9]"),
    ("`{v}` in reverse order", "{v}[::-1]", "list(reversed({v}))"),
    ("the average of `{v}`", "sum({v}) / len({v})", "24 / 4"),
    ("the number of different items in `{v}`", "len(set({v}))", "3"),
    ("the first three items of `{v}`", "{v}[:3]", "[4, 9, 2]"),
    ("the first two items of `{v}`", "{v}[:2]", "[4, 9]"),
    ("every second item of `{v}`", "{v}[::2]", "[4, 2]"),
    ("all but the first item of `{v}`", "{v}[1:]", "[9, 2, 9]"),
    ("all but the last item of `{v}`", "{v}[:-1]", "[4, 9, 2]"),
    ("a copy of `{v}`", "list({v})", "{v}[:]"),
    ("`{v}` as a tuple", "tuple({v})", "(4, 9, 2, 9)"),
    ("the set of `{v}`", "set({v})", "{{2, 4, 9}}"),
    ("how often 9 occurs in `{v}`", "{v}.count(9)", "sum(1 for one in {v} if one == 9)"),
    ("the position of 2 in `{v}`", "{v}.index(2)", "2"),
    ("the numbers of `{v}` doubled", "[n * 2 for n in {v}]", "[8, 18, 4, 18]"),
    ("the squares of `{v}`", "[n ** 2 for n in {v}]", "[16, 81, 4, 81]"),
    ("the even numbers in `{v}`", "[n for n in {v} if n % 2 == 0]", "[4, 2]"),
    ("the pairs of index and item of `{v}`", "list(enumerate({v}))", "list(zip(range(4), {v}))"),
)
# … and for a text {t}.
_OF_TEXT = (
    ("`{t}` in upper case", "{t}.upper()", '"RED FOX "'),
    ("`{t}` in lower case", "{t}.lower()", '"red fox "'),
    ("`{t}` without spaces around it", "{t}.strip()", '"Red fox"'),
    ("the words of `{t}`", "{t}.split()", '["Red", "fox"]'),
    ("the number of words in `{t}`", "len({t}.split())", "2"),
    ("the number of characters in `{t}`", "len({t})", "8"),
    ("the first character of `{t}`", "{t}[0]", '"R"'),
    ("the last character of `{t}`", "{t}[-1]", '" "'),
    ("`{t}` backwards", "{t}[::-1]", '"".join(reversed({t}))'),
    ("`{t}` with dashes in place of spaces", '{t}.replace(" ", "-")', '"Red-fox-"'),
    ("the list of the characters of `{t}`", "list({t})", '["R", "e", "d", " ", "f", "o", "x", " "]'),
    ("`{t}` repeated three times", "{t} * 3", "{t} + {t} + {t}"),
    ("whether `{t}` starts with R", '{t}.startswith("R")', "True"),
    ("whether `{t}` is empty", "not {t}", "False"),
)
_FUNCTION_ASK = (
    "Write a function `{name}` that returns {what}.",
    "Write a Python function `{name}` that returns {what}.",
    "Define a function `{name}` which returns {what}.",
    "I need a function `{name}` that returns {what}.",
)
# what, argument, body, example argument, expected value
_FUNCTIONS = (
    ("its argument plus {n}", "x", "x + {n}", "5", "sum([5, {n}])"),
    ("its argument times {n}", "x", "x * {n}", "5", "sum([5] * {n})"),
    ("its argument minus {n}", "x", "x - {n}", "5", "-({n} - 5)"),
    ("whether its argument is larger than {n}", "x", "x > {n}", "5", "max(5, {n} + 1) == 5"),
    ("the remainder of its argument by {n}", "x", "x % {n}", "50", "50 - 50 // {n} * {n}"),
)
_LIST_FUNCTIONS = (
    ("the sum of a list", "values", "sum(values)", "[3, 1, 2]", "6"),
    ("the largest value of a list", "values", "max(values)", "[3, 1, 2]", "3"),
    ("the smallest value of a list", "values", "min(values)", "[3, 1, 2]", "1"),
    ("the length of a list", "values", "len(values)", "[3, 1, 2]", "3"),
    ("the first item of a list", "values", "values[0]", "[3, 1, 2]", "3"),
    ("the last item of a list", "values", "values[-1]", "[3, 1, 2]", "2"),
    ("a list in reverse order", "values", "values[::-1]", "[3, 1, 2]", "[2, 1, 3]"),
    ("a sorted list", "values", "sorted(values)", "[3, 1, 2]", "[1, 2, 3]"),
    ("a text in upper case", "text", "text.upper()", '"aB"', '"AB"'),
    ("a text in lower case", "text", "text.lower()", '"aB"', '"ab"'),
    ("a text backwards", "text", "text[::-1]", '"aB"', '"Ba"'),
    ("the words of a text", "text", "text.split()", '"a B"', '["a", "B"]'),
    ("the square of a number", "x", "x ** 2", "5", "25"),
    ("the double of a number", "x", "x * 2", "5", "10"),
    ("whether a number is even", "x", "x % 2 == 0", "5", "False"),
    ("whether a number is odd", "x", "x % 2 == 1", "5", "True"),
)
_FUNCTION_NAMES = ("f", "g", "h", "go", "change", "work", "run", "apply", "get", "make", "compute", "solve", "find")


def _expression(rng: Random) -> Ready:
    if rng.random() < 0.65:
        variable, example = rng.choice(COLLECTIONS), "[4, 9, 2, 9]"
        what, answer, other = (part.format(v=variable) for part in rng.choice(_OF_NUMBERS))
    else:
        variable, example = rng.choice(TEXTS), '"Red fox "'
        what, answer, other = (part.format(t=variable) for part in rng.choice(_OF_TEXT))
    program = f"{variable} = {example}\nprint(({answer}) == ({other}))"
    return Ready(casual(rng.choice(_ASK).format(what), rng), program, answer, "checks", f"write {answer}")


def _assignment(rng: Random) -> Ready:
    variable = rng.choice((*VARIABLES, *TEXTS))
    number, word = rng.randint(0, 99), rng.choice((*WORDS, *NAMES))
    what, value = rng.choice(((f"the number {number}", str(number)), (f'the text "{word}"', f'"{word}"')))
    answer = f"{variable} = {value}"
    question = rng.choice(
        (
            f"Assign {what} to `{variable}`.",
            f"Set `{variable}` to {what}.",
            f"Store {what} in `{variable}`.",
            f"How do I store {what} in `{variable}`?",
        )
    )
    program = f"{answer}\nprint({variable} == {value} and str({variable}) == str({value}))"
    return Ready(casual(question, rng), program, answer, "checks", answer)


def _print_call(rng: Random) -> Ready:
    text = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    answer = f'print("{text}")'
    question = rng.choice(
        (
            f'Write a line that prints "{text}".',
            f'How do I print "{text}"?',
            f'Print "{text}" in Python.',
            f'Give me code that prints "{text}".',
        )
    )
    program = f'{answer}\nprint("{text}" == " ".join({text.split()}))'
    return Ready(casual(question, rng), program, answer, "checks", answer)


def _function(rng: Random) -> Ready:
    name = rng.choice(_FUNCTION_NAMES)
    numbered = rng.random() < 0.6
    parts = rng.choice(_FUNCTIONS if numbered else _LIST_FUNCTIONS)
    number = rng.randint(2, 20)
    what, argument, body, example, expected = (part.format(n=number) for part in parts)
    answer = f"def {name}({argument}):\n    return {body}"
    program = f"{answer}\nprint({name}({example}) == ({expected}))"
    question = rng.choice(_FUNCTION_ASK).format(name=name, what=what)
    return Ready(casual(question, rng), program, answer, "checks", answer)


KINDS = (
    Kind("write_expression", "easy", _expression, 2.0),
    Kind("write_assignment", "easy", _assignment, 0.7),
    Kind("write_print", "easy", _print_call, 0.7),
    Kind("write_function", "easy", _function, 1.5),
)
