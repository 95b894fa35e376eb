"""What fine-tuning learns from: ids, masks and packed rows, through the real tokenizer and packing."""

from __future__ import annotations

import numpy as np
import pytest

from herd.align import dialogs
from herd.align.examples import encode, rehearse
from herd.align.exercises import generate
from herd.corpus import pack_examples
from herd.tokenizer import Tokenizer, train

EXERCISES = generate(7, 400, "train")
DIALOGS = dialogs(EXERCISES, seed=3, max_turns=4, system_share=0.2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"{one.question} {one.answer}" for one in EXERCISES], 700)


def test_answers_and_their_ends_are_learnt_and_nothing_else(tokenizer: Tokenizer) -> None:
    end = tokenizer.specials["<|eot_id|>"]
    for dialog in DIALOGS:
        ids, supervised = encode(tokenizer, dialog)
        answers = [message["content"] for message in dialog if message["role"] == "assistant"]
        assert ids.count(tokenizer.bos_id) == 1
        assert sum(mask for i, mask in zip(ids, supervised, strict=True) if i == end) == len(answers)
        learnt = [i for i, mask in zip(ids, supervised, strict=True) if mask]
        assert learnt == [i for answer in answers for i in [*tokenizer.encode(answer), end]]


def test_packed_targets_are_the_answers(tokenizer: Tokenizer) -> None:
    """Weighted targets of one epoch, decoded, are all answers once; the token before each is its input."""
    spoken = [encode(tokenizer, dialog) for dialog in DIALOGS]
    rows = pack_examples(spoken, 256, 4, 5, pad_id=tokenizer.pad_id)
    end, learnt = tokenizer.specials["<|eot_id|>"], []
    for first in range(rows.rows_per_epoch):
        tokens, targets, documents, weights = (array[0] for array in rows.rows(first, 1))
        assert set(np.unique(weights)) <= {0.0, 1.0}
        inside = (documents[1:] == documents[:-1]) & (tokens[1:] != tokenizer.pad_id)
        assert (tokens[1:][inside] == targets[:-1][inside]).all()
        learnt += targets[weights > 0].tolist()
    text = [tokenizer.decode(part) for part in _split(learnt, end)]
    assert sorted(text) == sorted(one.answer for one in EXERCISES)


def _split(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    assert parts.pop() == []
    return parts


def test_rehearsal_takes_its_share(tokenizer: Tokenizer) -> None:
    spoken = [encode(tokenizer, dialog) for dialog in DIALOGS]
    texts = [f"number {i} is {i * i}\n" * 30 for i in range(60)]
    total = sum(len(ids) for ids, _ in spoken)
    pieces = rehearse(tokenizer, texts, spoken, 0.2, 64, 1)
    tokens = sum(len(ids) for ids, _ in pieces)
    assert pytest.approx(tokens / (tokens + total), abs=0.01) == 0.2
    assert max(len(ids) for ids, _ in pieces) == 65 and all(all(mask) for _, mask in pieces)
    assert pieces == rehearse(tokenizer, texts, spoken, 0.2, 64, 1) != rehearse(tokenizer, texts, spoken, 0.2, 64, 2)


def test_rehearsal_predicts_every_token_of_a_document_once(tokenizer: Tokenizer) -> None:
    text = "abc def ghi " * 50
    pieces = rehearse(tokenizer, [text], [([0] * 10_000, [True] * 10_000)], 0.5, 32, 0)
    predicted = [i for ids, _ in pieces for i in ids[1:]]
    assert predicted == tokenizer.encode_document(text)[1:]
    assert [ids[0] == tokenizer.bos_id for ids, _ in pieces] == [True] + [False] * (len(pieces) - 1)


def test_no_rehearsal(tokenizer: Tokenizer) -> None:
    spoken = [encode(tokenizer, DIALOGS[0])]
    assert rehearse(tokenizer, [], spoken, 0.3, 64, 0) == rehearse(tokenizer, ["a"], spoken, 0.0, 64, 0) == []
