"""Exercises about lists, dictionaries, sets, ranges and comprehensions."""

from __future__ import annotations

from random import Random

from .drafts import Draft, Kind, literal, literals
from .words import COLLECTIONS, VARIABLES, WORDS, distinct, numbers, words


def _values(rng: Random, least: int = 2, most: int = 5) -> list[object]:
    """A short list: mostly of numbers, sometimes of words."""
    count = rng.randint(least, most)
    return list(numbers(rng, count, 0, 20)) if rng.random() < 0.7 else list(words(rng, min(count, 4)))


def _first_or_last(rng: Random) -> Draft:
    values = literals(_values(rng))
    index, said = rng.choice(((0, "first"), (-1, "last")))
    if rng.random() < 0.3:
        name = rng.choice(COLLECTIONS)
        return Draft(f"{name}[{index}]", f"{name} = {values}")
    ask = (f"What is the {said} element of {values}?", f"Give me the {said} item of {values}.")
    return Draft(f"{values}[{index}]", spoken=rng.choice(ask))


def _index(rng: Random) -> Draft:
    values = _values(rng, 3, 5)
    return Draft(f"{literals(values)}[{rng.randrange(1, len(values))}]")


def _length(rng: Random) -> Draft:
    values = literals(_values(rng, 0, 6))
    ask = (f"How many items are in {values}?", f"What is the length of {values}?", f"How long is {values}?")
    return Draft(f"len({values})", spoken=rng.choice(ask))


def _append(rng: Random) -> Draft:
    name, values = rng.choice((*VARIABLES, *COLLECTIONS)), numbers(rng, rng.randint(1, 4), 0, 20)
    return Draft(name, f"{name} = {values}; {name}.append({rng.randint(0, 20)})")


def _extend(rng: Random) -> Draft:
    name = rng.choice((*VARIABLES, *COLLECTIONS))
    left, right = numbers(rng, rng.randint(1, 3), 0, 20), numbers(rng, rng.randint(1, 3), 0, 20)
    return Draft(name, f"{name} = {left}; {name}.extend({right})")


def _plus(rng: Random) -> Draft:
    left, right = (literals(numbers(rng, rng.randint(1, 3), 0, 20)) for _ in range(2))
    return Draft(f"{left} + {right}", spoken=f"Put the lists {left} and {right} together.")


def _member(rng: Random) -> Draft:
    values = _values(rng, 2, 4)
    other = rng.choice(WORDS) if values[0] in WORDS else rng.randint(0, 20)
    item, inside = literal(rng.choice((rng.choice(values), other))), literals(values)
    return Draft(f"{item} in {inside}", spoken=f"Is {item} in {inside}? True or False?")


def _largest(rng: Random) -> Draft:
    values = distinct(rng, rng.randint(3, 4), 0, 20)
    function, said = rng.choice((("max", "largest"), ("min", "smallest")))
    return Draft(f"{function}({values})", spoken=f"What is the {said} number in {values}?")


def _total(rng: Random) -> Draft:
    values = numbers(rng, rng.randint(2, 3), 0, 9)
    return Draft(f"sum({values})", spoken=f"Add up {values}.")


def _total_large(rng: Random) -> Draft:
    return Draft(f"sum({numbers(rng, rng.randint(3, 5), 5, 60)})")


def _sort_three(rng: Random) -> Draft:
    values = distinct(rng, 3, 0, 20)
    return Draft(f"sorted({values})", spoken=f"Sort {values}.")


def _sort_many(rng: Random) -> Draft:
    return Draft(f"sorted({distinct(rng, rng.randint(5, 6), 0, 99)}{rng.choice(('', ', reverse=True'))})")


def _reverse(rng: Random) -> Draft:
    values = literals(_values(rng, 2, 4))
    if rng.random() < 0.3:
        return Draft(f"list(reversed({values}))")
    return Draft(f"{values}[::-1]", spoken=f"Reverse {values}.")


def _slice(rng: Random) -> Draft:
    values = literals(numbers(rng, rng.randint(4, 5), 0, 20))
    if rng.random() < 0.5:
        count = rng.randint(2, 3)
        return Draft(f"{values}[:{count}]", spoken=f"What are the first {count} elements of {values}?")
    start = rng.randint(1, 2)
    return Draft(f"{values}[{start}:{rng.choice(('', start + 1, start + 2))}]")


def _count_item(rng: Random) -> Draft:
    one, other, third = distinct(rng, 3, 0, 9)
    values = [one] * rng.randint(0, 3) + [other] * rng.randint(1, 2) + [third]
    rng.shuffle(values)
    return Draft(f"{values}.count({one})", spoken=f"How many times does {one} appear in {values}?")


def _position(rng: Random) -> Draft:
    values = _values(rng, 3, 4)
    return Draft(f"{literals(values)}.index({literal(rng.choice(values))})")


def _unique(rng: Random) -> Draft:
    values = numbers(rng, rng.randint(2, 5), 0, 4)
    return Draft(f"len(set({values}))", spoken=f"How many different numbers are in {values}?")


def _range(rng: Random) -> Draft:
    start, count, step = rng.randint(0, 15), rng.randint(2, 6), rng.choice((1, 1, 1, 2, 3))
    if start and step == 1:
        return Draft(f"list(range({start}, {start + count}))")
    if step == 1:
        return Draft(f"list(range({count + rng.randint(0, 4)}))")
    return Draft(f"list(range({start}, {start + step * count}, {step}))")


def _comprehension(rng: Random) -> Draft:
    name, values = rng.choice(VARIABLES), numbers(rng, rng.randint(2, 4), 0, 9)
    return Draft(f"[{name} {rng.choice('+*')} {rng.randint(1, 3)} for {name} in {values}]")


def _comprehension_if(rng: Random) -> Draft:
    name, values = rng.choice(VARIABLES), distinct(rng, rng.randint(3, 5), 0, 20)
    test = rng.choice((f"{name} > {rng.randint(3, 15)}", f"{name} < {rng.randint(5, 17)}", f"{name} % 2 == 0"))
    return Draft(f"[{name} for {name} in {values} if {test}]")


def _comprehension_words(rng: Random) -> Draft:
    name = rng.choice(VARIABLES)
    body = rng.choice((f"{name}.upper()", f"len({name})", f"{name}[0]"))
    return Draft(f"[{body} for {name} in {literals(words(rng, rng.randint(2, 3)))}]")


def _look_up(rng: Random) -> Draft:
    keys = words(rng, rng.randint(2, 3))
    pairs = dict(zip(keys, numbers(rng, len(keys), 0, 99), strict=True))
    body, key = "{" + ", ".join(f'"{k}": {v}' for k, v in pairs.items()) + "}", rng.choice(keys)
    if rng.random() < 0.3:
        return Draft(f'd["{key}"]', f"d = {body}")
    return Draft(f'{body}["{key}"]', spoken=f'In `{body}`, what is the value of "{key}"?')


def _look_up_default(rng: Random) -> Draft:
    key, other = words(rng, 2)
    asked = key if rng.random() < 0.5 else other
    return Draft(f'{{"{key}": {rng.randint(1, 20)}}}.get("{asked}", {rng.choice((0, -1))})')


def _dict_parts(rng: Random) -> Draft:
    keys = words(rng, rng.randint(1, 3))
    body = "{" + ", ".join(f'"{k}": {rng.randint(0, 20)}' for k in keys) + "}"
    return Draft(rng.choice((f"list({body})", f"list({body}.values())", f"len({body})")))


def _enumerate(rng: Random) -> Draft:
    return Draft(f"list(enumerate({literals(words(rng, rng.randint(2, 3)))}))")


def _zip(rng: Random) -> Draft:
    return Draft(f"list(zip({literals(numbers(rng, 2, 0, 20))}, {literals(words(rng, 2))}))")


KINDS = (
    Kind("first_or_last", "easy", _first_or_last, 1.5),
    Kind("index", "easy", _index),
    Kind("length_of_list", "easy", _length, 1.5),
    Kind("append", "easy", _append),
    Kind("extend", "easy", _extend),
    Kind("plus_lists", "easy", _plus),
    Kind("member", "medium", _member),
    Kind("largest", "medium", _largest),
    Kind("total", "hard", _total),
    Kind("total_large", "hard", _total_large, 0.3),
    Kind("sort_three", "medium", _sort_three),
    Kind("sort_many", "hard", _sort_many, 0.5),
    Kind("reverse_list", "easy", _reverse),
    Kind("slice_list", "medium", _slice),
    Kind("count_item", "medium", _count_item),
    Kind("position", "medium", _position, 0.7),
    Kind("unique", "hard", _unique, 0.5),
    Kind("range", "medium", _range),
    Kind("comprehension", "medium", _comprehension, 0.7),
    Kind("comprehension_if", "hard", _comprehension_if, 0.7),
    Kind("comprehension_words", "medium", _comprehension_words, 0.7),
    Kind("look_up", "medium", _look_up),
    Kind("look_up_default", "medium", _look_up_default, 0.7),
    Kind("dict_parts", "easy", _dict_parts, 0.7),
    Kind("enumerate", "easy", _enumerate, 0.7),
    Kind("zip", "easy", _zip, 0.5),
)
