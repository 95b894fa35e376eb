"""Exercises about numbers, truth values and types."""

from __future__ import annotations

from random import Random

from .drafts import Draft, Kind, literal
from .words import NAMES, VARIABLES, WORDS, numbers, words


def _add_small(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 0, 9)
    spoken = rng.choice(
        (f"What is {a} plus {b}?", f"Add {a} and {b}.", f"What is the sum of {a} and {b}?", f"How much is {a}+{b}?")
    )
    return Draft(f"{a} + {b}", spoken=spoken)


def _subtract_small(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 0, 9)
    return Draft(
        f"{a} - {b}", spoken=rng.choice((f"What is {a} minus {b}?", f"Subtract {b} from {a}.", f"What is {a}-{b}?"))
    )


def _times_table(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 1, 10)
    return Draft(
        f"{a} * {b}", spoken=rng.choice((f"What is {a} times {b}?", f"Multiply {a} by {b}.", f"What is {a}*{b}?"))
    )


def _add_two_digits(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 10, 99)
    return Draft(f"{a} + {b}", spoken=rng.choice((f"What is {a} plus {b}?", f"Add {a} and {b}.")))


def _add_three_digits(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 100, 999)
    return Draft(f"{a} {rng.choice('+-')} {b}")


def _multiply_two_digits(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 11, 99)
    return Draft(f"{a} * {b}", spoken=f"What is {a} times {b}?")


def _floor_divide(rng: Random) -> Draft:
    a, b = rng.randint(1, 50), rng.randint(2, 9)
    if rng.random() < 0.5:
        return Draft(f"{a} // {b}", spoken=f"How many whole times does {b} go into {a}?")
    return Draft(f"{a} % {b}", spoken=f"What is the remainder when {a} is divided by {b}?")


def _chain(rng: Random) -> Draft:
    a, b, c = numbers(rng, 3, 1, 12)
    return Draft(rng.choice((f"{a} + {b} * {c}", f"({a} + {b}) * {c}", f"{a} * {b} - {c}", f"{a} - {b} + {c}")))


def _power(rng: Random) -> Draft:
    a, b = rng.randint(2, 12), rng.randint(2, 4)
    return Draft(f"{a} ** {b}", spoken=f"What is {a} to the power of {b}?")


def _absolute(rng: Random) -> Draft:
    a = rng.randint(1, 99) * rng.choice((1, -1))
    return Draft(f"abs({a})", spoken=f"What is the absolute value of {a}?")


_COMPARISONS = (
    ("<", "less than"),
    (">", "greater than"),
    ("==", "equal to"),
    ("!=", "different from"),
    ("<=", "at most"),
    (">=", "at least"),
)


def _compare(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 0, 20)
    if rng.random() < 0.15:
        b = a
    sign, said = rng.choice(_COMPARISONS)
    return Draft(f"{a} {sign} {b}", spoken=f"Is {a} {said} {b}? Answer True or False.")


def _logic(rng: Random) -> Draft:
    a, b, c = (str(rng.random() < 0.5) for _ in range(3))
    first, second = rng.choice(("and", "or")), rng.choice(("and", "or"))
    forms = (f"{a} {first} {b}", f"{a} {first} not {b}", f"not {a} {first} {b}", f"not ({a} {first} {b})")
    return Draft(rng.choice((*forms, f"{a} {first} {b} {second} {c}", f"({a} {first} {b}) {second} {c}")))


def _truthiness(rng: Random) -> Draft:
    full = (rng.randint(-50, 99), rng.choice(WORDS), numbers(rng, rng.randint(1, 3), 0, 9))
    value: object = rng.choice((*full, 0, "", [], 0.0, None, {}))
    return Draft(f"bool({literal(value)})" if rng.random() < 0.5 else f"not {literal(value)}")


def _type_name(rng: Random) -> Draft:
    inside = numbers(rng, rng.randint(1, 3), 0, 99)
    body = ", ".join(map(str, inside))
    value = rng.choice(
        (
            str(rng.randint(-99, 999)),
            f"{rng.randint(0, 99)}.{rng.randint(0, 9)}",
            f'"{" ".join(words(rng, rng.randint(1, 2)))}"',
            f'"{rng.randint(0, 99)}"',
            f"[{body}]",
            f"({body},)" if len(inside) == 1 else f"({body})",
            f"{{{body}}}",
            f'{{"{rng.choice(WORDS)}": {inside[0]}}}',
            rng.choice(("True", "False", "None", "{}", "[]", "()", '""')),
            f"{inside[0]} < {inside[-1]}",
        )
    )
    spoken = rng.choice((f"What type is `{value}`?", f"What is the type of `{value}`?", f"Name the type of `{value}`."))
    return Draft(f"type({value}).__name__", spoken=spoken)


def _maximum_of_two(rng: Random) -> Draft:
    a, b = numbers(rng, 2, 0, 30)
    if rng.random() < 0.5:
        return Draft(f"max({a}, {b})", spoken=f"Which is larger, {a} or {b}?" if a != b else "")
    return Draft(f"min({a}, {b})", spoken=f"Which is smaller, {a} or {b}?" if a != b else "")


def _convert(rng: Random) -> Draft:
    number = rng.randint(0, 999)
    forms = (f'int("{number}")', f"str({number})", f"int({number}.{rng.randint(0, 9)})", f"float({number})")
    return Draft(rng.choice(forms))


def _recall(rng: Random) -> Draft:
    left, right = rng.sample(VARIABLES, 2)
    first: object = rng.randint(0, 99)
    second: object = rng.randint(0, 99)
    if rng.random() < 0.3:
        first, second = rng.choice(NAMES), rng.choice(WORDS)
    setup = f"{left} = {literal(first)}; {right} = {literal(second)}"
    return Draft(rng.choice((left, right)), setup)


def _swap(rng: Random) -> Draft:
    left, right = rng.sample(VARIABLES, 2)
    a, b = numbers(rng, 2, 0, 99)
    return Draft(rng.choice((left, right)), f"{left}, {right} = {a}, {b}; {left}, {right} = {right}, {left}")


def _update(rng: Random) -> Draft:
    name = rng.choice(VARIABLES)
    a, b = numbers(rng, 2, 1, 9)
    return Draft(name, f"{name} = {a}; {name} {rng.choice(('+=', '-=', '*='))} {b}")


KINDS = (
    Kind("add_small", "medium", _add_small),
    Kind("subtract_small", "medium", _subtract_small),
    Kind("times_table", "medium", _times_table),
    Kind("add_two_digits", "hard", _add_two_digits),
    Kind("add_three_digits", "hard", _add_three_digits, 0.5),
    Kind("multiply_two_digits", "hard", _multiply_two_digits, 0.5),
    Kind("floor_divide", "hard", _floor_divide, 0.7),
    Kind("chain", "hard", _chain, 0.7),
    Kind("power", "hard", _power, 0.3),
    Kind("absolute", "easy", _absolute, 0.5),
    Kind("compare", "medium", _compare, 1.5),
    Kind("logic", "medium", _logic, 0.7),
    Kind("truthiness", "easy", _truthiness, 0.5),
    Kind("type_name", "easy", _type_name, 1.5),
    Kind("maximum_of_two", "medium", _maximum_of_two),
    Kind("convert", "easy", _convert, 0.7),
    Kind("recall", "medium", _recall),
    Kind("swap", "medium", _swap, 0.7),
    Kind("update", "medium", _update, 0.7),
)
