"""Stages on their own: what they write and say where something is missing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from herd import tokenizer
from herd.errors import UsageError
from herd.files import read_json, write_json
from herd.recipe import load_recipe, place, run

pytest.importorskip("torch")

from herd.recipe.hashing import digest, stage_key
from herd.recipe.quantise import QuantiseConfig, quantise
from herd.recipe.stage import BoundStage
from herd.recipe.stages import _trained, stage_table


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "base.train.seq_len=1024",
            "base: rows are longer than the model's context; got 1024; allowed: seq_len up to 512",
        ),
        ("sft.train.seq_len=513", "sft: rows are longer than the model's context; got 513; allowed: seq_len up to 512"),
        ("corpus.sources=[python-stdlib, nowhere]", "corpus: there is no such source; got nowhere"),
        ("base.model.n_heads=3", "base: model: dim 128 is not a multiple of n_heads 3"),
        ("base.model.n_kv_heads=3", "base: model: LlamaConfig: field 'n_kv_heads' is not valid; got 3"),
        (
            "base.train.micro_batch=9",
            "base: train: micro_batch 9 is larger than batch_size 8",
        ),
        ("corpus.sources=docs", "corpus: field 'sources' is not valid; got docs; allowed: a list, such as [a, b]"),
        ("corpus.sources=[]", "corpus: field 'sources' is not valid; got []; allowed: 1 or more of them"),
        ("base.model=3", "base: field 'model' is not valid; got 3; allowed: a mapping of fields"),
        ("base.train.lr=-1", "base: field 'train.lr' is not valid; got -1; allowed: greater than 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(override: str, words: str, tmp_path: Path) -> None:
    pocket = Path(__file__).parents[2] / "recipes" / "pocket.yaml"
    with pytest.raises(UsageError, match=re.escape(words)):
        place(load_recipe(pocket, [override]), stage_table(), tmp_path)


def test_ranks_that_cannot_share_the_work_are_told_so_first(tmp_path: Path) -> None:
    pocket = Path(__file__).parents[2] / "recipes" / "pocket.yaml"
    with pytest.raises(UsageError, match=r"^base: the ranks cannot be shared between the axes; got tp 3 .* on 1 ranks"):
        run(load_recipe(pocket, ["base.train.optimizer=adamw", "base.train.parallel.tp=3"]), stage_table(), tmp_path)
    assert not list(tmp_path.glob("corpus-*"))


def test_files_are_written_where_nothing_was_held_out(finished_run: Path, tmp_path: Path) -> None:
    state = read_json(finished_run / "run.json")
    checkpoint = finished_run / state["stages"]["sft"]["directory"] / "checkpoint"
    tokenizer.train(["a few words"], 280, n_specials=16).save(checkpoint)
    results = quantise(QuantiseConfig(formats=("q8_0", "f32", "q8_0")), checkpoint, [], tmp_path, name="small")
    assert list(results["formats"]) == ["source", "q8_0", "f32"]
    for entry in list(results["formats"].values())[1:]:
        size = (tmp_path / entry["file"]).stat().st_size
        assert entry["bytes"] == size and entry["bits_per_weight"] == 8 * size / results["parameters"]
    assert {entry["bits_per_byte"] for entry in results["formats"].values()} == {None}
    assert all(entry["tokens_per_s"] > 0 for entry in results["formats"].values())
    assert results["documents"] == results["bytes"] == 0
    assert read_json(tmp_path / "results.json") == results


def test_a_training_stage_is_summed_up_by_its_result_and_not_by_its_last_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 642, "loss": null, "tokens": 2000, "skipped": 2}\n')
    result = {"steps": 642, "tokens": 1_314_816, "loss": 1.0981}
    write_json(tmp_path / "result.json", result)
    assert _trained(tmp_path) == "642 steps, 1.31M tokens, loss 1.098"
    write_json(tmp_path / "result.json", result | {"heldout_loss": 3.7483})
    assert _trained(tmp_path) == "642 steps, 1.31M tokens, loss 1.098, held out 3.748"


def test_what_phases_are_asked_is_not_part_of_what_a_stage_is_known_by() -> None:
    """A run that fell short goes on when less is asked; one with other rows is another."""
    base = next(stage for stage in stage_table() if stage.name == "base")

    def hashed(**fields: object) -> str:
        config = base.config.model_validate({"init_from": "a", **fields})
        without = dataclasses.replace(base, fingerprint=None)
        return digest(stage_key(BoundStage(without, config, ()), {}))

    assert hashed() == hashed(promote={"needles": 0.5}) == hashed(promote={"needles": 0, "samples": 1})
    rows = {"phases": [{"from_tokens": 512, "seq_len": 1024, "batch_size": 1}], "promote": {}}
    assert hashed() != hashed(**rows) != hashed(**{**rows, "phases": [{**rows["phases"][0], "batch_size": 2}]})
