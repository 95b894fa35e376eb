"""The whole evaluation on real (random) models: what is written, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.cli import main
from herd.errors import UsageError
from herd.evaluate import EvaluateConfig, results_table, run

CONFIG = EvaluateConfig(exercises=20, few_shot=False, max_tokens=4, samples=2, sample_tokens=8, dialogs=3)


def test_results_of_two_models(small_models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    results = run(CONFIG, small_models, texts, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["bits_per_byte"]) == list(results["exact_match"]) == ["one", "other"]
    for name in small_models:
        assert results["bits_per_byte"][name]["bytes"] == sum(len(text.encode()) for text in texts)
        match = results["exact_match"][name]
        assert match["overall"]["n"] == 20 == sum(score["n"] for score in match["by_kind"].values())
        assert [len(sample["completion"]) > 0 for sample in results["samples"][name]] == [True, True]
    assert results["bits_per_byte"]["one"]["nats"] != results["bits_per_byte"]["other"]["nats"]
    assert results["comparison"]["n"] == 20 and results["comparison"]["before"] == "one"
    assert [set(dialog["said"]) for dialog in results["dialogs"]] == [{"one", "other"}] * 3
    assert {"xz -9e", "bzip2 -9"} <= set(results["compressors"])


def test_again_the_same(small_models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    one = {"one": small_models["one"]}
    assert run(CONFIG, one, texts, tmp_path / "a") == run(CONFIG, one, texts, tmp_path / "b")
    assert (tmp_path / "a" / "results.txt").read_text() == (tmp_path / "b" / "results.txt").read_text()


def test_table_shows_every_figure(small_models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    results = run(CONFIG, small_models, texts, tmp_path)
    table = results_table(results)
    for name in small_models:
        assert f"{results['bits_per_byte'][name]['bits_per_byte']:.3f}" in table
    for name, size in results["compressors"].items():
        assert name in table and f"{size['bits_per_byte']:.3f}" in table
    assert all(kind in table for kind in results["exact_match"]["other"]["by_kind"])
    assert "McNemar" in table and "one → other" in table
    assert (tmp_path / "results.txt").read_text() == table + "\n"


def test_parts_may_be_left_out(small_models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    nothing = CONFIG.model_copy(update={"exercises": 0, "samples": 0})
    results = run(nothing, {"one": small_models["one"]}, texts[:1], tmp_path)
    assert results["exact_match"] == {} and "comparison" not in results and results["samples"] == {"one": []}
    assert "bits per byte" in results_table(results)
    only = run(CONFIG, {"one": small_models["one"]}, [], tmp_path)
    assert only["bits_per_byte"] == {} and only["compressors"] == {}
    assert "Exact match" in results_table(only)
    with pytest.raises(UsageError):
        run(CONFIG, {}, texts, tmp_path)


def test_heldout_bytes_takes_whole_documents(small_models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"exercises": 0, "samples": 0, "heldout_bytes": len(texts[0]) + 1})
    results = run(config, {"one": small_models["one"]}, texts, tmp_path)
    assert results["bits_per_byte"]["one"]["documents"] == 2


def _herd(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def test_command(small_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("def double(x):\n    return x * 2\n" * 4)
    model = str(small_models["one"])
    assert _herd("evaluate", model, "--bpb", str(text), "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bits_per_byte"][model]["bytes"] == text.stat().st_size and data["exact_match"] == {}
    assert _herd("evaluate", model, "--bpb", str(text), "--out", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert f"{data['bits_per_byte'][model]['bits_per_byte']:.3f}" in shown
    assert (tmp_path / "out" / "results.txt").read_text() == shown


def test_command_says_how_models_are_loaded(
    small_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("def double(x):\n    return x * 2\n" * 4)
    model = str(small_models["one"])
    arguments = ("evaluate", model, "--bpb", str(text), "--json")
    assert _herd(*arguments, "--quant", "q4_0", "--ctx", "64", "--kv", "int8", "--threads", "1") == 0
    data = json.loads(capsys.readouterr().out)
    assert _herd(*arguments) == 0
    plain = json.loads(capsys.readouterr().out)
    assert data["bits_per_byte"][model]["context"] == 64 != plain["bits_per_byte"][model]["context"]
    assert data["bits_per_byte"][model]["nats"] != plain["bits_per_byte"][model]["nats"]
    said = {"quant": "q4_0", "ctx": 64, "kv": "int8", "threads": 1}
    assert {name: data["loading"][name] for name in said} == said


def test_command_asks_exercises_and_compares(small_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, other = map(str, small_models.values())
    assert _herd("evaluate", other, "--before", one, "--exercises", "10", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["comparison"]["before"] == one and data["exact_match"][other]["overall"]["n"] == 10


def test_command_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _herd("evaluate", str(tmp_path / "nothing"), "--exercises", "3") != 0
    assert _herd("evaluate", "model", "--exercises", "-3") == 2
    assert "exercises" in capsys.readouterr().err
    assert _herd("evaluate", "model", "--exercises", "0") == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert _herd("evaluate", "model", "--before", "model") == 2
    assert "nothing to compare" in capsys.readouterr().err
