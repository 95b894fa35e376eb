"""The words that exercises are made of: short, common, lower case, one meaning each."""

from __future__ import annotations

from random import Random

_WORDS = (
    "red blue green black white gray gold cat dog fox bird fish horse lion bear mouse sun moon star sky rain snow "
    "wind tree leaf apple bread water fire stone river sea book door house road ship king queen name file code data "
    "list test line word time day night hello world python small big fast slow new old hot cold open close read "
    "write start stop left right first last good bad yes no one two three four"
)
_NAMES = "Ada Alan Grace Guido Linus Marie Tim Anna Ben Sara Tom Eva Max Lena Omar Mia Leo Noah Iris Hugo"
_COLLECTIONS = "names values items words numbers data lines results keys rows files parts tokens nodes"
_TEXTS = "text line word name title message path key label value"

WORDS = tuple(_WORDS.split())
NAMES = tuple(_NAMES.split())
VARIABLES = tuple("xyzabcnmik")
COLLECTIONS = tuple(_COLLECTIONS.split())
TEXTS = tuple(_TEXTS.split())


def words(rng: Random, count: int) -> list[str]:
    """`count` different words."""
    return rng.sample(WORDS, count)


def numbers(rng: Random, count: int, low: int, high: int) -> list[int]:
    """`count` integers from low to high, both included; they may repeat."""
    return [rng.randint(low, high) for _ in range(count)]


def distinct(rng: Random, count: int, low: int, high: int) -> list[int]:
    """`count` different integers from low to high, both included."""
    return rng.sample(range(low, high + 1), count)
