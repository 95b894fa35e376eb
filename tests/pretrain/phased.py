"""A run of three phases that are judged, and numbers to find in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from herd import tokenizer
from herd.config import parse_config
from herd.pretrain import PretrainConfig
from herd.pretrain.config import Criteria
from herd.pretrain.promoting import Promote
from tests.pretrain.little import LOOP, functions

TRAIN = LOOP | {"steps": 8, "batch_size": 8, "lr": 1e-4, "schedule": "constant", "warmup": 0, "log_every": 1}


def phased(short: Path, **train: Any) -> PretrainConfig:
    """Three phases: 3 steps of 32 tokens, 3 of 64, 2 of 128; the last step anneals."""
    later = [
        {"from_tokens": 3 * 256, "seq_len": 64, "batch_size": 4},
        {"from_tokens": 6 * 256, "seq_len": 128, "batch_size": 2},
    ]
    data = {"init_from": str(short), "phases": later, "evaluations": 0, "train": TRAIN | {"anneal": 1} | train}
    return parse_config(PretrainConfig, data, "here")


class Hidden:
    """Answers that text like this gives away, most of them surely, and one that nothing does."""

    def __init__(self, words: tokenizer.Tokenizer) -> None:
        self.words = words
        self.asked: list[int] = []

    def __call__(self, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        self.asked.append(length)
        ids = [self.words.bos_id, *self.words.encode(functions(17, 12))][:length]
        for end in range(length // 2, length, max(1, length // 12)):
            yield ids[:end], ids[end : end + 1]
        yield ids[: length // 2], ids[length // 2 :]
        yield ids[:-2], [5, 7]


def asking(words: tokenizer.Tokenizer, *, tolerance: float | None = 1.0, needles: float = 0, **more: Any) -> Promote:
    """What is asked of each phase; `hidden.asked` has the lengths of the phases whose needles were looked for."""
    return Promote(Criteria(tolerance=tolerance, needles=needles), Hidden(words), **more)


def account(out: Path) -> dict[str, Any]:
    """promotion.json."""
    found: dict[str, Any] = json.loads((out / "promotion.json").read_text())
    return found


def promoted(out: Path) -> list[tuple[int, int]]:
    """(step, context) of each phase that was promoted."""
    return [(one["step"], one["context"]) for one in account(out)["judged"]]


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
