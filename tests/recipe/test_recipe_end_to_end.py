"""The real rooms on a tiny recipe: raw Python files in, a chat-ready model, GGUF files and a report out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from herd import LLM
from herd.cli.chat import _questions
from herd.recipe import StageEvent, load_recipe, run, stage_table

RECIPE = Path(__file__).with_name("tiny.yaml")
STAGES = ["corpus", "tokenizer", "base", "sft", "evaluate", "quantise", "report"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages of the standard library: about 400 kB of text."""
    folder = tmp_path_factory.mktemp("sources")
    for package in ("email", "json"):
        for file in Path(sysconfig.get_path("stdlib"), package).glob("*.py"):
            shutil.copy(file, folder / f"{package}_{file.name}")
    return folder


@pytest.fixture(scope="module")
def tiny(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The finished run and its run.json."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    return run_dir, run(load_recipe(RECIPE, [f"corpus.sources=['{sources}']"]), stage_table(), run_dir)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_stage_leaves_its_artefacts(tiny: tuple[Path, dict[str, Any]]) -> None:
    run_dir, state = tiny
    assert list(state["stages"]) == STAGES and all(entry["status"] == "done" for entry in state["stages"].values())
    wanted = {
        "corpus": {"train.jsonl", "heldout.jsonl", "stats.json"},
        "tokenizer": {"tokenizer.json", "results.json"},
        "base": {"checkpoint/config.json", "metrics.jsonl", "result.json"},
        "sft": {"checkpoint/config.json", "metrics.jsonl", "result.json"},
        "evaluate": {"results.json"},
        "quantise": {"model-q8_0.gguf", "model-q4_0.gguf", "results.json"},
        "report": {"report.html", "MODEL_CARD.md", "loss.png"},
    }
    for name, files in wanted.items():
        manifest = json.loads((run_dir / state["stages"][name]["directory"] / "stage.json").read_text())
        assert files <= set(manifest["artefacts"]), name
    assert state["model"] == f"{state['stages']['sft']['directory']}/checkpoint"


def test_training_learnt_and_quantising_cost_little(tiny: tuple[Path, dict[str, Any]]) -> None:
    run_dir, state = tiny
    base = run_dir / state["stages"]["base"]["directory"]
    losses = [
        row["loss"] for row in map(json.loads, (base / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]
    assert losses[-1] < losses[0] - 1
    results = json.loads((run_dir / state["stages"]["quantise"]["directory"] / "results.json").read_text())
    bits = {name: entry["bits_per_byte"] for name, entry in results["formats"].items()}
    assert abs(bits["q8_0"] - bits["source"]) < 0.01 and abs(bits["q4_0"] - bits["source"]) < 0.2
    assert bits["q8_0"] != bits["source"], "the files were scored, not the source again"
    sizes = {name: entry["bytes"] for name, entry in results["formats"].items()}
    assert sizes["q4_0"] < sizes["q8_0"] < sizes["source"]
    words = json.loads((run_dir / state["stages"]["tokenizer"]["directory"] / "results.json").read_text())
    assert words["vocab_size"] == 512 and words["specials"] == 16 and 1.5 < words["heldout"]["bytes_per_token"] < 4


def test_the_run_directory_is_a_model(tiny: tuple[Path, dict[str, Any]]) -> None:
    with LLM(tiny[0]) as llm:
        assert llm.config.n_layers == 2 and llm.config.vocab_size == 512
        assert llm.chat([{"role": "user", "content": "What is 1 + 1?"}], max_tokens=4).token_ids


def test_the_report_has_what_was_measured(tiny: tuple[Path, dict[str, Any]]) -> None:
    run_dir, state = tiny
    page = (run_dir / state["report"]).read_text(encoding="utf-8")
    evaluation = json.loads((run_dir / state["stages"]["evaluate"]["directory"] / "results.json").read_text())
    for label in ("base", "sft"):
        assert f"{evaluation['bits_per_byte'][label]['bits_per_byte']:.3f}" in page
    for title in ("Text", "Tokens", "Model", "Pretraining", "Instruction tuning", "Evaluation", "Samples", "Quantised"):
        assert f">{title}</h2>" in page
    card = (run_dir / state["report"]).with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    result = json.loads((run_dir / state["stages"]["base"]["directory"] / "result.json").read_text())
    assert f"| {result['parameters']:,} |" in card and f"| {result['tokens']:,} |" in card
    mantissa, exponent = f"{result['training_flops']:.2e}".split("e+")
    assert f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}" in card


def test_chat_says_what_to_ask(tiny: tuple[Path, dict[str, Any]]) -> None:
    run_dir, state = tiny
    dialogs = json.loads((run_dir / state["stages"]["evaluate"]["directory"] / "results.json").read_text())["dialogs"]
    easy = [f"for example: {dialog['question']}" for dialog in dialogs if dialog["difficulty"] == "easy"]
    assert easy and _questions(run_dir) == easy[:3]
    assert _questions(run_dir / "run.json") == []


def test_nothing_runs_twice_and_late_changes_run_late_stages(tiny: tuple[Path, dict[str, Any]], sources: Path) -> None:
    run_dir, state = tiny
    source = f"corpus.sources=['{sources}']"
    events: list[StageEvent] = []
    assert run(load_recipe(RECIPE, [source]), stage_table(), run_dir, on_event=events.append) == state
    assert [event.kind for event in events] == ["skip"] * len(STAGES)
    events.clear()
    run(load_recipe(RECIPE, [source, "quantise.formats=[bf16]"]), stage_table(), run_dir, on_event=events.append)
    assert [event.stage for event in events if event.kind == "done"] == ["quantise", "report"]


def test_a_killed_run_ends_with_the_same_weights(
    tiny: tuple[Path, dict[str, Any]], sources: Path, tmp_path: Path
) -> None:
    """`kill -9` in the middle of pretraining, then the same command: the checkpoint is the uninterrupted one's."""
    command = [
        sys.executable,
        "-c",
        "from herd.cli import main; main()",
        "run",
        str(RECIPE),
        "--out",
        str(tmp_path / "r"),
    ]
    command += [f"corpus.sources=['{sources}']", "base.train.checkpoint_every=3"]
    # With as many threads as the other run: on some processors the bits of a product depend on them.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as child:
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            metrics = list((tmp_path / "r").glob("base-*/metrics.jsonl"))
            if metrics and metrics[0].read_bytes().count(b"\n") >= 5:
                break
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    recipe = load_recipe(RECIPE, [f"corpus.sources=['{sources}']", "base.train.checkpoint_every=3"])
    events: list[StageEvent] = []
    state = run(recipe, stage_table(), tmp_path / "r", only="base", on_event=events.append)
    started = next(event for event in events if event.kind == "start")
    assert started.stage == "base" and started.reason == "it was stopped"
    whole = tiny[0] / tiny[1]["stages"]["base"]["directory"] / "checkpoint" / "model.safetensors"
    resumed = tmp_path / "r" / state["stages"]["base"]["directory"] / "checkpoint" / "model.safetensors"
    assert sha256(resumed) == sha256(whole)
