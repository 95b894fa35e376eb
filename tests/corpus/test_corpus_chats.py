"""Long chats: what is asked for was said before, nothing of the text is lost, and the seed decides everything."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.corpus import Document
from herd.corpus.chats import _MARKS, _READ, chats_of

TEXT = "\n".join(
    f"line {n} speaks of marble, copper and the {'north' if n % 3 else 'south'} window" for n in range(600)
)
TARGET = 6000


@pytest.fixture(scope="module")
def chats() -> list[Document]:
    return list(chats_of(Document(TEXT, "site/page"), TARGET))


def test_every_answer_was_said_before_word_for_word(chats: list[Document]) -> None:
    seen = dict.fromkeys(_MARKS, 0)
    for chat in chats:
        for before, between, answer, after in _MARKS[:6]:  # the others mark nothing to look for
            marks = [re.escape(mark) for mark in (before, between, answer, after)]
            for match in re.finditer(r"(?:^|\n|>){}([^\n]+[?.]){}{}([^\n]+?\.){}".format(*marks), chat.text):
                if match[2] not in _READ:
                    assert f"\n{match[2]}" in chat.text[: match.start(1)], match[0]
                    seen[before, between, answer, after] += 1
    assert sum(seen.values()) > 3 * len(chats) and sum(count > 0 for count in seen.values()) >= 4


def test_facts_come_again_without_a_question(chats: list[Document]) -> None:
    again = 0
    for chat in chats:
        lines = chat.text.split("\n")
        again += sum(lines.count(line) - 1 for line in {line for line in lines if re.search(r" \d{2,8}\.$", line)})
    assert again > len(chats)


def test_the_text_is_all_there_in_order(chats: list[Document]) -> None:
    said = "\n".join(chat.text for chat in chats)
    places = [said.index(line) for line in TEXT.split("\n")]
    assert places == sorted(places)


def test_chats_are_as_long_as_wanted_and_have_names_of_their_own(chats: list[Document]) -> None:
    assert len(chats) > 5
    assert all(0.7 * TARGET < chat.n_bytes < 1.1 * TARGET for chat in chats[:-1])
    assert [chat.url for chat in chats] == [f"site/page#chat{n}" for n in range(1, len(chats) + 1)]


def test_questions_look_back_near_and_far(chats: list[Document]) -> None:
    distances = []
    for chat in chats[:-1]:
        for value in set(re.findall(r" (\d{4,8})\.", chat.text)):
            first, *later = (match.start() for match in re.finditer(rf" {value}\.", chat.text))
            distances += [(place - first) / len(chat.text) for place in later]
    assert min(distances) < 0.1 and max(distances) > 0.8
    assert sum(distance > 0.5 for distance in distances) > len(distances) / 10


def test_the_seed_and_the_url_decide(chats: list[Document]) -> None:
    assert chats == list(chats_of(Document(TEXT, "site/page"), TARGET))
    assert chats != list(chats_of(Document(TEXT, "site/other"), TARGET))
    assert chats != list(chats_of(Document(TEXT, "site/page"), TARGET, seed=1))


@given(st.text(max_size=3000), st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_any_text_ends(text: str, target: int) -> None:
    for chat in chats_of(Document(text, "any"), target):
        assert chat.text.startswith(tuple(before for before, *_ in _MARKS)) and chat.text.endswith("\n")
