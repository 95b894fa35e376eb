"""The stage with several sources, phases and annealing, end to end on small text; and on other numbers of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from herd import checkpoint, tokenizer
from herd.architecture import training_flops_per_token
from herd.corpus import Document
from herd.corpus.document import write_documents
from herd.corpus.mixture import MixedRows
from herd.errors import HerdError, UsageError
from herd.pretrain import PretrainConfig, run
from herd.pretrain.data import prepare
from herd.pretrain.rows import mixture, phase_rows
from herd.pretrain.source import PhasedSource
from herd.train import Callback, StepRecord, Trainer
from herd.train.world import OneRank
from tests.pretrain.little import shape_for, vocabulary


def _code(n: int) -> str:
    return "\n".join(f"def f{n + i}(a):\n    return a + {i}\n" for i in range(2 + n % 6))


def _prose(n: int) -> str:
    return " ".join(f"The number {n} comes before {n + 1}, and after that comes {n + i}." for i in range(2 + n % 5))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    documents = [Document(_code(n), f"lib/{n}.py", meta={"kind": "code"}) for n in range(60)]
    documents += [Document(_prose(n), f"notes/{n}.txt", meta={"kind": "prose"}) for n in range(12)]
    documents += [Document("a licence nobody needs", "notes/LICENCE", meta={"kind": "prose"})]
    write_documents(folder / "train.jsonl", documents)
    write_documents(folder / "heldout.jsonl", [Document(_code(n), f"heldout/{n}") for n in range(200, 210)])
    return folder


@pytest.fixture(scope="module")
def words(corpus: Path) -> tokenizer.Tokenizer:
    return vocabulary(corpus, 320)


SOURCES = {"code": {"weight": 3, "kind": "code"}, "prose": {"weight": 1, "match": ["notes/*.txt"]}}


def _config(**fields: Any) -> PretrainConfig:
    train = {"steps": 24, "seq_len": 16, "batch_size": 8, "lr": 0.01, "precision": "fp32", "compile": "off"}
    train |= {"checkpoint_seconds": 0, "log_every": 1} | fields.pop("train", {})
    return PretrainConfig.model_validate({"evaluations": 0, "probe_tokens": 300, "train": train} | fields)


RAMP = {
    "sources": SOURCES,
    "phases": [
        {"from_tokens": 640, "seq_len": 32, "batch_size": 8},  # step 5
        {"from_tokens": 2000, "seq_len": 32, "batch_size": 16},  # step 11
    ],
    "mix": [{"from_tokens": 1500, "weights": {"code": 1, "prose": 1}}],
    "anneal": {"weights": {"prose": 1}},
    "train": {"anneal": 6},
}


class _Weights(Callback):
    """Copies of the weights after each step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.weights: list[torch.Tensor] = []

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        self.steps.append(record.step)
        self.weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))


@pytest.fixture(scope="module")
def ramp(corpus: Path, words: tokenizer.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, _Weights]:
    """A finished run with everything in it, and the weights on its way."""
    out, seen = tmp_path_factory.mktemp("ramp"), _Weights()
    patch = pytest.MonkeyPatch()
    begin = Trainer.__init__

    def watched(self: Trainer[Any], *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.callbacks.append(seen)

    patch.setattr(Trainer, "__init__", watched)
    run(_config(**RAMP), shape_for(words), corpus, words, out)
    patch.undo()
    return out, seen


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_result_says_what_was_read(ramp: tuple[Path, _Weights], words: tokenizer.Tokenizer) -> None:
    result = json.loads((ramp[0] / "result.json").read_text())
    # 5 steps of 8 x 16, 6 of 8 x 32, 13 of 16 x 32.
    assert result["tokens"] == 5 * 128 + 6 * 256 + 13 * 512
    assert [(p["first_step"], p["first_token"], p["seq_len"], p["batch_size"]) for p in result["phases"]] == [
        (0, 0, 16, 8), (5, 640, 32, 8), (11, 2176, 32, 16),
    ]  # fmt: skip
    # Rows: 40 + 48 + 208. The mix changes at row 40 + ceil(860 / 32) = 67, annealing begins at row 88 + 7 · 16 = 200.
    sources = result["sources"]
    assert sources["code"]["rows"] + sources["prose"]["rows"] == 296
    assert sources["code"]["rows"] == pytest.approx(0.75 * 67 + 0.5 * 133, abs=3)
    assert sources["prose"]["share"] == sources["prose"]["rows"] / 296
    assert sources["prose"]["epochs"] > 4 > sources["code"]["epochs"] > 0
    assert result["left_out_documents"] == 1
    total = sources["code"]["tokens"] + sources["prose"]["tokens"]
    assert result["corpus_tokens"] == total
    read = [sources[name]["epochs"] * sources[name]["tokens"] for name in SOURCES]
    assert result["epochs"] == pytest.approx(sum(read) / total)
    # FLOPs of each phase's own row length.
    share, shape = result["supervised_tokens"] / result["tokens"], shape_for(words)
    flops = 640 * training_flops_per_token(shape, 16, share) + (1536 + 6656) * training_flops_per_token(
        shape, 32, share
    )
    assert result["training_flops"] == pytest.approx(flops)
    assert result["row_tokens"] == pytest.approx((640 * 16 + 8192 * 32) / 8832)


def test_mfu_along_the_way_is_of_the_rows_of_that_step(ramp: tuple[Path, _Weights], words: tokenizer.Tokenizer) -> None:
    lines = [line for line in _lines(ramp[0]) if "mfu" in line]
    assert {line["step"] for line in lines} >= {5, 6, 24}
    measured = [line["mfu"] / line["tokens_per_second"] for line in lines]
    counted = [
        training_flops_per_token(
            shape_for(words), 16 if line["step"] <= 5 else 32, line["supervised_tokens"] / line["tokens"]
        )
        for line in lines
    ]
    assert counted[-1] > 1.02 * counted[0]  # and the share of supervised tokens moves it by 0.0002
    assert [m / measured[0] for m in measured] == pytest.approx([c / counted[0] for c in counted], rel=0.001)


def test_the_rate_falls_to_zero_and_the_end_is_the_mean_of_annealing(ramp: tuple[Path, _Weights]) -> None:
    out, seen = ramp
    rates = [line["lr"] for line in _lines(out) if "lr" in line]
    assert rates[17] == pytest.approx(0.001)  # the cosine's end, at a tenth of the peak
    assert rates[18:] == pytest.approx([0.001 * (5 - i) / 6 for i in range(6)])
    assert seen.steps == list(range(1, 25))
    with checkpoint.open_checkpoint(out / "checkpoint") as saved:
        ours = np.concatenate([array.ravel() for array in saved.values()])
    mean = torch.stack(seen.weights[-6:]).mean(0).numpy()
    np.testing.assert_allclose(ours, mean, atol=1e-6)
    longer = torch.stack(seen.weights[-7:]).mean(0).numpy()
    assert np.abs(ours - longer).max() > 1e-5


def test_annealing_reads_its_own_mix(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    """The tokens of the last steps are those of prose alone; those before are mixed."""
    config = _config(**RAMP)
    files = prepare(corpus, words, tmp_path, 300, config.parts)
    sizes = config.sizes()
    rows = phase_rows(config, mixture(config, files.sources), files.train.eos_id)
    source = PhasedSource(sizes, rows, config.train.micro_batch_rows)
    prose = {pair for ids in files.sources["prose"] for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)}

    def shares(steps: range) -> float:
        batches = [batch for step in steps for batch in source.batch(step)]
        weighted = [batch.weights_BS > 0 for batch in batches]
        pairs = [
            pair
            for batch, here in zip(batches, weighted, strict=True)
            for pair in zip(batch.tokens_BS[here].tolist(), batch.targets_BS[here].tolist(), strict=True)
        ]
        return sum(pair in prose for pair in pairs) / len(pairs)

    assert shares(range(18, 24)) == 1.0
    assert shares(range(18)) < 0.8


def test_an_interrupted_run_ends_in_the_same_weights(
    ramp: tuple[Path, _Weights],
    corpus: Path,
    words: tokenizer.Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Trainer.train_step

    def stop(self: Trainer[Any]) -> None:
        if self.step == 20:
            raise RuntimeError("the power fails")
        step(self)

    monkeypatch.setattr(Trainer, "train_step", stop)
    config = _config(**RAMP | {"train": {"anneal": 6, "checkpoint_every": 19}})
    with pytest.raises(RuntimeError, match="power"):
        run(config, shape_for(words), corpus, words, tmp_path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="other data"):  # another mix is another run
        run(config.model_copy(update={"mix": ()}), shape_for(words), corpus, words, tmp_path)
    assert run(config, shape_for(words), corpus, words, tmp_path)["resumed_from"] == 19
    paths = tmp_path / "checkpoint", ramp[0] / "checkpoint"
    with checkpoint.open_checkpoint(paths[0]) as one, checkpoint.open_checkpoint(paths[1]) as other:
        assert all((one[name] == other[name]).all() for name in other)


class _Rank(OneRank):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_the_order_is_that_of_one_rank_on_any_number_of_ranks(
    corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    """A run that goes on with 1, 2, 4 and 1 ranks reads the rows of one that never changed, in the same order."""
    config = _config(**RAMP)
    files = prepare(corpus, words, tmp_path, 300, config.parts)

    def source(rank: int, size: int) -> PhasedSource:
        rows = phase_rows(config, mixture(config, files.sources), files.train.eos_id)  # each process makes its own
        return PhasedSource(config.sizes(), rows, 2, _Rank(rank, size))

    alone, sizes = source(0, 1), config.sizes()
    for step in range(24):  # the run's rows one after the other, whatever the phase
        phase = sizes[sizes.number(step)]
        rows = MixedRows(mixture(config, files.sources), sizes.rows_before(step), phase.batch_size, files.train.eos_id)
        tokens = torch.cat([part.tokens_BS for part in alone.batch(step)])
        assert torch.equal(tokens, torch.from_numpy(rows.batch(0).tokens))
    for steps, size in ((range(4), 1), (range(4, 12), 2), (range(12, 18), 4), (range(18, 24), 1)):
        ranks = [source(rank, size) for rank in range(size)]
        assert len({rank.fingerprint() for rank in [alone, *ranks]}) == 1
        for step in steps:
            whole = [torch.cat(field) for field in zip(*alone.batch(step), strict=True)]
            parts = [part for rank in ranks for part in rank.batch(step)]
            together = [torch.cat(field) for field in zip(*parts, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(whole, together, strict=True))
    # Micro-batches keep their tokens where rows grow: two rows of 16, one of 32.
    assert [len(part.tokens_BS) for part in alone.batch(0)] == [2] * 4
    assert [len(part.tokens_BS) for part in alone.batch(6)] == [1] * 8
    with pytest.raises(UsageError, match="batch_size 8 on 3 ranks"):
        source(0, 3)


def test_documents_go_to_the_first_source_they_fit(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    config = _config(sources=SOURCES | {"rest": {"weight": 1}})
    files = prepare(corpus, words, tmp_path, 300, config.parts)
    assert {name: len(shards) for name, shards in files.sources.items()} == {"code": 60, "prose": 12, "rest": 1}
    assert files.left_out == 0 and len(files.train) == 73
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/tokens.bin")}
    again = prepare(corpus, words, tmp_path, 300, config.parts)
    assert made == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/tokens.bin")}
    assert again.left_out == 0
    weights = _config(sources={name: {**source, "weight": 7} for name, source in SOURCES.items()})
    assert prepare(corpus, words, tmp_path, 300, weights.parts).left_out == 1
    with pytest.raises(UsageError, match="of the source 'none'"):
        prepare(corpus, words, tmp_path, 300, _config(sources={**SOURCES, "none": {"weight": 1, "kind": "code"}}).parts)


def test_shards_made_elsewhere_are_a_source(corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    made = prepare(corpus, words, tmp_path / "elsewhere", 300)
    shards = {"weight": 1, "shards": [str(tmp_path / "elsewhere" / "train")]}
    files = prepare(corpus, words, tmp_path / "here", 300, _config(sources={"old": shards}).parts)
    assert [ids.tolist() for ids in files.sources["old"]] == [ids.tolist() for ids in made.train]
    assert not (tmp_path / "here" / "train").exists()
    with pytest.raises(UsageError, match="another vocabulary than the tokenizer"):
        other = tokenizer.train([_code(n) for n in range(99)], 290, n_specials=16)
        prepare(corpus, other, tmp_path / "other", 300, _config(sources={"old": shards}).parts)


def test_training_goes_on_from_a_checkpoint(
    ramp: tuple[Path, _Weights], corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    before = ramp[0] / "checkpoint"
    config = _config(init_from=str(before), train={"steps": 3, "seq_len": 32, "lr": 1e-5, "warmup": 0})
    longer = shape_for(words, context_length=128, rope_theta=2e6)
    run(config, longer, corpus, words, tmp_path / "longer")
    with checkpoint.open_checkpoint(before) as one, checkpoint.open_checkpoint(tmp_path / "longer/checkpoint") as other:
        assert other.config.context_length == 128 and other.config.rope_theta == 2e6
        # Adam's steps of 1e-5 each: the weights are still those they began with.
        worst = max(np.abs(one[name] - other[name]).max() for name in one)
        assert 1e-6 < worst < 1e-4
    fresh = config.model_copy(update={"init_from": None})
    with pytest.raises(UsageError, match="other data"):  # the same directory, from other weights
        run(fresh, longer, corpus, words, tmp_path / "longer")
    with pytest.raises(UsageError, match="another ffn_dim than the model to train; got 64; allowed: 96"):
        run(config, shape_for(words, ffn_dim=96), corpus, words, tmp_path / "wide")
    other_words = tokenizer.train([_prose(n) for n in range(99)], words.vocab_size, n_specials=16)
    with pytest.raises(UsageError, match="another vocabulary"):
        run(config, longer, corpus, other_words, tmp_path / "words")
    with pytest.raises(HerdError):
        run(config.model_copy(update={"init_from": "nowhere"}), longer, corpus, words, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="rows are longer than the model's context; got 32"):
        run(_config(**RAMP), shape_for(words, context_length=16), corpus, words, tmp_path / "short")


RANKS = """
import os, sys
import torch.distributed as dist
from tests.pretrain import test_pretrain_mixture as case
from tests.pretrain.little import shape_for
from herd import tokenizer
from herd.pretrain import run
from pathlib import Path

corpus, words, out, steps = Path(sys.argv[1]), tokenizer.load(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def rank(number):
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=number, world_size=2)
    config = case._config(**case.RAMP | {"train": {"anneal": 6, "checkpoint_every": 9}})
    run(config, shape_for(words), corpus, words, out)
    dist.destroy_process_group()

child = os.fork()
if child == 0:
    try:
        rank(1)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
rank(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_two_real_ranks_go_on_with_what_one_began(
    ramp: tuple[Path, _Weights],
    corpus: Path,
    words: tokenizer.Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank stops at step 9; two ranks over gloo resume its state and finish: the losses are those of one rank."""
    step = Trainer.train_step

    def stop(self: Trainer[Any]) -> None:
        if self.step == 9:
            raise RuntimeError("the power fails")
        step(self)

    monkeypatch.setattr(Trainer, "train_step", stop)
    config = _config(**RAMP | {"train": {"anneal": 6, "checkpoint_every": 9}})
    with pytest.raises(RuntimeError, match="power"):
        run(config, shape_for(words), corpus, words, tmp_path / "run")
    monkeypatch.undo()
    words.save(tmp_path / "words")
    command = [sys.executable, "-c", RANKS, str(corpus), str(tmp_path / "words"), str(tmp_path / "run"), "24"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["resumed_from"] == 9 and result["steps"] == 24
    expected = json.loads((ramp[0] / "result.json").read_text())
    assert result["sources"] == expected["sources"] and result["tokens"] == expected["tokens"]
    losses = [[line["loss"] for line in _lines(out) if "loss" in line] for out in (tmp_path / "run", ramp[0])]
    assert len(losses[0]) == 24 and losses[0] == pytest.approx(losses[1], rel=2e-4)
    paths = tmp_path / "run" / "checkpoint", ramp[0] / "checkpoint"
    with checkpoint.open_checkpoint(paths[0]) as one, checkpoint.open_checkpoint(paths[1]) as other:
        assert max(np.abs(one[name] - other[name]).max() for name in other) < 2e-3


def test_rows_of_a_run_come_in_the_shares_that_were_asked_for(
    corpus: Path, words: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    """Counted from the tokens themselves: three quarters of the rows are of code, in every stretch of the run."""
    config = _config(sources=SOURCES, train={"batch_size": 16})
    files = prepare(corpus, words, tmp_path, 300, config.parts)
    (rows,) = phase_rows(config, mixture(config, files.sources), files.train.eos_id)
    code = {ids[1:].tobytes() for ids in files.sources["code"]}
    pairs = Counter(
        pair for ids in files.sources["code"] for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)
    )
    assert code
    for step in (0, 7, 100, 10**6):
        batch = rows.batch(step)
        of_code = [
            all(pair in pairs for pair in zip(t[w > 0].tolist(), y[w > 0].tolist(), strict=True))
            for t, y, w in zip(batch.tokens, batch.targets, batch.weights, strict=True)
        ]
        assert sum(of_code) == 12
