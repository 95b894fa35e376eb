"""Exact match: the share of exercises whose answer the model gives to the letter, greedily decoded.

Two ways to ask. "chat": the question as a user's turn in the model's own chat format; what an aligned model is for.
"few_shot": plain text with solved examples of the same kind in front; the fair question to a base model, which has
never seen a chat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from herd.align.exercises import KINDS, Exercise, generate
from herd.errors import UsageError
from herd.evaluate.statistics import Proportion, proportion
from herd.evaluate.table import LEVELS
from herd.progress import track

if TYPE_CHECKING:
    from herd.engine import LLM
    from herd.tokenizer import Tokenizer

Style = Literal["chat", "few_shot"]
_GROUP = 256  # prompts given to the model at once


@dataclass(frozen=True, slots=True)
class Answered:
    """An exercise with what the model said. finished: it ended by itself, not at the length limit."""

    exercise: Exercise
    said: str
    finished: bool

    @property
    def correct(self) -> bool:
        """Equal to the letter, apart from white space around it."""
        return self.said == self.exercise.answer.strip()


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """Scores over all exercises, by difficulty and by kind, and every answer in the exercises' order."""

    style: Style
    overall: Proportion
    by_difficulty: Mapping[str, Proportion]
    by_kind: Mapping[str, Proportion]
    answers: tuple[Answered, ...]

    @property
    def macro(self) -> float:
        """Mean of the kinds' scores: every kind counts the same, however many exercises it has."""
        return sum(score.score for score in self.by_kind.values()) / len(self.by_kind)


def exact_match(
    model: LLM,
    exercises: Sequence[Exercise],
    *,
    style: Style = "chat",
    shots: int = 3,
    max_tokens: int = 48,
    seed: int = 0,
) -> ExactMatch:
    """Ask every exercise once, greedily, and compare.

    shots: solved training exercises before each question in the style "few_shot"; `seed` draws them.
    Raises UsageError for no exercises or an unknown style, ContextLengthExceeded if a prompt does not fit."""
    if not exercises:
        raise UsageError("there are no exercises to answer", allowed="at least one")
    if style == "chat":
        prompts: list[str] | list[list[int]] = [
            chat_prompt(model.tokenizer, exercise.question) for exercise in exercises
        ]
        stop: list[str] = []
    elif style == "few_shot":
        examples = _examples(exercises, shots, seed)
        prompts = [few_shot_prompt(examples[exercise.kind], exercise.question) for exercise in exercises]
        stop = ["\n\n", "\nQuestion:"]
    else:
        raise UsageError("unknown style of asking", value=style, allowed="chat, few_shot")
    answers: list[Answered] = []
    groups = [prompts[start : start + _GROUP] for start in range(0, len(prompts), _GROUP)]
    for group in track(groups, label=f"exact match ({style})"):
        for completion in model.generate(group, max_tokens=max_tokens, temperature=0.0, stop=stop or None):
            exercise = exercises[len(answers)]
            answers.append(Answered(exercise, completion.text.strip(), completion.finish_reason == "stop"))
    return ExactMatch(
        style,
        _score(answers),
        {level: _score(part) for level in LEVELS if (part := _of(answers, difficulty=level))},
        {kind: _score(part) for kind in KINDS if (part := _of(answers, kind=kind))},
        tuple(answers),
    )


def chat_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Token ids of a dialogue up to where the assistant begins its answer."""
    return list(tokenizer.encode_dialog([{"role": "user", "content": question}], add_generation_prompt=True).ids)


def few_shot_prompt(examples: Iterable[Exercise], question: str) -> str:
    """Solved examples, then the question, as plain text."""
    solved = "".join(f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples)
    return f"{solved}Question: {question}\nAnswer:"


def _examples(exercises: Sequence[Exercise], shots: int, seed: int) -> dict[str, list[Exercise]]:
    kinds = {exercise.kind for exercise in exercises}
    return {kind: generate(seed, shots, "train", kinds=[kind]) for kind in kinds}


def _of(answers: Sequence[Answered], *, kind: str | None = None, difficulty: str | None = None) -> list[Answered]:
    return [
        answer
        for answer in answers
        if kind in (None, answer.exercise.kind) and difficulty in (None, answer.exercise.difficulty)
    ]


def _score(answers: Sequence[Answered]) -> Proportion:
    return proportion(sum(answer.correct for answer in answers), len(answers))
