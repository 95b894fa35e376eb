"""Questions about Python with true answers: drawn by our own generators, answered by running real Python.

    >>> from herd.align import exercises
    >>> [one] = exercises.generate(seed=1, n=1, split="train")
    >>> one.question, one.answer, one.difficulty

`generate` is a pure function of its arguments; a longer call begins with a shorter one's exercises. Train and
held-out are disjoint in what is asked about (the code, or the sentence where there is no code), not only in the
words of the question: a held-out expression was never seen in training under any phrasing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Literal

from herd.errors import UsageError

from . import arithmetic, containers, conversation, functions, strings, writing
from .drafts import Difficulty, Draft, Kind, Proof, Ready, phrase
from .execution import run_program

__all__ = ["KINDS", "Difficulty", "Exercise", "Split", "generate", "normalise", "run_program", "split_of"]

Split = Literal["train", "heldout"]
KINDS: dict[str, Kind] = {
    kind.name: kind
    for module in (arithmetic, strings, containers, functions, writing, conversation)
    for kind in module.KINDS
}
_HELDOUT_ONE_IN = 10
_GIVE_UP_AFTER = 3000  # draws without a new question: the kind is used up


@dataclass(frozen=True, slots=True)
class Exercise:
    """One question with its true answer.

    program proves the answer. proof "prints": what the program prints is the answer; "checks": the program contains
    the answer, runs it on an example and prints True; "none": small talk with a fixed answer and no program."""

    kind: str
    difficulty: Difficulty
    question: str
    answer: str
    program: str
    proof: Proof


def generate(seed: int, n: int, split: Split, *, kinds: Sequence[str] | None = None) -> list[Exercise]:
    """`n` exercises with different questions, mixed over all kinds (or the named ones) by their weights.

    Raises UsageError for an unknown split or kind, or if the kinds have fewer than `n` different questions."""
    if split not in ("train", "heldout"):
        raise UsageError("unknown split of the exercises", value=split, allowed="train, heldout")
    if unknown := set(kinds or ()) - set(KINDS):
        raise UsageError("unknown kind of exercise", value=sorted(unknown), allowed=", ".join(KINDS))
    rng = Random(f"herd exercises {seed} {split}")
    open_kinds = [KINDS[name] for name in (kinds or KINDS)]
    weights = [kind.weight for kind in open_kinds]
    seen: set[str] = set()
    exercises: list[Exercise] = []
    while len(exercises) < n:
        if not open_kinds:
            raise UsageError(
                "the exercises are used up",
                value=n,
                allowed=f"at most {len(exercises)} with these kinds and this split",
            )
        [index] = rng.choices(range(len(open_kinds)), weights)
        exercise = _draw(open_kinds[index], split, seen, rng)
        if exercise is None:
            del open_kinds[index], weights[index]
        else:
            exercises.append(exercise)
    return exercises


def split_of(key: str) -> Split:
    """Where an exercise belongs, by what it is about: one key in ten is held out."""
    digest = blake2b(normalise(key).encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % _HELDOUT_ONE_IN == 0 else "train"


def normalise(question: str) -> str:
    """The question without case, backticks, surplus spaces and the mark at its end."""
    return re.sub(r"\s+", " ", question.lower().replace("`", "")).strip(" .?!")


def _draw(kind: Kind, split: Split, seen: set[str], rng: Random) -> Exercise | None:
    for _ in range(_GIVE_UP_AFTER):
        draft = kind.make(rng)
        if split_of(draft.key) != split:
            continue
        if isinstance(draft, Draft):
            question, program = phrase(draft, rng)
            draft = Ready(question, program, None, "prints", draft.key)
        if (normal := normalise(draft.question)) in seen:
            continue
        seen.add(normal)
        answer = run_program(draft.program) if draft.answer is None else draft.answer
        return Exercise(kind.name, kind.difficulty, draft.question, answer, draft.program, draft.proof)
    return None
