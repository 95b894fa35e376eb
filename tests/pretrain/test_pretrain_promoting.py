"""What phases are judged by: against windows and answers read one by one, and on ranks that share the model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from herd import checkpoint, tokenizer
from herd import model as models
from herd.architecture import LlamaConfig
from herd.corpus import TokenShards
from herd.errors import HerdError, UsageError
from herd.pretrain import run
from herd.pretrain.config import Criteria
from herd.recipe.needle_grid import PromoteConfig
from herd.recipe.stages import BaseConfig
from herd.tokenizer import Tokenizer
from herd.train import TrainConfig
from tests.pretrain.by_hand import bits_per_byte
from tests.pretrain.phased import Hidden, account, asking, lines, phased, promoted
from tests.train.parallel.launch import launch


def _probabilities(path: Path, words: Tokenizer, length: int) -> list[float]:
    """That of each answer, by hand."""
    llama, found = models.load(path, dtype=torch.float32), []
    for prompt, answer in Hidden(words)(length):
        ids = torch.tensor([*prompt, *answer])
        with torch.no_grad():
            chances = llama(ids[None, :-1])[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        found.append(chances[at, ids[at + 1]].sum().exp().item())
    return found


def _shares(path: Path, words: Tokenizer, length: int) -> tuple[float, float]:
    """Of the answers that surely have more than half of the probability, and of those that may."""
    found = _probabilities(path, words, length)
    return tuple(sum(chance > bound for chance in found) / len(found) for bound in (0.501, 0.499))


def test_each_phase_is_judged_where_it_ends(
    short: Path, corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    config = phased(short).model_copy(update={"export_every": 1})
    asked = asking(words, tolerance=0.5, needles=0.01, short=16)
    run(config, shape, corpus, words, tmp_path, promote=asked)
    assert asked.hidden.asked == [32, 64, 128] and promoted(tmp_path) == [(3, 32), (6, 64), (7, 128)]
    told, probe = account(tmp_path), TokenShards(tmp_path / "tokens" / "probe")
    assert told["short_before"] == pytest.approx(bits_per_byte(short, probe, 16), rel=1e-4)
    assert told["short_text"]["window"] == 16 and told["short_text"]["bytes"] == probe.text_bytes.sum()
    for one in told["judged"]:
        then = tmp_path / "exports" / f"step-{one['step']:08d}"
        assert one["short"] == pytest.approx(bits_per_byte(then, probe, 16), rel=1e-4)
        least, most = _shares(then, words, one["context"])
        assert least <= one["needles"] <= most and 0 < one["needles"] < 1
        assert all(criterion["met"] for criterion in one["criteria"])
    said = [(line["step"], line["promoted"]) for line in lines(tmp_path) if "promoted" in line]
    assert said == promoted(tmp_path)


def test_the_length_with_the_fewest_counts(
    short: Path, corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    config = phased(short).model_copy(update={"export_every": 3})
    asked = asking(words, needles=0.01, lengths=2)
    run(config, shape, corpus, words, tmp_path, promote=asked)
    assert asked.hidden.asked == [16, 32, 32, 64, 64, 128]
    bounds = [_shares(tmp_path / "exports" / "step-00000006", words, length) for length in (32, 64)]
    least, most = (min(each) for each in zip(*bounds, strict=True))
    assert least <= account(tmp_path)["judged"][1]["needles"] <= most


def test_what_a_change_of_rope_costs_is_not_forgiven(
    short: Path, corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    """Short text is compared with the model that the run begins with, as that reads it."""
    turned = dataclasses.replace(shape, rope_theta=2.0)
    with pytest.raises(HerdError, match="is not promoted at step 3: bits per byte of short text"):
        run(phased(short), turned, corpus, words, tmp_path, promote=asking(words, tolerance=0))
    told, probe = account(tmp_path), TokenShards(tmp_path / "tokens" / "probe")
    left = tmp_path / "unpromoted" / "step-00000003"
    assert told["short_before"] == pytest.approx(bits_per_byte(short, probe, 32), rel=1e-4)
    assert told["failed"]["short"] == pytest.approx(bits_per_byte(left, probe, 32), rel=1e-4)


def test_short_text_is_read_as_far_as_the_first_model_reads(
    short: Path, corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    with checkpoint.open_checkpoint(short) as opened:
        checkpoint.save(
            tmp_path / "first", dataclasses.replace(shape, context_length=24), opened, tokenizer=opened.tokenizer
        )
    config = phased(tmp_path / "first")
    run(config, shape, corpus, words, tmp_path / "run", promote=asking(words))
    probe = TokenShards(tmp_path / "run" / "tokens" / "probe")
    assert account(tmp_path / "run")["short_text"]["window"] == 24
    assert account(tmp_path / "run")["short_before"] == pytest.approx(bits_per_byte(short, probe, 24), rel=1e-4)
    with pytest.raises(UsageError, match=r"promote.short is more than the first model reads; got 32; allowed: 1 to 24"):
        run(config, shape, corpus, words, tmp_path / "other", promote=asking(words, short=32))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "and there is none"),
        ({"init_from": "a", "adapt": {}}, "adapt takes parts of it away"),
        ({"init_from": "a", "max_minutes": 1}, "max_minutes cannot decide"),
        ({"init_from": "a", "train": {"steps": 9, "anneal": 9}}, "comes after step 0"),
        (
            {"init_from": "a", "train": {"steps": 9, "anneal": 6, "seq_len": 8, "batch_size": 1},
             "phases": [{"from_tokens": 24, "seq_len": 16, "batch_size": 1}]},
            "last phase would begin after step 3, and annealing, or the end, comes after step 3",
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_ask(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BaseConfig.model_validate({"promote": {}} | fields)


def test_what_a_run_cannot_be_judged_by_is_said_before_it_is_trained(
    short: Path, corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    config = phased(short)
    new = config.model_copy(update={"init_from": None})
    for wrong, said in ((new, "and there is none"), (phased(short, anneal=2), "last phase would begin after step 6")):
        with pytest.raises(UsageError, match=said):
            run(wrong, shape, corpus, words, tmp_path / "a", promote=asking(words))
        assert not (tmp_path / "a").exists()
    (tmp_path / "unheld").mkdir()
    shutil.copy(corpus / "train.jsonl", tmp_path / "unheld")
    with pytest.raises(UsageError, match=r"held-out text, and there is none; to fix: corpus.heldout_fraction=0.01"):
        run(config, shape, tmp_path / "unheld", words, tmp_path / "b", promote=asking(words))
    assert not (tmp_path / "b" / "state").exists()


def test_the_prompts_of_a_recipe(short: Path, words: Tokenizer, tmp_path: Path) -> None:
    """All depths and samples of a phase's rows, each answer in the text and at its end; what is wrong is said first."""
    (tmp_path / "hay.txt").write_text("A sentence of some length. Another one follows it. " * 50)
    config = phased(short).model_copy(update={"phases": ()})
    of_400 = config.model_copy(update={"train": TrainConfig(seq_len=400, batch_size=2)})
    of_32 = config.model_copy(update={"train": TrainConfig(seq_len=32)})
    grid = PromoteConfig(haystack=(str(tmp_path / "hay.txt"),), depths=3, samples=2, digits=2)
    prompts = list(grid.promote(words, of_400).hidden(400))
    assert len(prompts) == 6
    for ids, answer in prompts:
        number = words.decode(answer).strip()
        assert number.isdigit() and number in words.decode(ids) and 390 < len(ids) + len(answer) <= 400
    with pytest.raises(UsageError, match=r"^promote: .*no room for a haystack; got 32; .*needles=0"):
        grid.promote(words, of_32)
    with pytest.raises(UsageError, match="no room for a haystack; got 25"):
        grid.model_copy(update={"lengths": 16}).promote(words, of_400)
    with pytest.raises(HerdError, match="nowhere"):
        PromoteConfig(haystack=(str(tmp_path / "nowhere"),)).promote(words, of_400)
    assert PromoteConfig(needles=0, haystack=("nowhere",)).promote(words, of_32).criteria == Criteria(needles=0)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {}, "fsdp": {"shard": True}, "tp": {"tp": 2}, "ring": {"cp": 2, "context": "ring"}, "pp": {"pp": 2},
}  # fmt: skip


class Harder(Hidden):
    """In texts of 64 tokens nothing can be found."""

    def __call__(self, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        pairs = list(super().__call__(length))
        yield from pairs[-1:] if length == 64 else pairs


def judge_on_rank(rank: int, out: Path, short: str, corpus: str, layouts: list[str], hard: bool) -> None:
    """Each layout's run; what it fails with is kept."""
    words = tokenizer.load(short)
    with checkpoint.open_checkpoint(short) as opened:
        shape = opened.config
    for name in layouts:
        config = phased(Path(short), micro_batch=1, parallel=LAYOUTS[name])
        asked = asking(words, tolerance=0.5, needles=0.01, short=16)
        if hard:
            asked = dataclasses.replace(asked, hidden=Harder(words))
        try:
            run(config, shape, corpus, words, out / name, promote=asked)
        except HerdError as error:
            (out / f"{name}-{rank}.txt").write_text(error.what)


@pytest.mark.parametrize("layouts", [["ring"], pytest.param(["dp", "fsdp", "tp", "pp"], marks=pytest.mark.slow)])
def test_ranks_judge_as_one_process_does(
    layouts: list[str], short: Path, corpus: Path, words: Tokenizer, shape: LlamaConfig, tmp_path: Path
) -> None:
    """They fall short together in the second phase; with less asked, they go on, and so does one process alone."""
    less = asking(words, tolerance=0.5, needles=0.01, short=16)
    run(phased(short, micro_batch=1), shape, corpus, words, tmp_path / "alone", promote=less)
    wanted = account(tmp_path / "alone")
    arguments = {"short": str(short), "corpus": str(corpus), "layouts": layouts}
    launch(2, "tests.pretrain.test_pretrain_promoting:judge_on_rank", tmp_path, hard=True, **arguments)
    for name in layouts:
        said = [(tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2)]
        assert said[0] == said[1] and "rows of 64 tokens, is not promoted at step 6: needles found" in said[0]
        with checkpoint.open_checkpoint(tmp_path / name / "unpromoted" / "step-00000006") as left:
            assert left.config == shape
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-by-one")
        run(phased(short, micro_batch=1), shape, corpus, words, tmp_path / f"{name}-by-one", promote=less)
    launch(2, "tests.pretrain.test_pretrain_promoting:judge_on_rank", tmp_path, hard=False, **arguments)
    for name in (*layouts, *(f"{name}-by-one" for name in layouts)):
        told = account(tmp_path / name)
        assert told["short_before"] == pytest.approx(wanted["short_before"], rel=1e-5)
        for one, other in zip(told["judged"], wanted["judged"], strict=True):
            assert (one["step"], one["context"]) == (other["step"], other["context"])
            assert one["short"] == pytest.approx(other["short"], rel=1e-4)
            assert one["needles"] == pytest.approx(other["needles"], abs=0.15)  # one that is near one half
