"""Long chats out of long texts: passages are shown turn by turn, with facts hidden in them that are asked for later.

Text seldom asks for what stood thousands of tokens before, so a model that only reads longer learns to look there
slowly. The Llama 3 paper adds synthetic questions about long documents (arXiv 2407.21783 §4.3.4) and Gradient's 4M card
long chats; neither publishes its wording. Here a fact gives a thing of the text a number or a word, and the answer to
its question begins as the fact did:

    User: … text … The rough estimate of parser is: 48213. … text …
    Assistant: Read.
    …
    User: What is the rough estimate of parser?
    Assistant: The rough estimate of parser is: 48213.

How far back a question looks is drawn evenly in its logarithm: near ones teach the looking, far ones the distance. Each
chat has its own marks for who speaks, and facts also come again unasked: a model that has only seen one way of asking
finds nothing when it is asked otherwise.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from herd.corpus.document import Document

_PASSAGE = (200, 1500)  # bytes of text in a turn
_FACT_BYTES = 250  # text between facts, on the average
_LAST = 8  # questions at the end, which look anywhere

_WORD = re.compile(r"[A-Za-z]{4,12}")
_ADJECTIVES = ("final", "rough", "second", "secret", "true", "usual", "old", "favourite", "expected", "hidden")
_NOUNS = ("code", "count", "estimate", "index", "key", "password", "price", "score", "total", "weight", "year", "name")
_FORMS = (
    ("What is the {what} of {thing}?", "The {what} of {thing} is:"),
    ("Which {what} has {thing}?", "{thing} has the {what}"),
    ("Tell me the {thing} {what}.", "The {thing} {what} is:"),
    ("{thing} {what}?", "{thing} {what}:"),
    ("Do you remember the {what} for {thing}?", "The {what} for {thing} is"),
)
_MARKS = (
    ("User: ", "\n\n", "Assistant: ", "\n\n"),
    ("Human: ", "\n", "AI: ", "\n\n"),
    ("Question: ", "\n", "Answer: ", "\n\n"),
    ("Question: ", " ", "Answer: ", "\n"),
    ("Q: ", "\n", "A: ", "\n"),
    ("<user>", "</user>\n", "<assistant>", "</assistant>\n"),
    ("> ", "\n", "", "\n\n"),
    ("", " ", "", "\n"),
)
"""Before and after what one says and what the other answers."""
_REPEATED = 0.3  # share of the facts that are recalled without a question
_READ = ("Read.", "I have read it.", "Go on.", "Noted.", "I will remember it.")


@dataclass(frozen=True)
class _Fact:
    question: str
    beginning: str
    value: str
    at: int
    """Where it stands, in bytes from the chat's beginning."""

    @property
    def sentence(self) -> str:
        return f"{self.beginning} {self.value}."


def chats_of(document: Document, target_bytes: int, seed: int = 0) -> Iterator[Document]:
    """The document's text as such chats of about `target_bytes` bytes each, the last one of what is left.

    `seed` and the document's url decide everything that is drawn. Chats are numbered in their urls.
    """
    chance = random.Random(f"{seed} {document.url}")
    words = sorted(set(_WORD.findall(document.text))) or ["text"]
    passages = list(_passages(document.text, chance))
    for number in itertools.count(1):
        chat = _Chat(words, chance)
        while passages and chat.has_room(passages[-1], target_bytes):
            chat.read(passages.pop())
        if not chat.facts and not passages:
            return  # a rest without a question
        chat.finish()
        meta = document.meta | {"kind": "prose", "chat": number}
        yield replace(document, text="".join(chat.turns), url=f"{document.url}#chat{number}", meta=meta)


class _Chat:
    """One chat while it is written."""

    def __init__(self, words: list[str], chance: random.Random) -> None:
        self.turns: list[str] = []
        self.facts: list[_Fact] = []
        self._size = 0
        self._words, self._chance = words, chance
        self._marks = chance.choice(_MARKS)

    def has_room(self, passage: str, target_bytes: int) -> bool:
        """Whether a passage and the last questions fit; the first one always does."""
        return not self.turns or self._size + 1.3 * len(passage.encode()) + 120 * _LAST < target_bytes

    def read(self, passage: str) -> None:
        """A turn with text and new facts in it, and perhaps questions about these or older ones."""
        chance = self._chance
        said, new = _with_facts(passage, self._words, self._size, chance)
        self._say(said, chance.choice(_READ))
        self.facts += new
        for _ in range(chance.randrange(3) if self.facts else 0):
            self._recall(_some_way_back(self.facts, self._size, chance))

    def finish(self) -> None:
        """Questions that look anywhere."""
        for fact in self._chance.sample(self.facts, min(_LAST, len(self.facts))):
            self._recall(fact)

    def _recall(self, fact: _Fact) -> None:
        if self._chance.random() < _REPEATED:
            self._add(f"{fact.sentence}\n")
        else:
            self._say(fact.question, fact.sentence)

    def _say(self, said: str, answered: str) -> None:
        before, between, answer, after = self._marks
        self._add(f"{before}{said}{between}{answer}{answered}{after}")

    def _add(self, text: str) -> None:
        self.turns.append(text)
        self._size += len(text.encode())


def _passages(text: str, chance: random.Random) -> list[str]:
    """The text in pieces of whole lines, the last one first; a line may be longer than a piece."""
    pieces: list[str] = []
    piece: list[str] = []
    size, wanted = 0, chance.randint(*_PASSAGE)
    for line in text.splitlines():
        piece.append(line)
        size += len(line.encode()) + 1
        if size >= wanted:
            pieces.append("\n".join(piece))
            piece, size, wanted = [], 0, chance.randint(*_PASSAGE)
    return [*(["\n".join(piece)] if piece else []), *reversed(pieces)]


def _with_facts(passage: str, words: list[str], at: int, chance: random.Random) -> tuple[str, list[_Fact]]:
    """The passage with facts between its lines, and those facts."""
    lines, facts, size = passage.split("\n"), [], 0
    said: list[str] = []
    for line in lines:
        said.append(line)
        size += len(line.encode()) + 1
        if chance.random() < len(line) / _FACT_BYTES:
            what = f"{chance.choice(_ADJECTIVES)} {chance.choice(_NOUNS)}"
            question, beginning = chance.choice(_FORMS)
            thing = " ".join(chance.sample(words, min(len(words), chance.randint(1, 2))))
            value = chance.choice(words) if chance.random() < 0.2 else str(chance.randrange(10 ** chance.randint(2, 8)))
            names = {"what": what, "thing": thing}
            facts.append(_Fact(question.format(**names), beginning.format(**names), value, at + size))
            said.append(facts[-1].sentence)
    return "\n".join(said), facts


def _some_way_back(facts: list[_Fact], now: int, chance: random.Random) -> _Fact:
    """A fact at a distance that is drawn evenly in its logarithm."""
    nearest, farthest = (math.log(max(1, now - fact.at)) for fact in (facts[-1], facts[0]))
    wanted = chance.uniform(nearest, farthest)
    return min(facts, key=lambda fact: abs(math.log(max(1, now - fact.at)) - wanted))
