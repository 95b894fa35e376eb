"""Phases that are promoted, or not: against windows and answers read one by one, and on ranks that share the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from herd import checkpoint, tokenizer
from herd import model as models
from herd.architecture import LlamaConfig
from herd.config import parse_config
from herd.corpus import Document, TokenShards, read_documents
from herd.corpus.document import write_documents
from herd.errors import HerdError, UsageError
from herd.pretrain import PretrainConfig, run
from herd.pretrain.config import Criteria
from herd.pretrain.promoting import Promote
from herd.pretrain.promotion import criteria
from herd.pretrain.source import PhasedSource
from herd.recipe.needle_grid import PromoteConfig
from herd.recipe.stages import BaseConfig
from herd.train import TrainConfig
from herd.train.callbacks import Verdict
from tests.pretrain.by_hand import bits_per_byte
from tests.train.parallel.launch import launch

TRAIN = {
    "steps": 8, "seq_len": 32, "batch_size": 8, "lr": 1e-4, "schedule": "constant", "warmup": 0, "compile": "off",
    "checkpoint_seconds": 0, "log_every": 1, "precision": "fp32",
}  # fmt: skip


LONG = TrainConfig(seq_len=400, batch_size=2)


def _text(n: int) -> str:
    return "\n".join(f"def add_{n}_{i}(a):\n    return a + {i}\n" for i in range(12))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "train.jsonl", [Document(_text(n), f"lib{n % 5}/{n}.py") for n in range(60)])
    write_documents(folder / "heldout.jsonl", [Document(_text(n), f"heldout/{n}") for n in range(200, 206)])
    return folder


@pytest.fixture(scope="module")
def words(corpus: Path) -> tokenizer.Tokenizer:
    return tokenizer.train([document.text for document in read_documents(corpus / "train.jsonl")], 300, n_specials=16)


@pytest.fixture(scope="module")
def shape(words: tokenizer.Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=words.vocab_size,
        context_length=128, rope_theta=1e4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def short(
    corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A little model that has learnt rows of 32 tokens."""
    out = tmp_path_factory.mktemp("short")
    train = TRAIN | {"steps": 80, "batch_size": 16, "lr": 0.01}
    run(PretrainConfig.model_validate({"evaluations": 0, "train": train}), shape, corpus, words, out)
    return out / "checkpoint"


def _config(short: Path, **train: Any) -> PretrainConfig:
    """Three phases: 3 steps of 32 tokens, 3 of 64, 2 of 128; the last step anneals."""
    later = [
        {"from_tokens": 3 * 256, "seq_len": 64, "batch_size": 4},
        {"from_tokens": 6 * 256, "seq_len": 128, "batch_size": 2},
    ]
    data = {"init_from": str(short), "phases": later, "evaluations": 0, "train": TRAIN | {"anneal": 1} | train}
    return parse_config(PretrainConfig, data, "here")


class Hidden:
    """Answers that text like this gives away, and one that nothing does."""

    def __init__(self, words: tokenizer.Tokenizer) -> None:
        self.words = words
        self.asked: list[int] = []

    def __call__(self, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        self.asked.append(length)
        ids = [self.words.bos_id, *self.words.encode(_text(17))][:length]
        for answer in (1, 3, length // 2):
            yield ids[:-answer], ids[-answer:]
        yield ids[:-2], [5, 7]


def _shares(path: Path, words: tokenizer.Tokenizer, length: int) -> list[float]:
    """The probability of each answer, by hand."""
    llama, found = models.load(path, dtype=torch.float32), []
    for prompt, answer in Hidden(words)(length):
        ids = torch.tensor([*prompt, *answer])
        with torch.no_grad():
            chances = llama(ids[None, :-1])[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        found.append(chances[at, ids[at + 1]].sum().exp().item())
    return found


def test_each_phase_is_judged_where_it_ends(
    short: Path, corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    config = _config(short).model_copy(update={"export_every": 1})
    hidden = Hidden(words)
    asked = Promote(Criteria(tolerance=0.5, needles=0.25), hidden, short=16)
    run(config, shape, corpus, words, tmp_path, promote=asked)
    account = json.loads((tmp_path / "promotion.json").read_text())
    assert hidden.asked == [32, 64, 128]
    assert [(one["step"], one["context"]) for one in account["judged"]] == [(3, 32), (6, 64), (7, 128)]
    probe = TokenShards(tmp_path / "tokens" / "probe")
    assert account["short_before"] == pytest.approx(bits_per_byte(short, probe, 16), rel=1e-4)
    for one in account["judged"]:
        then = tmp_path / "exports" / f"step-{one['step']:08d}"
        assert one["short"] == pytest.approx(bits_per_byte(then, probe, 16), rel=1e-4)
        shares = _shares(then, words, one["context"])
        assert min(abs(share - 0.5) for share in shares) > 0.01, "none is so near that rounding decides"
        assert one["needles"] == sum(share > 0.5 for share in shares) / 4
        assert all(criterion["met"] for criterion in one["criteria"])
    assert {one["needles"] for one in account["judged"]} & {0.25, 0.5}, "some are found, and the last is not"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["promoted"]) for line in lines if "promoted" in line] == [(3, 32), (6, 64), (7, 128)]


def test_what_a_change_of_rope_costs_is_not_forgiven(
    short: Path, corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    """Short text is compared with the model that the run begins with, as that reads it."""
    turned = dataclasses.replace(shape, rope_theta=10.0)
    with pytest.raises(HerdError, match="is not promoted at step 3: bits per byte of short text"):
        run(_config(short), turned, corpus, words, tmp_path, promote=Promote(Criteria(needles=0), Hidden(words)))
    account = json.loads((tmp_path / "promotion.json").read_text())
    probe = TokenShards(tmp_path / "tokens" / "probe")
    assert account["short_before"] == pytest.approx(bits_per_byte(short, probe, 32), rel=1e-4)
    assert account["failed"]["short"] == pytest.approx(bits_per_byte(tmp_path / "unpromoted", probe, 32), rel=1e-4)
    assert account["failed"]["short"] > 1.02 * account["short_before"]


def test_a_phase_that_is_not_ready_ends_the_run_which_goes_on_when_less_is_asked(
    short: Path,
    corpus: Path,
    words: tokenizer.Tokenizer,
    shape: LlamaConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, read = _config(short), list[int]()
    run(config, shape, corpus, words, tmp_path / "whole")
    batch = PhasedSource.batch
    monkeypatch.setattr(PhasedSource, "batch", lambda self, step: read.append(step) or batch(self, step))
    out, hidden = tmp_path / "judged", Hidden(words)

    def again(needles: dict[int, float], tolerance: float = 1) -> None:
        """Ask for other shares in each phase: `criteria` stands for what a run would be asked the next time."""
        asked = iter(needles.values())
        monkeypatch.setattr(
            "herd.pretrain.promoting.criteria",
            lambda one, before, now, found: criteria(
                Criteria(tolerance=tolerance, needles=next(asked)), before, now, found
            ),
        )
        run(config, shape, corpus, words, out, promote=Promote(Criteria(tolerance=tolerance, needles=1), hidden))

    for tries in range(2):  # asked the same again, it fails in the same place, and trains nothing
        with pytest.raises(HerdError, match="the phase of 64 tokens is not promoted at step 6: needles found") as error:
            again({32: 0, 64: 1} if not tries else {64: 1})
        assert str(out / "unpromoted") in str(error.value.fix)
        assert read == list(range(6)) and hidden.asked == [32, 64, 64][: 2 + tries]
        account = json.loads((out / "promotion.json").read_text())
        assert [one["context"] for one in account["judged"]] == [32] and account["failed"]["context"] == 64
    with checkpoint.open_checkpoint(out / "unpromoted") as left:
        assert left.config == shape
    again({64: 0, 128: 0})
    assert read == list(range(8)) and hidden.asked == [32, 64, 64, 64, 128]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 9))
    told = [(name, line["step"], line[name]) for line in lines for name in ("promoted", "not_promoted") if name in line]
    assert told == [("promoted", 3, 32), ("not_promoted", 6, 64), ("promoted", 6, 64), ("promoted", 7, 128)]
    with (
        checkpoint.open_checkpoint(tmp_path / "whole" / "checkpoint") as one,
        checkpoint.open_checkpoint(out / "checkpoint") as other,
    ):
        assert all((one[name] == other[name]).all() for name in one)
    assert "failed" not in json.loads((out / "promotion.json").read_text())


def test_short_text_that_is_lost_ends_the_run(
    short: Path, corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    """At a rate that destroys the model."""
    config, asked = _config(short, lr=0.5), Promote(Criteria(needles=0), Hidden(words))
    with pytest.raises(HerdError, match="is not promoted at step 3: bits per byte of short text"):
        run(config, shape, corpus, words, tmp_path, promote=asked)


def test_nothing_is_judged_or_saved_at_a_step_that_is_left_out(
    short: Path, corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "herd.train.guard.Guard.on_gradients", lambda self, trainer, record: Verdict(record.step in (3, 4))
    )
    run(
        _config(short), shape, corpus, words, tmp_path, promote=Promote(Criteria(tolerance=1, needles=0), Hidden(words))
    )
    account = json.loads((tmp_path / "promotion.json").read_text())
    assert [(one["step"], one["context"]) for one in account["judged"]] == [(5, 32), (6, 64), (7, 128)]


def test_another_run_cannot_be_judged(
    short: Path, corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    config, asked = _config(short), Promote(Criteria(tolerance=1, needles=0), Hidden(words))
    run(config, shape, corpus, words, tmp_path / "without")
    with pytest.raises(UsageError, match="was begun without"):
        run(config, shape, corpus, words, tmp_path / "without", promote=asked)
    run(config, shape, corpus, words, tmp_path / "with", promote=asked)
    with pytest.raises(UsageError, match="was trained with promote"):
        run(config, shape, corpus, words, tmp_path / "with")
    with pytest.raises(UsageError, match="short=32; got 16"):
        run(config, shape, corpus, words, tmp_path / "with", promote=dataclasses.replace(asked, short=16))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "and there is none"),
        ({"init_from": "a", "adapt": {}}, "adapt takes parts of it away"),
        ({"init_from": "a", "max_minutes": 1}, "max_minutes cannot decide"),
        ({"init_from": "a", "promote": {"short": 8192}}, "more than the longest row"),
    ],
)
def test_what_a_recipe_cannot_ask(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BaseConfig.model_validate({"promote": {}} | fields)


def test_the_prompts_of_a_recipe(short: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    """All depths and samples of a phase's rows, each answer in the text and at its end; what is wrong is said first."""
    (tmp_path / "hay.txt").write_text("A sentence of some length. Another one follows it. " * 50)
    config = _config(short, seq_len=128, batch_size=2).model_copy(update={"phases": ()})
    grid = PromoteConfig(haystack=(str(tmp_path / "hay.txt"),), depths=3, samples=2, digits=2)
    prompts = list(grid.promote(words, config.model_copy(update={"train": LONG})).hidden(400))
    assert len(prompts) == 6
    for ids, answer in prompts:
        number = words.decode(answer).strip()
        assert number.isdigit() and number in words.decode(ids) and 390 < len(ids) + len(answer) <= 400
    with pytest.raises(UsageError, match="no room for a haystack"):
        grid.promote(words, config.model_copy(update={"train": TrainConfig(seq_len=32)}))
    with pytest.raises(HerdError, match="nowhere"):
        PromoteConfig(haystack=(str(tmp_path / "nowhere"),)).promote(words, config.model_copy(update={"train": LONG}))
    assert PromoteConfig(needles=0, haystack=("nowhere",)).promote(words, config).criteria == Criteria(needles=0)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {}, "fsdp": {"shard": True}, "tp": {"tp": 2}, "ring": {"cp": 2, "context": "ring"}, "pp": {"pp": 2},
}  # fmt: skip


def judge_on_rank(rank: int, out: Path, short: str, corpus: str, layouts: list[str], needles: float) -> None:
    """Each layout's run; what it fails with is kept."""
    words = tokenizer.load(short)
    for name in layouts:
        config = _config(Path(short), micro_batch=1, parallel=LAYOUTS[name])
        with checkpoint.open_checkpoint(short) as opened:
            shape = opened.config
        asked = Promote(Criteria(tolerance=0.5, needles=needles), Hidden(words), short=16)
        try:
            run(config, shape, corpus, words, out / name, promote=asked)
        except HerdError as error:
            (out / f"{name}-{rank}.txt").write_text(error.what)


@pytest.mark.parametrize("layouts", [["ring"], pytest.param(["dp", "fsdp", "tp", "pp"], marks=pytest.mark.slow)])
def test_ranks_judge_as_one_process_does(
    layouts: list[str], short: Path, corpus: Path, words: tokenizer.Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    alone = Promote(Criteria(tolerance=0.5, needles=0.25), Hidden(words), short=16)
    run(_config(short, micro_batch=1), shape, corpus, words, tmp_path / "alone", promote=alone)
    wanted = json.loads((tmp_path / "alone" / "promotion.json").read_text())
    arguments = {"short": str(short), "corpus": str(corpus), "layouts": layouts}
    launch(2, "tests.pretrain.test_pretrain_promoting:judge_on_rank", tmp_path, needles=1, **arguments)
    for name in layouts:
        said = [(tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2)]
        assert said[0] == said[1] and "tokens is not promoted at step 3: needles found" in said[0]
        with checkpoint.open_checkpoint(tmp_path / name / "unpromoted") as left:
            assert left.config == shape
    launch(2, "tests.pretrain.test_pretrain_promoting:judge_on_rank", tmp_path, needles=0.25, **arguments)
    for name in layouts:
        account = json.loads((tmp_path / name / "promotion.json").read_text())
        assert account["short_before"] == pytest.approx(wanted["short_before"], rel=1e-5)
        for one, other in zip(account["judged"], wanted["judged"], strict=True):
            assert (one["step"], one["context"], one["needles"]) == (other["step"], other["context"], other["needles"])
            assert one["short"] == pytest.approx(other["short"], rel=1e-4)
