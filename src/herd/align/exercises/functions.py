"""Exercises about small functions, loops, conditions and exceptions."""

from __future__ import annotations

from random import Random

from .drafts import Draft, Kind, Ready, casual, fenced, literals
from .words import COLLECTIONS, NAMES, VARIABLES, WORDS, numbers, words

_FUNCTIONS = ("f", "g", "h", "go", "run", "apply", "change", "compute")


def _return_argument(rng: Random) -> Draft:
    function, (x, y) = rng.choice(_FUNCTIONS), rng.sample(VARIABLES, 2)
    a, b = numbers(rng, 2, 0, 99)
    forms = (
        (f"def {function}({x}): return {x}", f"{function}({a})"),
        (f"def {function}({x}, {y}): return {x}", f"{function}({a}, {b})"),
        (f"def {function}({x}, {y}): return {y}", f"{function}({a}, {b})"),
        (f"def {function}({x}, {y}): return [{x}, {y}]", f"{function}({a}, {b})"),
        (f"def {function}({x}, {y}): return ({y}, {x})", f"{function}({a}, {b})"),
        (f"def {function}({x}): return [{x}, {x}]", f"{function}({a})"),
    )
    setup, call = rng.choice(forms)
    return Draft(call, setup)


def _greet(rng: Random) -> Draft:
    function, name = rng.choice(("greet", "hello", "welcome", "say")), rng.choice(("name", "who", "user", "x", "n"))
    text = rng.choice((f"Hello, {{{name}}}!", f"Hi {{{name}}}", f"Good day, {{{name}}}.", f"{{{name}}} is here"))
    return Draft(f'{function}("{rng.choice(NAMES)}")', f'def {function}({name}): return f"{text}"')


def _text_function(rng: Random) -> Draft:
    function, x = rng.choice(_FUNCTIONS), rng.choice(VARIABLES)
    body = rng.choice((f"{x}.upper()", f"{x}.split()", f'{x} + "!"', f"[{x}]"))
    return Draft(f'{function}("{" ".join(words(rng, rng.randint(1, 2)))}")', f"def {function}({x}): return {body}")


def _number_function(rng: Random) -> Draft:
    function, x = rng.choice(_FUNCTIONS), rng.choice(VARIABLES)
    a, b = rng.randint(1, 10), rng.randint(1, 5)
    body = rng.choice((f"{x} + {b}", f"{x} - {b}", f"{x} * {b}"))
    return Draft(f"{function}({a})", f"def {function}({x}): return {body}")


def _condition(rng: Random) -> Draft:
    function, x = rng.choice(_FUNCTIONS), rng.choice(VARIABLES)
    yes, no = words(rng, 2)
    border, value = numbers(rng, 2, 0, 20)
    sign = rng.choice("<>")
    return Draft(f"{function}({value})", f'def {function}({x}): return "{yes}" if {x} {sign} {border} else "{no}"')


def _default_argument(rng: Random) -> Draft:
    function, (x, y) = rng.choice(_FUNCTIONS), rng.sample(VARIABLES, 2)
    a, default, given = numbers(rng, 3, 0, 50)
    call = rng.choice((f"{function}({a})", f"{function}({a}, {given})", f"{function}({a}, {y}={given})"))
    return Draft(call, f"def {function}({x}, {y}={default}): return [{x}, {y}]")


def _compose(rng: Random) -> Draft:
    x = rng.choice(VARIABLES)
    a, b, c = rng.randint(1, 9), rng.randint(1, 5), rng.randint(2, 4)
    call = rng.choice((f"f(g({a}))", f"g(f({a}))", f"f(f({a}))"))
    return Draft(call, f"def f({x}): return {x} + {b}\ndef g({x}): return {x} * {c}")


def _multi_line(rng: Random) -> Draft:
    x = rng.choice(VARIABLES[:3])
    a, b, c = numbers(rng, 3, 1, 9)
    body = rng.choice(
        (
            f"    y = {x} + {b}\n    return y * {rng.randint(2, 3)}",
            f"    if {x} > {b}:\n        return {x} - {b}\n    return {c}",
            f"    total = 0\n    for i in range({x}):\n        total += i\n    return total",
        )
    )
    return Draft(f"f({a})", f"def f({x}):\n{body}")


def _accumulate(rng: Random) -> Draft:
    values = numbers(rng, rng.randint(2, 4), 1, 9)
    name, i = rng.sample(VARIABLES, 2)
    body = rng.choice((f"{name} += {i}", f"{name} = {i}", f"{name} += 1"))
    return Draft(name, f"{name} = 0\nfor {i} in {values}:\n    {body}")


def _loop_collect(rng: Random) -> Draft:
    values = literals(words(rng, rng.randint(2, 3)) if rng.random() < 0.5 else numbers(rng, rng.randint(2, 4), 0, 20))
    name, i = rng.choice(COLLECTIONS), rng.choice(VARIABLES)
    return Draft(name, f"{name} = []\nfor {i} in {values}:\n    {name}.append({i})")


def _loop_print(rng: Random) -> Ready:
    values = literals(words(rng, rng.randint(2, 3)) if rng.random() < 0.5 else numbers(rng, rng.randint(2, 4), 0, 20))
    name = rng.choice(VARIABLES)
    code = f"for {name} in {values}: print({name})"
    question = rng.choice(("What does `{}` print?", "What is the output of `{}`?", "I run `{}`. What do I see?"))
    return Ready(casual(question.format(code), rng), code, None, "prints", code)


def _exception(rng: Random) -> Ready:
    values, word = numbers(rng, rng.randint(1, 3), 0, 20), rng.choice(WORDS)
    other = rng.choice(WORDS[:50])
    code = rng.choice(
        (
            f"{values}[{rng.randint(len(values), 9)}]",
            f"{rng.randint(1, 99)} {rng.choice(('/', '//', '%'))} 0",
            f'int("{word}")',
            f'{{"{word}": {values[0]}}}["{other}{"s" if other == word else ""}"]',
            f'"{word}" + {values[0]}',
            f'{values[0]} + "{word}"',
            f"{word}_{other}",
            f"len({values[0]})",
            f'"{word}".push()',
            f"{values}.add({values[0]})",
            f'float("{word}")',
            f'"{word}"[{rng.randint(20, 99)}]',
        )
    )
    question = rng.choice(
        (
            "Which exception does `{}` raise?",
            "What error do I get from `{}`?",
            "`{}` fails. With which exception?",
            "Name the exception raised by `{}`.",
            "What does `{}` raise?",
        )
    )
    program = f"try:\n    {code}\nexcept Exception as error:\n    print(type(error).__name__)"
    return Ready(casual(question.format(code), rng), program, None, "prints", code)


def _fix_output(rng: Random) -> Ready:
    """A whole program between fences that prints twice."""
    a, b = rng.sample(VARIABLES, 2)
    first, second = numbers(rng, 2, 0, 99)
    code = f"{a} = {first}\n{b} = {second}\nprint({b})\nprint({a})"
    ask = rng.choice(("What does this print?\n{}", "What is the output of this code?\n{}", "{}\nWhat does it print?"))
    return Ready(ask.format(fenced(code)), code, None, "prints", code)


KINDS = (
    Kind("return_argument", "easy", _return_argument),
    Kind("greet", "easy", _greet),
    Kind("text_function", "medium", _text_function, 0.7),
    Kind("number_function", "hard", _number_function),
    Kind("condition", "medium", _condition, 0.7),
    Kind("default_argument", "medium", _default_argument, 0.7),
    Kind("compose", "hard", _compose, 0.4),
    Kind("multi_line", "hard", _multi_line, 0.4),
    Kind("accumulate", "hard", _accumulate, 0.5),
    Kind("loop_collect", "easy", _loop_collect, 0.7),
    Kind("loop_print", "easy", _loop_print, 0.7),
    Kind("print_twice", "easy", _fix_output, 0.5),
    Kind("exception", "easy", _exception),
)
