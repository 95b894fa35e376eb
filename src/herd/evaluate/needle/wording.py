"""The words of a needle test, which are EasyContext's (eval_needle.py), and what they become as tokens.

    This is a very long story book: <book> … \nThe special magic Singapore number is: 1234567.\n … </book>.
     Based on the content of the book, Question: What is the special magic Singapore number? Answer: The special magic
    Singapore number is:

Everything is content: no text of a haystack, and none of these words, becomes a control token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

PREFIX = "This is a very long story book: <book>"
CITIES = (
    "Singapore", "New York", "London", "Paris", "Tokyo", "Beijing", "Berlin", "Nairobi", "Lima", "Oslo", "Cairo",
    "Sydney", "Toronto", "Mumbai", "Athens", "Lisbon",
)  # fmt: skip
"""Singapore's number is the one asked for; the next six are EasyContext's distractors."""


def needle_text(city: str, number: int) -> str:
    """The sentence that hides a number."""
    return f"\nThe special magic {city} number is: {number}.\n"


def question_text(cities: Sequence[str]) -> str:
    """What follows the haystack, up to where the answer begins."""
    if len(cities) == 1:
        asked, begun = f"What is the special magic {cities[0]} number?", f"The special magic {cities[0]} number is:"
    else:
        names = f"{', '.join(cities[:-1])} and {cities[-1]}"
        asked, begun = f"What are the special magic {names} numbers?", f"The special magic {names} numbers are:"
    return f"</book>.\n Based on the content of the book, Question: {asked} Answer: {begun}"


def question_ids(tokenizer: Tokenizer, cities: Sequence[str]) -> list[int]:
    """The question's tokens. With one number asked for, they end where its digits begin.

    SentencePiece (Llama 1, 2) puts a space before every text, so that the answer brings its own; to the others
    (Llama 3) the space before a number is a token by itself, and ends the question.
    """
    text = question_text(cities)
    if len(cities) == 1 and not tokenizer.token_bytes(tokenizer.encode("1")[0]).startswith(b" "):
        text += " "
    return tokenizer.encode(text)


def answer_ids(tokenizer: Tokenizer, number: int) -> list[int]:
    """A number's tokens as they follow the question."""
    return tokenizer.encode(str(number))


def answer_room(tokenizer: Tokenizer, asked: int, digits: int) -> int:
    """Tokens that an answer may take, whatever the numbers: a digit has one at most, and a space may come before."""
    number = digits + 1
    if asked == 1:
        return number
    # Room to repeat the sentence for each, as a model may do that has just read it.
    longest = max(CITIES, key=len)
    return asked * (len(tokenizer.encode(f"\nThe special magic {longest} number is:")) + number + 2)


def period_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that are a full stop, alone or after a space: of Llama 2 they are 29889 and 869 (and the byte's own)."""
    control = set(tokenizer.specials.values())
    stops = (b".", b" .")
    return frozenset(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in stops and i not in control)
