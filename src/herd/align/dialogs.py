"""Exercises as conversations: single questions, several in a row, now and then under a system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from herd.align.exercises import Exercise
from herd.errors import UsageError

if TYPE_CHECKING:
    from herd.tokenizer import Message

Dialog = list["Message"]
SYSTEM_PROMPTS = (
    "You are Herd, a small Llama that answers questions about Python.",
    "You are a helpful assistant.",
    "Answer with the result alone.",
)


def dialogs(exercises: Sequence[Exercise], *, seed: int, max_turns: int, system_share: float) -> list[Dialog]:
    """Every exercise once, in order, in dialogues of 1 to `max_turns` questions; half of them have a single one.

    system_share: this share of the dialogues opens with a system prompt. A pure function of its arguments."""
    if max_turns < 1:
        raise UsageError("max_turns is out of range", value=max_turns, allowed="a whole number from 1")
    rng = Random(f"herd dialogs {seed}")
    result: list[Dialog] = []
    start = 0
    while start < len(exercises):
        turns = 1 if rng.random() < 0.5 else rng.randint(1, max_turns)
        dialog: Dialog = []
        if rng.random() < system_share:
            dialog.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for exercise in exercises[start : start + turns]:
            dialog.append({"role": "user", "content": exercise.question})
            dialog.append({"role": "assistant", "content": exercise.answer})
        result.append(dialog)
        start += turns
    return result
