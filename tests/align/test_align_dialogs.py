"""Dialogues: every exercise once and in order, and what of them is learnt."""

from __future__ import annotations

import pytest

from herd.align import dialogs
from herd.align.exercises import generate
from herd.errors import UsageError

EXERCISES = generate(4, 600, "train")


def test_every_exercise_once_in_order() -> None:
    made = dialogs(EXERCISES, seed=1, max_turns=4, system_share=0.2)
    spoken = [message for dialog in made for message in dialog if message["role"] != "system"]
    assert [message["role"] for message in spoken] == ["user", "assistant"] * len(EXERCISES)
    assert [message["content"] for message in spoken] == [
        text for exercise in EXERCISES for text in (exercise.question, exercise.answer)
    ]
    turns = [sum(message["role"] == "user" for message in dialog) for dialog in made]
    assert max(turns) == 4 and 0.4 < turns.count(1) / len(turns) < 0.8
    systems = [dialog for dialog in made if dialog[0]["role"] == "system"]
    assert 0.1 < len(systems) / len(made) < 0.3
    assert all(message["role"] != "system" for dialog in made for message in dialog[1:])


def test_single_turns_and_determinism() -> None:
    alone = dialogs(EXERCISES, seed=1, max_turns=1, system_share=0.0)
    assert [len(dialog) for dialog in alone] == [2] * len(EXERCISES)
    one = dialogs(EXERCISES, seed=1, max_turns=3, system_share=0.5)
    assert one == dialogs(EXERCISES, seed=1, max_turns=3, system_share=0.5)
    assert one != dialogs(EXERCISES, seed=2, max_turns=3, system_share=0.5)


def test_no_turns() -> None:
    with pytest.raises(UsageError):
        dialogs(EXERCISES, seed=1, max_turns=0, system_share=0.0)
