"""Exercises about strings."""

from __future__ import annotations

from random import Random

from .drafts import Draft, Kind, literals
from .words import NAMES, WORDS, words


def _text(rng: Random, least: int = 1, most: int = 3) -> str:
    return " ".join(words(rng, rng.randint(least, most)))


def _upper(rng: Random) -> Draft:
    text = _text(rng)
    spoken = rng.choice((f'Write "{text}" in upper case.', f'What is "{text}" in capitals?', f'Upper-case "{text}".'))
    return Draft(f'"{text}".upper()', spoken=spoken)


def _lower(rng: Random) -> Draft:
    text = _text(rng).upper()
    ask = (f'Write "{text}" in lower case.', f'What is "{text}" in small letters?', f'Lower-case "{text}".')
    return Draft(f'"{text}".lower()', spoken=rng.choice(ask))


def _capitalise(rng: Random) -> Draft:
    return Draft(f'"{_text(rng, 1, 2)}".{rng.choice(("capitalize", "title"))}()')


def _join_with_space(rng: Random) -> Draft:
    a, b = words(rng, 2)
    return Draft(rng.choice((f'"{a}" + " " + "{b}"', f'"{a} " + "{b}"')))


def _glue(rng: Random) -> Draft:
    a, b = words(rng, 2)
    return Draft(f'"{a}" + "{b}"', spoken=f'What do you get if you glue "{a}" and "{b}" together?')


def _join(rng: Random) -> Draft:
    between = rng.choice((" ", ", ", "-"))
    return Draft(f'"{between}".join({literals(words(rng, rng.randint(2, 4)))})')


def _split(rng: Random) -> Draft:
    parts = words(rng, rng.randint(2, 4))
    if rng.random() < 0.5:
        return Draft(f'"{" ".join(parts)}".split()', spoken=f'Split "{" ".join(parts)}" at the spaces.')
    return Draft(f'"{",".join(parts)}".split(",")', spoken=f'Split "{",".join(parts)}" at the commas.')


def _strip(rng: Random) -> Draft:
    text = _text(rng, 1, 2)
    return Draft(f'"{" " * rng.randint(0, 2)}{text}{" " * rng.randint(1, 2)}".strip()')


def _replace_word(rng: Random) -> Draft:
    *text, new = words(rng, rng.randint(3, 4))
    old, line = rng.choice(text), " ".join(text)
    return Draft(f'"{line}".replace("{old}", "{new}")', spoken=f'In "{line}", change "{old}" to "{new}".')


def _contains_word(rng: Random) -> Draft:
    text = words(rng, rng.randint(2, 4))
    word = rng.choice(text) if rng.random() < 0.5 else rng.choice(WORDS)
    return Draft(f'"{word}" in "{" ".join(text)}"')


def _starts_with(rng: Random) -> Draft:
    text = words(rng, rng.randint(2, 3))
    method, place = rng.choice((("startswith", 0), ("endswith", -1)))
    word = text[place] if rng.random() < 0.5 else rng.choice([other for other in text if other != text[place]])
    return Draft(f'"{" ".join(text)}".{method}("{word}")')


def _count_word(rng: Random) -> Draft:
    one, other = words(rng, 2)
    parts = [one] * rng.randint(1, 3) + [other] * rng.randint(1, 2)
    rng.shuffle(parts)
    text = " ".join(parts)
    return Draft(f'"{text}".split().count("{one}")', spoken=f'How many times is "{one}" in "{text}"?')


def _length(rng: Random) -> Draft:
    text = _text(rng, 1, 2)
    return Draft(f'len("{text}")', spoken=f'How many characters are in "{text}"?')


def _word_count(rng: Random) -> Draft:
    text = _text(rng, 1, 5)
    return Draft(f'len("{text}".split())', spoken=f'How many words are in "{text}"?')


def _first_letter(rng: Random) -> Draft:
    text = _text(rng, 1, 2)
    if rng.random() < 0.6:
        return Draft(f'"{text}"[0]', spoken=f'What is the first letter of "{text}"?')
    return Draft(f'"{text}"[-1]', spoken=f'What is the last letter of "{text}"?')


def _slice(rng: Random) -> Draft:
    cut = rng.choice((f":{rng.randint(1, 4)}", f"{rng.randint(1, 3)}:", f"-{rng.randint(1, 3)}:"))
    return Draft(f'"{_text(rng, 1, 2)}"[{cut}]')


def _reverse(rng: Random) -> Draft:
    word = rng.choice(WORDS) if rng.random() < 0.5 else _text(rng, 2, 2)
    return Draft(f'"{word}"[::-1]', spoken=f'Spell "{word}" backwards.')


def _count_letter(rng: Random) -> Draft:
    text = _text(rng, 1, 2)
    letter = rng.choice([c for c in text if c != " "])
    return Draft(f'"{text}".count("{letter}")', spoken=f'How many times does "{letter}" occur in "{text}"?')


def _find(rng: Random) -> Draft:
    text = _text(rng, 1, 2)
    letter = rng.choice([c for c in text if c != " "])
    return Draft(f'"{text}".find("{letter}")')


def _repeat(rng: Random) -> Draft:
    times = rng.randint(2, 4)
    if rng.random() < 0.5:
        return Draft(f'"{rng.choice("abcdexyz-=*.#")}" * {times + 1}')
    return Draft(f'["{rng.choice(WORDS)}"] * {times}')


def _is_digit(rng: Random) -> Draft:
    text = rng.choice((str(rng.randint(0, 999)), rng.choice(WORDS), rng.choice(WORDS).upper(), _text(rng, 2, 2)))
    return Draft(f'"{text}".{rng.choice(("isdigit", "isupper", "islower", "isalpha"))}()')


def _format(rng: Random) -> Draft:
    name, number, word = rng.choice(NAMES), rng.randint(1, 99), rng.choice(WORDS)
    setup, expression = rng.choice(
        (
            (f'name = "{name}"', 'f"Hello, {name}!"'),
            (f'name = "{name}"', 'f"My name is {name}."'),
            (f"n = {number}", 'f"n is {n}"'),
            (f'word = "{word}"; n = {number}', 'f"{n} {word}"'),
            (f'word = "{word}"; n = {number}', 'f"{word}={n}"'),
            (f'name = "{name}"; age = {number}', 'f"{name} is {age}"'),
        )
    )
    return Draft(expression, setup)


def _format_sum(rng: Random) -> Draft:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return Draft('f"{a} + {b} = {a + b}"', f"a = {a}; b = {b}")


KINDS = (
    Kind("upper", "easy", _upper, 1.5),
    Kind("lower", "easy", _lower, 1.5),
    Kind("capitalise", "medium", _capitalise),
    Kind("join_with_space", "easy", _join_with_space),
    Kind("glue", "hard", _glue, 0.5),
    Kind("join", "easy", _join),
    Kind("split", "easy", _split),
    Kind("strip", "easy", _strip, 0.7),
    Kind("replace_word", "medium", _replace_word),
    Kind("contains_word", "medium", _contains_word),
    Kind("starts_with", "medium", _starts_with),
    Kind("count_word", "medium", _count_word, 0.7),
    Kind("length_of_text", "hard", _length, 0.7),
    Kind("word_count", "medium", _word_count),
    Kind("first_letter", "medium", _first_letter),
    Kind("slice_text", "hard", _slice, 0.5),
    Kind("reverse_text", "hard", _reverse, 0.5),
    Kind("count_letter", "hard", _count_letter, 0.5),
    Kind("find_letter", "hard", _find, 0.5),
    Kind("repeat", "medium", _repeat, 0.5),
    Kind("is_digit", "medium", _is_digit, 0.7),
    Kind("format", "easy", _format),
    Kind("format_sum", "medium", _format_sum, 0.5),
)
