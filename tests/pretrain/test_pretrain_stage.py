"""The stage on a tiny corpus, end to end: data, training, held-out bits per byte, checkpoint, resumption, budget."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from herd import checkpoint, tokenizer
from herd import model as models
from herd.architecture import parameter_count, training_flops_per_token
from herd.corpus import Document, EvaluationWindows, read_documents
from herd.corpus.document import write_documents
from herd.errors import FileFormatError, UsageError
from herd.pretrain import HeldOut, PretrainConfig, run
from herd.pretrain.data import prepare, spread
from herd.train import StepRecord, Trainer
from tests.pretrain.little import shape_for, vocabulary


def _text(n: int) -> str:
    lines = [f"def add_{n + i}(a, b):\n    return a + b + {(n * i) % 10}\n" for i in range(1 + n % 7)]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "train.jsonl", [Document(_text(n), f"train/{n}") for n in range(80)])
    write_documents(folder / "heldout.jsonl", [Document(_text(n), f"heldout/{n}") for n in range(200, 220)])
    return folder


@pytest.fixture(scope="module")
def words(corpus: Path) -> tokenizer.Tokenizer:
    return vocabulary(corpus)


def _config(**fields: Any) -> PretrainConfig:
    train = {"steps": 30, "seq_len": 32, "batch_size": 8, "lr": 0.01, "precision": "fp32", "compile": "off"}
    train |= {"checkpoint_seconds": 0, "log_every": 5} | fields.pop("train", {})
    return PretrainConfig.model_validate({"evaluations": 3, "probe_tokens": 300, "train": train} | fields)


@pytest.fixture(scope="module")
def finished(corpus: Path, words: tokenizer.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    run(_config(), shape_for(words), corpus, words, out)
    return out


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_says_what_it_did(finished: Path, words: tokenizer.Tokenizer) -> None:
    result = json.loads((finished / "result.json").read_text())
    shape = shape_for(words)
    assert result["loss"] < 0.6 * math.log(words.vocab_size)
    assert result["steps"] == 30 and result["tokens"] == 30 * 8 * 32
    assert result["parameters"] == parameter_count(shape)
    share = result["supervised_tokens"] / result["tokens"]
    assert result["training_flops"] == training_flops_per_token(shape, 32, share) * result["tokens"]
    probes = [line for line in _lines(finished) if "heldout_bits_per_byte" in line]
    assert [line["step"] for line in probes] == [0, 10, 20, 30]
    assert probes[0]["heldout_loss"] == pytest.approx(math.log(words.vocab_size), rel=0.05)
    assert probes[-1]["heldout_bits_per_byte"] == result["heldout_bits_per_byte"] < probes[0]["heldout_bits_per_byte"]


def test_the_saved_model_scores_what_the_stage_said(finished: Path, corpus: Path) -> None:
    """Bits per byte again, one document at a time with the loaded checkpoint and no packing."""
    result = json.loads((finished / "result.json").read_text())
    llama = models.load(finished / "checkpoint")
    with checkpoint.open_checkpoint(finished / "checkpoint") as saved:
        words = saved.tokenizer
    nats = n_bytes = 0.0
    for document in read_documents(corpus / "heldout.jsonl"):
        ids = torch.tensor(words.encode_document(document.text))
        n_bytes += document.n_bytes
        # As the stage: windows of 32 that start 16 apart, each scoring what the one before did not.
        scored = start = 0
        while scored < len(ids) - 1:
            end = min(start + 32, len(ids) - 1)
            with torch.no_grad():
                logits = llama(ids[None, start:end])[0]
            losses = functional.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
            nats += losses[scored - start :].sum().item()
            scored, start = end, start + 16
    assert nats / math.log(2) / n_bytes == pytest.approx(result["heldout_bits_per_byte"], rel=1e-4)


def test_a_second_call_returns_the_same_without_training(
    finished: Path, corpus: Path, words: tokenizer.Tokenizer
) -> None:
    before = json.loads((finished / "result.json").read_text())
    metrics = (finished / "metrics.jsonl").read_text()
    again = run(_config(), shape_for(words), corpus, words, finished)
    assert again["resumed_from"] == 30
    same = ("loss", "tokens", "heldout_loss", "heldout_bits_per_byte", "seconds")
    assert {key: again[key] for key in same} == {key: before[key] for key in same}
    assert (finished / "metrics.jsonl").read_text() == metrics
    # Killed between the final state and the last line: the end of the curve is not lost.
    (finished / "metrics.jsonl").write_text("\n".join(metrics.splitlines()[:-1]) + "\n")
    run(_config(), shape_for(words), corpus, words, finished)
    assert (finished / "metrics.jsonl").read_text() == metrics


def test_an_interrupted_stage_ends_in_the_same_weights(
    finished: Path, corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def stop_at_17(self: Trainer[Any]) -> None:
        if self.step == 17:
            raise RuntimeError("the power fails")
        step(self)

    monkeypatch.setattr(Trainer, "train_step", stop_at_17)
    config = _config(train={"checkpoint_every": 5})
    with pytest.raises(RuntimeError, match="power"):
        run(config, shape_for(words), corpus, words, tmp_path)
    monkeypatch.undo()
    assert run(config, shape_for(words), corpus, words, tmp_path)["resumed_from"] == 15
    paths = tmp_path / "checkpoint", finished / "checkpoint"
    with checkpoint.open_checkpoint(paths[0]) as one, checkpoint.open_checkpoint(paths[1]) as other:
        assert all((one[name] == other[name]).all() for name in other)


def test_the_time_limit_plans_the_steps_once(
    corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(max_minutes=0.1, evaluations=0, train={"steps": 10**6, "log_every": 1000})
    # A clock of its own, by which the trial steps took a twentieth of a second and those of the run a fiftieth.
    clock, train_step = [time.monotonic()], Trainer.train_step

    def step_and_tick(loop: Trainer[Any]) -> None:
        train_step(loop)
        clock[0] += 0.02

    monkeypatch.setattr(Trainer, "train_step", step_and_tick)
    monkeypatch.setattr("herd.train.budget.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("herd.train.budget.step_seconds", lambda *_: 0.05)
    result = run(config, shape_for(words), corpus, words, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())["revisions"]
    assert 100 < plan[0]["total"] < 114, "95 % of 6 s, less what the scoring takes; later plans have more"
    assert 250 < result["steps"] == plan[-1]["total"] <= 300 and len(plan) > 4
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])["lr"] == pytest.approx(0.001, rel=0.01)
    # A slower machine, or a slower day, must not change a plan that training has begun to follow.
    monkeypatch.setattr("herd.train.budget.step_seconds", lambda *_: pytest.fail("measured again"))
    assert run(config, shape_for(words), corpus, words, tmp_path)["resumed_from"] == result["steps"]
    (tmp_path / "plan.json").write_text('{"revisions": [{"step": 0, "total": -4}]}')
    with pytest.raises(FileFormatError, match="not a plan"):
        run(config, shape_for(words), corpus, words, tmp_path)


def test_the_probe_is_spread_over_the_held_out_text() -> None:
    assert spread([10] * 100, 200) == set(range(0, 100, 5))
    assert spread([10] * 5, 1000) == set(range(5))
    assert spread([500, 10, 10, 500, 10], 20) == {1, 2}
    assert 0 not in spread([5000, *[10] * 50], 200)
    assert spread([900], 10) == {0}


def test_token_files_are_made_again_when_the_text_changes(words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_documents(corpus / "train.jsonl", [Document("one two", "a")])
    files = prepare(corpus, words, tmp_path / "tokens", 100)
    assert files.heldout is None and files.probe is None and files.scored_tokens(8) == (0, 0)
    made = (tmp_path / "tokens" / "train" / "tokens.bin").stat().st_mtime_ns
    prepare(corpus, words, tmp_path / "tokens", 100)
    assert (tmp_path / "tokens" / "train" / "tokens.bin").stat().st_mtime_ns == made
    write_documents(corpus / "train.jsonl", [Document("one two three", "a")])
    changed = prepare(corpus, words, tmp_path / "tokens", 100)
    assert changed.train[0].tolist() == words.encode_document("one two three")


def test_contradictions_are_named(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows are longer than the model's context; got 32"):
        run(_config(), shape_for(words, context_length=16), corpus, words, tmp_path)
    with pytest.raises(UsageError, match="vocabulary is smaller"):
        run(_config(), shape_for(words, vocab_size=128), corpus, words, tmp_path)
    with pytest.raises(UsageError, match=r"has no train\.jsonl"):
        run(_config(), shape_for(words), tmp_path, words, tmp_path)


def test_evaluations_are_at_equal_distances(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    shards = prepare(corpus, words, tmp_path, 100).probe
    assert shards is not None
    for times, steps in ((1, 10), (4, 10), (3, 7), (10, 10), (20, 10)):
        seen: list[int] = []

        class Recorder(HeldOut):
            def _score(self, trainer: Any) -> None:
                seen.append(trainer.step)  # noqa: B023

        class Stub:
            step = 0
            total_steps = steps

        recorder, stub = Recorder(EvaluationWindows(shards, 16, 2), times), Stub()
        recorder.on_start(stub)  # type: ignore[arg-type]
        for stub.step in range(1, steps + 1):
            recorder.on_step(stub, StepRecord(stub.step, 1.0, 1.0, 1.0, 1, 1.0, 1.0))  # type: ignore[arg-type]
        assert seen[0] == 0 and seen[-1] < steps
        assert len(seen) == min(times, steps)
        assert seen == [math.ceil(i * steps / times) for i in range(times)] or times > steps


def test_copies_on_the_way_are_the_weights_of_their_steps(
    finished: Path, corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    """Each opens as a checkpoint, the last one is the end, and taking them changes nothing."""
    run(_config(export_every=15), shape_for(words), corpus, words, tmp_path)
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["step-00000015", "step-00000030"]

    def weights(place: Path) -> dict[str, Any]:
        with checkpoint.open_checkpoint(place) as opened:
            assert opened.tokenizer.vocab_size == words.vocab_size
            return {name: opened[name].copy() for name in opened}

    half, end = (weights(tmp_path / "exports" / f"step-000000{step}") for step in (15, 30))
    last, other = weights(tmp_path / "checkpoint"), weights(finished / "checkpoint")
    for name, array in last.items():
        assert (end[name] == array).all() and (other[name] == array).all() and (half[name] != array).any()
