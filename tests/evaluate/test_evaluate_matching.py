"""Exact match: who is asked what, and how answers are counted. The model here is a double that knows the answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from herd.align.exercises import Exercise, generate
from herd.errors import UsageError
from herd.evaluate import ci95, exact_match
from herd.evaluate.matching import few_shot_prompt


class Oracle:
    """Answers each known question; `spoil` changes an answer before it is given."""

    def __init__(self, exercises: list[Exercise], spoil: Any = lambda exercise: exercise.answer) -> None:
        self.tokenizer = SimpleNamespace(encode_dialog=self._encode_dialog)
        self.said = {exercise.question: spoil(exercise) for exercise in exercises}
        self.prompts: list[Any] = []
        self.options: list[dict[str, Any]] = []

    @staticmethod
    def _encode_dialog(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> SimpleNamespace:
        assert add_generation_prompt and [message["role"] for message in messages] == ["user"]
        return SimpleNamespace(ids=list(messages[0]["content"].encode()))

    def generate(self, prompts: list[Any], **options: Any) -> list[SimpleNamespace]:
        self.prompts += prompts
        self.options.append(options)
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Any) -> SimpleNamespace:
        text = prompt if isinstance(prompt, str) else bytes(prompt).decode()
        question = text.rpartition("Question: ")[2].removesuffix("\nAnswer:")
        return SimpleNamespace(text=f" {self.said[question]}\n", finish_reason="stop")


@pytest.fixture(scope="module")
def exercises() -> list[Exercise]:
    return generate(3, 600, "heldout")


def test_all_right(exercises: list[Exercise]) -> None:
    model = Oracle(exercises)
    result = exact_match(model, exercises)
    assert result.overall.score == result.macro == 1.0 and result.overall.n == 600
    assert sum(score.n for score in result.by_kind.values()) == 600
    assert set(result.by_difficulty) == {"easy", "medium", "hard"}
    assert [bytes(prompt).decode() for prompt in model.prompts] == [exercise.question for exercise in exercises]
    assert all(options["temperature"] == 0.0 for options in model.options)


def test_wrong_answers_are_counted_where_they_belong(exercises: list[Exercise]) -> None:
    kind = "length_of_list"
    model = Oracle(exercises, lambda one: one.answer + "!" if one.kind == kind else one.answer)
    result = exact_match(model, exercises)
    n_kind = sum(one.kind == kind for one in exercises)
    assert n_kind > 3 and result.by_kind[kind].correct == 0
    assert all(score.score == 1.0 for name, score in result.by_kind.items() if name != kind)
    share = (600 - n_kind) / 600
    assert result.overall.score == pytest.approx(share) and result.overall.ci95 == pytest.approx(ci95(share, 600))
    assert result.macro == pytest.approx(1 - 1 / len(result.by_kind))
    wrong = [answer for answer in result.answers if not answer.correct]
    assert [answer.exercise.kind for answer in wrong] == [kind] * n_kind


def test_a_near_miss_is_a_miss(exercises: list[Exercise]) -> None:
    shouted = Oracle(exercises, lambda one: one.answer.swapcase())
    letters = sum(one.answer != one.answer.swapcase() for one in exercises)
    assert exact_match(shouted, exercises).overall.correct == 600 - letters


def test_few_shot_shows_solved_training_exercises_of_the_same_kind(exercises: list[Exercise]) -> None:
    model = Oracle(exercises)
    result = exact_match(model, exercises, style="few_shot", shots=2)
    assert result.overall.score == 1.0 and result.style == "few_shot"
    heldout = {exercise.question for exercise in exercises}
    for prompt, exercise in zip(model.prompts, exercises, strict=True):
        shown = generate(0, 2, "train", kinds=[exercise.kind])
        assert prompt == few_shot_prompt(shown, exercise.question)
        assert not heldout & {example.question for example in shown}
        assert prompt.count("Question: ") == 3 and prompt.endswith("\nAnswer:")
    assert all("\n\n" in options["stop"] for options in model.options)


def test_wrong_arguments(exercises: list[Exercise]) -> None:
    with pytest.raises(UsageError):
        exact_match(Oracle([]), [])
    with pytest.raises(UsageError, match="chat, few_shot"):
        exact_match(Oracle(exercises), exercises, style="poem")  # type: ignore[arg-type]
