"""Long chats: what is asked for was said before, nothing of the text is lost, and the seed decides everything."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.corpus import Document
from herd.corpus.chats import chats_of

TEXT = "\n".join(
    f"line {n} speaks of marble, copper and the {'north' if n % 3 else 'south'} window" for n in range(600)
)
TARGET = 6000


@pytest.fixture(scope="module")
def chats() -> list[Document]:
    return list(chats_of(Document(TEXT, "site/page"), TARGET))


def test_every_answer_was_said_before_word_for_word(chats: list[Document]) -> None:
    for chat in chats:
        turns = re.findall(r"(?:^|\n\n)(User|Assistant): (.*?)(?=\n\n(?:User|Assistant): |\n\n$)", chat.text, re.DOTALL)
        assert [who for who, _ in turns] == ["User", "Assistant"] * (len(turns) // 2)
        asked = 0
        for number in range(1, len(turns), 2):
            answer = turns[number][1]
            if turns[number - 1][1].endswith("?") or turns[number - 1][1].startswith("Tell me"):
                before = "".join(text for _, text in turns[: number - 1])
                assert f"\n{answer}" in before
                asked += 1
        assert asked >= 8


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
        for match in re.finditer(r"\n\nAssistant: (\S.*\.)\n\n", chat.text):
            first = chat.text.find("\n" + match[1])
            if 0 <= first < match.start(1):
                distances.append((match.start(1) - first) / len(chat.text))
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
        assert chat.text.startswith("User: ") and chat.text.endswith("\n\n")
