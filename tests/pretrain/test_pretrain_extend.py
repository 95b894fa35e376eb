"""An extension that is trained: shapes, texts and criteria of each stage, and where it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from herd import checkpoint
from herd.architecture import law_theta
from herd.cli import main
from herd.corpus import Document, TokenShards, read_documents
from herd.corpus.document import write_documents
from herd.errors import UsageError
from herd.pretrain import ExtendConfig, extend
from herd.pretrain.extending import _halvings, _some_as_chats
from herd.recipe.lock import run_lock
from tests.pretrain.by_hand import bits_per_byte
from tests.pretrain.little import functions, shape_for, trained, vocabulary, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), count=3, train=120, heldout=20)


@pytest.fixture(scope="module")
def short(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little model that has learnt rows of 32 tokens."""
    words = vocabulary(corpus)
    shape = shape_for(words, context_length=32, rope_theta=1e4)
    return trained(corpus, words, shape, 40, tmp_path_factory.mktemp("short"))


FAST: dict[str, Any] = {"steps": 3, "batch_size": 4, "lr": 1e-4}


def _needles(shares: dict[int, float], asked: list[int]) -> Any:
    def needles(path: Path, context: int, place: Path) -> float:
        with checkpoint.open_checkpoint(path) as opened:
            assert opened.config.context_length == context
        asked.append(context)
        return shares[context]

    return needles


@pytest.fixture(scope="module")
def extended(
    short: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[int]]:
    """To 1,024 tokens, where 256 come first; all criteria are met."""
    out, asked = tmp_path_factory.mktemp("extended"), list[int]()
    config = ExtendConfig(**FAST, tolerance=0.5)
    state = extend(short, 1024, corpus, out, config, _needles({256: 1.0, 1024: 1.0}, asked))
    return out, state, asked


def test_stages_follow_each_other_with_their_own_shape(
    extended: tuple[Path, dict[str, Any], list[int]], short: Path
) -> None:
    out, state, asked = extended
    assert asked == [256, 1024] and state["stopped"] is None
    assert state["model"] == str(out / "stage-1024" / "checkpoint")
    for context in asked:
        with checkpoint.open_checkpoint(out / f"stage-{context}" / "checkpoint") as opened:
            assert opened.config.context_length == context
            assert opened.config.rope_theta == pytest.approx(law_theta(1e4, 32, context), rel=5e-4)
    # The second begins with the first's weights: three steps of at most 1e-4 each away.
    with (
        checkpoint.open_checkpoint(out / "stage-256" / "checkpoint") as one,
        checkpoint.open_checkpoint(out / "stage-1024" / "checkpoint") as other,
        checkpoint.open_checkpoint(short) as first,
    ):
        for a, b in ((first, one), (one, other)):
            assert 1e-6 < max(abs(a[name] - b[name]).max() for name in a) < 4e-4
    result = json.loads((out / "stage-256" / "result.json").read_text())
    assert result["steps"] == 3 and result["tokens"] == 3 * 4 * 256


def test_rows_are_filled_by_joined_documents(extended: tuple[Path, dict[str, Any], list[int]], corpus: Path) -> None:
    out = extended[0]
    for context in (256, 1024):
        joined = list(read_documents(out / f"stage-{context}" / "corpus" / "train.jsonl"))
        urls = [url for document in joined for url in document.meta.get("parts", [document.url])]
        assert sorted(urls) == sorted(document.url for document in read_documents(corpus / "train.jsonl"))
        lengths = TokenShards(out / f"stage-{context}" / "tokens" / "train").lengths
        long = lengths[lengths > context]
        assert long.sum() > 0.8 * lengths.sum(), "most text is in documents that fill a row"


def test_short_text_is_measured_in_short_windows(extended: tuple[Path, dict[str, Any], list[int]], short: Path) -> None:
    out, state, _ = extended
    probe = TokenShards(out / "tokens" / "probe")
    assert state["short_before"] == pytest.approx(bits_per_byte(short, probe, 32), rel=1e-4)
    for stage in state["stages"]:
        path = out / f"stage-{stage['plan']['context']}" / "checkpoint"
        assert stage["short"] == pytest.approx(bits_per_byte(path, probe, 32), rel=1e-4)
        assert [one["name"] for one in stage["criteria"]] == ["bits per byte of short text", "needles found"]
        assert stage["criteria"][0]["wanted"] == pytest.approx(1.5 * state["short_before"])


def test_called_again_it_only_judges(
    extended: tuple[Path, dict[str, Any], list[int]], short: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, state, _ = extended
    monkeypatch.setattr("herd.pretrain.extending.run", lambda *_: pytest.fail("trained again"))
    config = ExtendConfig(**FAST, tolerance=0.5)
    never = _needles({}, [])
    again = extend(short, 1024, corpus, out, config, never)
    assert again == state
    # Judged otherwise, the same stages end elsewhere.
    strict = extend(short, 1024, corpus, out, config.model_copy(update={"tolerance": 0.0}), never)
    first = state["stages"][0]["short"]
    assert (strict["stopped"] is None) == (first <= state["short_before"] >= state["stages"][1]["short"])
    with pytest.raises(UsageError, match="was begun with steps=3; got steps=4"):
        extend(short, 1024, corpus, out, config.model_copy(update={"steps": 4}), never)
    with pytest.raises(UsageError, match="was begun with to=1024; got to=512"):
        extend(short, 512, corpus, out, config, never)
    extend(short, 1024, corpus, out, config, never)


def test_it_stops_where_needles_are_lost(
    short: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    config = ExtendConfig(**FAST, tolerance=1.0, needles=0.9)
    state = extend(short, 1024, corpus, tmp_path, config, _needles({256: 0.8, 1024: 1.0}, asked))
    assert asked == [256] and not (tmp_path / "stage-1024").exists()
    assert state["stopped"] == "at 256 tokens: needles found 0.8, at least 0.9 wanted"
    assert state["model"] == str(short)
    assert "the extension stops at 256 tokens" in capsys.readouterr().err
    assert json.loads((tmp_path / "extension.json").read_text()) == state


def test_it_stops_where_short_text_is_lost(short: Path, corpus: Path, tmp_path: Path) -> None:
    """At a rate that destroys the model."""
    config = ExtendConfig(steps=3, batch_size=4, lr=0.5, warmup=0)
    state = extend(short, 256, corpus, tmp_path, config)
    assert state["stopped"].startswith("at 256 tokens: bits per byte of short text")
    assert state["stages"][0]["short"] > 1.02 * state["short_before"]


def test_what_cannot_be_extended(short: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    write_documents(alone / "train.jsonl", [Document(functions(1, 3), "a")])
    with pytest.raises(UsageError, match="no held-out text"):
        extend(short, 256, alone, tmp_path / "out", ExtendConfig())
    with pytest.raises(UsageError, match="more than 32"):
        extend(short, 32, alone, tmp_path / "out", ExtendConfig())


def _herd(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def test_the_verb(short: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, the native engine's needle grid included; a model that has learnt nothing finds none."""
    pytest.importorskip("herd._native")
    out = str(tmp_path / "out")
    options = ["--corpus", str(corpus), "--out", out, "--steps", "2", "--batch-size", "2", "--tolerance", "1"]
    options += ["--depths", "2", "--samples", "1", "--haystack", str(corpus / "train.jsonl")]
    assert _herd("extend", str(short), "--to", "256", *options, "--json") == 1
    state = json.loads(capsys.readouterr().out)
    assert state["stages"][0]["needles"] == 0 and "needles found 0, at least 1 wanted" in state["stopped"]
    grid = json.loads((tmp_path / "out" / "stage-256" / "needle" / "needle.json").read_text())
    assert grid["config"]["lengths"] == [256] and grid["overall"]["n"] == 2
    assert _herd("extend", str(short), "--to", "256", *options, "--needles", "0") == 0
    assert "reached 256 tokens" in capsys.readouterr().out
    assert _herd("extend", str(short), "--to", "256") == 2
    assert "--corpus" in capsys.readouterr().err
    assert _herd("extend", str(short), "--to", "256", "--method", "foo", *options[:4]) == 2
    assert "'card', 'law', 'ntk', 'linear', 'yarn' or 'llama3'" in capsys.readouterr().err
    assert _herd("extend", str(short), "--to", "256", "--tolerance", "2", *options[:4]) == 2
    assert "tolerance" in capsys.readouterr().err


def test_another_extension_into_the_same_folder_waits_outside(
    short: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "long"
    arguments = ["extend", str(short), "--to", "64", "--corpus", str(corpus), "--out", str(out)]
    with run_lock(out):
        assert _herd(*arguments) == 4 and "another run is writing" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_make_the_model_of_one_process(short: Path, corpus: Path, tmp_path: Path) -> None:
    """Each has half of a row: a ring over two context ranks, two stages, and what rank 0 alone does in between."""
    options = ["--corpus", str(corpus), "--needles", "0", "--tolerance", "1", "--steps", "3", "--batch-size", "2"]
    command = ["-m", "herd", "extend", str(short), "--to", "512", *options, "--lr", "1e-4", "--json"]
    ring = ["--parallel", "cp=2", "--parallel", "context=ring"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = []
    for name, launcher, more in (("one", [], []), ("two", torchrun, ring)):
        done = subprocess.run(
            [sys.executable, *launcher, *command, *more, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(json.loads(done.stdout))  # one account: only the first rank prints
    one, two = said
    assert [stage["plan"]["context"] for stage in two["stages"]] == [256, 512] and two["stopped"] is None
    for a, b in zip(one["stages"], two["stages"], strict=True):
        assert a["result"]["tokens"] == b["result"]["tokens"]
        assert b["short"] == pytest.approx(a["short"], rel=1e-3)
    with (
        checkpoint.open_checkpoint(short) as before,
        checkpoint.open_checkpoint(one["model"]) as first,
        checkpoint.open_checkpoint(two["model"]) as second,
    ):
        way = sum(float(((first[name] - before[name]) ** 2).sum()) for name in before)
        apart = sum(float(((first[name] - second[name]) ** 2).sum()) for name in before)
    assert 0 < apart < 0.01 * way  # squares; in bf16 the signs of small gradients differ


def test_ranks_are_told_what_does_not_fit(
    short: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["extend", str(short), "--to", "64", "--corpus", str(corpus), "--out", str(tmp_path / "out")]
    assert _herd(*given, "--parallel", "cp") == 2 and "--parallel cp=2" in capsys.readouterr().err
    assert _herd(*given, "--parallel", "cq=2") == 2 and "cq" in capsys.readouterr().err
    assert _herd(*given, "--parallel", "cp=2", "--optimizer", "muon") == 2 and "use adamw" in capsys.readouterr().err
    assert _herd(*given, "--needles", "0", "--parallel", "cp=2") == 2 and "torchrun" in capsys.readouterr().err


def test_some_documents_become_long_chats(short: Path, corpus: Path, tmp_path: Path) -> None:
    config = ExtendConfig(**FAST, chats=0.5, tolerance=1)
    extend(short, 256, corpus, tmp_path, config)
    texts = [document.url for document in read_documents(tmp_path / "stage-256" / "corpus" / "train.jsonl")]
    chats = [url for url in texts if "#chat" in url]
    assert 0.2 < len(chats) / len(texts) < 0.95


def test_chats_are_of_all_lengths_between_the_contexts() -> None:
    texts = ["\n".join(functions(100 * n + i, 3) for i in range(120)) for n in range(80)]
    documents = [Document(text, f"lib{n}/x.py") for n, text in enumerate(texts)]
    lengths = [16_000 // part for part in _halvings(512 // 128)]
    assert lengths == [16_000, 8_000, 4_000]
    chats = list(_some_as_chats(documents, lengths, ExtendConfig(chats=1)))
    share = dict.fromkeys(lengths, 0)
    for chat in chats:
        share[min(length for length in lengths if chat.n_bytes < 1.1 * length)] += chat.n_bytes
    assert all(0.15 < size / sum(share.values()) < 0.6 for size in share.values()), share
