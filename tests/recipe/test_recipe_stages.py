"""Stages on their own: what they write and say where something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd import tokenizer
from herd.files import read_json, write_json

pytest.importorskip("torch")

from herd.recipe.quantise import QuantiseConfig, quantise
from herd.recipe.stages import _trained


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
    assert results["documents"] == results["bytes"] == 0
    assert read_json(tmp_path / "results.json") == results


def test_a_training_stage_is_summed_up_by_its_result_and_not_by_its_last_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 642, "loss": null, "tokens": 2000, "skipped": 2}\n')
    result = {"steps": 642, "tokens": 1_314_816, "loss": 1.0981}
    write_json(tmp_path / "result.json", result)
    assert _trained(tmp_path) == "642 steps, 1.31M tokens, loss 1.098"
    write_json(tmp_path / "result.json", result | {"heldout_loss": 3.7483})
    assert _trained(tmp_path) == "642 steps, 1.31M tokens, loss 1.098, held out 3.748"
