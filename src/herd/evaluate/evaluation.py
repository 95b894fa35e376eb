"""The evaluation of a run: bits per byte next to compressors, exact match before and after tuning, samples.

`run` writes `results.json` and, for people, `results.txt`. Both say how many bytes and exercises stand behind a
figure and give every average its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from herd.align.exercises import Exercise, generate
from herd.config import Config
from herd.errors import UsageError
from herd.evaluate.bits import BitsPerByte, bits_per_byte, first_documents
from herd.evaluate.compression import compressors
from herd.evaluate.matching import ExactMatch, exact_match
from herd.evaluate.statistics import paired
from herd.evaluate.table import results_table
from herd.files import atomic_write, write_json

if TYPE_CHECKING:
    from herd.engine import LLM

VERSION = 1  # of results.json
_SAMPLE_PROMPTS = ("def", "import os\n", "class Stack:\n", "The", "for name in", '"""Return ', "try:\n    ")


class EvaluateConfig(Config):
    """What is measured, and on how much."""

    seed: int = pydantic.Field(default=0, ge=0, description="Seed of the exercises and of the samples.")
    exercises: int = pydantic.Field(default=1000, ge=0, le=100_000, description="Held-out exercises; 0: none.")
    few_shot: bool = pydantic.Field(
        default=True, description="Ask the first of several models in plain text with solved examples as well."
    )
    shots: int = pydantic.Field(default=3, ge=0, le=16, description="Solved examples before a few-shot question.")
    max_tokens: int = pydantic.Field(default=48, ge=1, le=1024, description="Longest answer to an exercise, in tokens.")
    overlap: int | None = pydantic.Field(
        default=None, ge=1, description="Tokens each window of a long document repeats; null: half the context."
    )
    heldout_bytes: int | None = pydantic.Field(
        default=None, ge=1, description="Score only whole documents up to about this many bytes; null: all."
    )
    samples: int = pydantic.Field(
        default=4, ge=0, le=len(_SAMPLE_PROMPTS), description="Sample continuations of each model."
    )
    sample_tokens: int = pydantic.Field(default=64, ge=1, le=4096, description="Length of a sample, in tokens.")
    dialogs: int = pydantic.Field(default=24, ge=0, description="Answered exercises to keep as examples.")


def run(
    config: EvaluateConfig,
    models: Mapping[str, str | Path],
    heldout: Sequence[str],
    out_dir: str | Path,
    **loading: Any,
) -> dict[str, Any]:
    """Evaluate the models and write results.json and results.txt into `out_dir`; returns the data of results.json.

    models: label -> checkpoint, in order of the run ({"base": …, "sft": …}); the first and the last are compared
    question by question. heldout: texts for bits per byte (none: left out). loading: further arguments of `LLM`."""
    from herd.engine import LLM

    if not models:
        raise UsageError("there is no model to evaluate", allowed="at least one")
    documents = first_documents(heldout, config.heldout_bytes)
    exercises = generate(config.seed, config.exercises, "heldout") if config.exercises else []
    results: dict[str, Any] = {"version": VERSION, "config": config.model_dump(), "models": list(models)}
    results["loading"] = loading
    results |= {"bits_per_byte": {}, "compressors": {}, "exact_match": {}, "samples": {}}
    if documents:
        results["compressors"] = {name: asdict(size) for name, size in compressors(documents).items()}
    matches: dict[str, ExactMatch] = {}
    for label, path in models.items():
        with LLM(path, **loading) as llm:
            if documents:
                results["bits_per_byte"][label] = bits_data(bits_per_byte(llm, documents, overlap=config.overlap))
            if exercises:
                matches[label] = exact_match(llm, exercises, max_tokens=config.max_tokens)
                results["exact_match"][label] = match_data(matches[label])
                if config.few_shot and len(models) > 1 and label == next(iter(models)):
                    few = exact_match(
                        llm,
                        exercises,
                        style="few_shot",
                        shots=config.shots,
                        max_tokens=config.max_tokens,
                        seed=config.seed,
                    )
                    results["exact_match"][f"{label}, few-shot"] = match_data(few)
            results["samples"][label] = _samples(llm, config)
    if len(matches) > 1:
        first, last = next(iter(matches)), list(matches)[-1]
        results["comparison"] = {"before": first, "after": last, **_comparison(matches[first], matches[last])}
    results["dialogs"] = _dialogs(exercises, matches, config.dialogs)
    out = Path(out_dir)
    write_json(out / "results.json", results)
    with atomic_write(out / "results.txt", "w") as file:
        file.write(results_table(results) + "\n")
    return results


def bits_data(bits: BitsPerByte) -> dict[str, Any]:
    """A BitsPerByte as JSON data."""
    return {**asdict(bits), "nats_per_token": bits.nats_per_token}


def match_data(match: ExactMatch) -> dict[str, Any]:
    """An ExactMatch as JSON data, without the single answers."""
    return {
        "style": match.style,
        "overall": asdict(match.overall),
        "macro": match.macro,
        "unfinished": sum(not answer.finished for answer in match.answers),
        "by_difficulty": {level: asdict(score) for level, score in match.by_difficulty.items()},
        "by_kind": {
            kind: {
                **asdict(score),
                "difficulty": next(a.exercise.difficulty for a in match.answers if a.exercise.kind == kind),
            }
            for kind, score in match.by_kind.items()
        },
    }


def _comparison(before: ExactMatch, after: ExactMatch) -> dict[str, Any]:
    return asdict(paired([a.correct for a in before.answers], [a.correct for a in after.answers]))


def _samples(llm: LLM, config: EvaluateConfig) -> list[dict[str, str]]:
    prompts = list(_SAMPLE_PROMPTS[: config.samples])
    if not prompts:
        return []
    completions = llm.generate(prompts, max_tokens=config.sample_tokens, temperature=0.6, top_p=0.9, seed=config.seed)
    return [
        {"prompt": prompt, "completion": completion.text}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _dialogs(exercises: Sequence[Exercise], matches: Mapping[str, ExactMatch], count: int) -> list[dict[str, Any]]:
    """The first exercises with every model's answer: not picked by hand, not picked by success."""
    return [
        {
            "kind": exercise.kind,
            "difficulty": exercise.difficulty,
            "question": exercise.question,
            "answer": exercise.answer,
            "said": {label: match.answers[i].said for label, match in matches.items()},
        }
        for i, exercise in enumerate(exercises[:count])
    ]
