"""Fine-tuning a real (tiny) model for a few seconds: it learns to answer, to stop, and to continue where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herd import LLM, checkpoint, evaluate, model
from herd.align import sft
from herd.align.exercises import generate
from herd.architecture import LlamaConfig
from herd.errors import HerdError, UsageError
from herd.tokenizer import Tokenizer, train

KINDS = ("small_talk", "exception")
SHAPE = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=32,
    ffn_dim=172,
    vocab_size=480,
    context_length=256,
    tied_embeddings=True,
    rope_theta=10_000.0,
)


def _config(**changes: Any) -> sft.SftConfig:
    loop = {"steps": 100, "seq_len": 192, "batch_size": 8, "lr": 6e-3, "precision": "fp32", "compile": "off"}
    options = {"exercises": 600, "kinds": KINDS, "epochs": None, "max_turns": 2, "train": loop, **changes}
    return sft.SftConfig.model_validate(options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft") / "base"
    texts = [f"{one.question} {one.answer}" for one in generate(1, 900, "train", kinds=KINDS)]
    llama = model.Llama(SHAPE)
    llama.init_weights(0)
    checkpoint.save(path, SHAPE, model.state_arrays(llama), format="hf", tokenizer=train(texts, SHAPE.vocab_size))
    return path


@pytest.fixture(scope="module")
def vocabulary(base: Path) -> Tokenizer:
    from herd import tokenizer

    return tokenizer.load(base)


@pytest.fixture(scope="module")
def tuned(base: Path, vocabulary: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sft") / "out"
    rehearsal = [f"def f{i}(x):\n    return x + {i}\n" for i in range(200)]
    return out, sft.run(_config(), base, vocabulary, out, rehearsal=rehearsal)


def test_exact_match_rises_on_heldout_questions(base: Path, tuned: tuple[Path, dict[str, Any]]) -> None:
    questions = generate(9, 60, "heldout", kinds=KINDS)
    learnt = {json.loads(line)["messages"][-2]["content"] for line in (tuned[0] / "dialogs.jsonl").open()}
    assert not learnt & {one.question for one in questions}
    with LLM(base) as llm:
        before = evaluate.exact_match(llm, questions)
    with LLM(tuned[0] / "checkpoint") as llm:
        after = evaluate.exact_match(llm, questions)
    assert before.overall.correct <= 2
    assert after.overall.score > 0.6, [(a.exercise.question, a.said) for a in after.answers if not a.correct][:5]
    assert all(answer.finished for answer in after.answers), "every answer ends with its own end of turn"
    comparison = evaluate.paired([a.correct for a in before.answers], [a.correct for a in after.answers])
    assert comparison.p_value < 1e-6


def test_what_is_written(tuned: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, result = tuned
    assert json.loads((out / "result.json").read_text()) == result
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0] / 4 and metrics[-1]["step"] == 100
    dialogs = [json.loads(line)["messages"] for line in (out / "dialogs.jsonl").read_text().splitlines()]
    assert sum(message["role"] == "assistant" for dialog in dialogs for message in dialog) == 600
    assert result["exercises"] == 600 and result["dialogs"] == len(dialogs)
    share = result["rehearsal_tokens"] / (result["rehearsal_tokens"] + result["dialog_tokens"])
    assert share == pytest.approx(0.1, abs=0.01)
    with checkpoint.open_checkpoint(out / "checkpoint") as saved, checkpoint.open_checkpoint(base) as old:
        assert saved.config == old.config and set(saved) == set(old)
        assert (saved["embed.weight"] != old["embed.weight"]).any()


def test_again_it_is_done_and_elsewhere_the_same(base: Path, vocabulary: Tokenizer, tmp_path: Path) -> None:
    short = _config(
        exercises=60,
        epochs=1.0,
        train={"seq_len": 192, "batch_size": 2, "precision": "fp32", "compile": "off", "steps": 1},
    )
    first = sft.run(short, base, vocabulary, tmp_path / "a")
    assert first["steps"] > 3 and first["epochs"] == pytest.approx(1.0, abs=0.2), "the epochs decide, not train.steps"
    weights = (tmp_path / "a" / "checkpoint" / "model.safetensors").read_bytes()
    assert sft.run(short, base, vocabulary, tmp_path / "a")["resumed_from"] == first["steps"]
    assert (tmp_path / "a" / "checkpoint" / "model.safetensors").read_bytes() == weights
    sft.run(short, base, vocabulary, tmp_path / "b")
    assert (tmp_path / "b" / "checkpoint" / "model.safetensors").read_bytes() == weights


def test_a_time_limit_lowers_the_steps(
    base: Path, vocabulary: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step is said to take a second and takes far less: the first plan is 14 steps, later ones have more.
    monkeypatch.setattr("herd.train.budget.step_seconds", lambda *_: 1.0)
    loop = {"seq_len": 192, "batch_size": 2, "precision": "fp32", "compile": "off", "log_every": 1}
    config = _config(exercises=200, epochs=3.0, max_minutes=0.25, train=loop)
    result = sft.run(config, base, vocabulary, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())["revisions"]
    assert 10 <= plan[0]["total"] <= 14 < result["steps"] == plan[-1]["total"] and result["epochs"] <= 3
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] < 0.15 * sft.SftTrainConfig().lr, "the schedule ends with the last step"
    monkeypatch.setattr("herd.train.budget.step_seconds", lambda *_: pytest.fail("measured again"))
    assert sft.run(config, base, vocabulary, tmp_path)["resumed_from"] == result["steps"]


def test_rows_that_do_not_fit(base: Path, vocabulary: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seq_len up to 256"):
        sft.run(_config(train={"seq_len": 512}), base, vocabulary, tmp_path)
    with pytest.raises(HerdError, match="longer than a row"):
        sft.run(_config(max_turns=8, train={"seq_len": 32}), base, vocabulary, tmp_path)


def test_the_seed_of_the_stage_is_the_seed_of_all(base: Path, vocabulary: Tokenizer, tmp_path: Path) -> None:
    made = []
    for seed in (1, 2):
        config = _config(exercises=20, seed=seed, train={"steps": 1, "seq_len": 192, "batch_size": 1, "compile": "off"})
        sft.run(config, base, vocabulary, tmp_path / str(seed))
        lines = (tmp_path / str(seed) / "dialogs.jsonl").read_text().splitlines()
        made.append({message["content"] for line in lines for message in json.loads(line)["messages"]})
    assert len(made[0] & made[1]) < len(made[0]) / 2, "other exercises, not the same ones in another order"
