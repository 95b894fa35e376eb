"""`herd bench`: what it reports, how it compares, and the arithmetic behind its shares; never how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import checkpoint
from herd.architecture import LlamaConfig, MoeConfig, multiplying_parameter_count, tensor_shapes
from herd.cli import main
from herd.errors import HerdError, ResourceError

pytest.importorskip("herd._native")

from herd.engine import measure
from herd.engine.backend import BackendOptions, open_backend, thread_count

TINY = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    vocab_size=320,
    rope_theta=10_000.0,
    context_length=192,
)
SHORT = ("--prompt", "32", "--steps", "4", "--repetitions", "2", "--threads", "1")


def write(path: Path, config: LlamaConfig = TINY, dtype: str = "q8_0") -> Path:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    return checkpoint.save(path, config, tensors, format="gguf", dtype=dtype)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measure, "_PROBE_BYTES", 64 << 20)
    return write(tmp_path / "tiny.gguf")


def program(path: Path, script: str) -> Path:
    """A stand-in for llama-bench."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def bench(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_json_has_speeds_shares_and_what_was_skipped(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(model, *SHORT, "--batches", "1,3", "--depth", "0,40,4096", "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"model", "parameters", "weight_bytes", "kv", "context", "threads", "cpu", "isa"} <= result.keys()
    assert result["context"] == 44 and result["threads"] == 1
    assert result["load_seconds"] > 0
    memory = result["peak_memory_bytes"]
    assert 0 < memory["loading"] <= memory["first_measurement"]
    assert all(result["limits"][key] > 0 for key in ("bandwidth", "int8", "f32"))
    rows = {row["what"]: row for row in result["measurements"]}
    assert list(rows) == ["prefill 32", "decode 1", "decode 3", "decode 1 at depth 40"]
    for name, row in rows.items():
        speed = row["tokens_per_second"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"] and speed["repetitions"] == 2
        assert row["share_of_peak"] > 0
        assert row["share_of_bandwidth"] is None if name.startswith("prefill") else row["share_of_bandwidth"] > 0
        assert row["peer_tokens_per_second"] is None and row["ratio"] is None
    assert result["skipped"] == ["decode 1 at depth 4096: needs more than the 192 tokens of context"]


def test_people_get_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(model, *SHORT, "--batches", "2", "--kv", "int8", "--quant", "f32") == 0
    shown = capsys.readouterr().out
    assert "prefill 32" in shown and "decode 2" in shown and "of bandwidth" in shown and "peer" not in shown
    assert "skipped decode 2 at depth 4096" in shown


def test_another_program_runs_on_the_same_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = program(tmp_path / "llama-bench", f"""echo "$@" >> {tmp_path}/calls; echo '[{{"avg_ts": 0.001}}]'""")
    assert bench(model, *SHORT, "--batches", "1,2", "--depth", "0,10", "--against", peer, "--json") == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["measurements"]}
    assert {name for name, row in rows.items() if row["ratio"]} == {"prefill 32", "decode 1", "decode 1 at depth 10"}
    assert rows["decode 1"]["ratio"] == pytest.approx(1000 * rows["decode 1"]["tokens_per_second"]["median"])
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6
    assert all(f"-m {model} -t 1 " in call and "-ctk f16 -ctv f16" in call for call in calls)
    assert [call.count("-p 32 -n 0 -d 0") for call in calls] == [1, 1, 0, 0, 0, 0]
    assert [call.count("-p 0 -n 4 -d 10") for call in calls] == [0, 0, 0, 0, 1, 1]


def test_the_threads_that_run_are_used_and_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than there are processors are not run: not by Herd, not for the limits, and not by the other program."""
    usable = thread_count(None)
    peer = program(tmp_path / "llama-bench", f"""echo "$@" >> {tmp_path}/calls; echo '[{{"avg_ts": 1}}]'""")
    options = (*SHORT[:-1], "999", "--batches", "1", "--depth", "0", "--against", peer, "--json")
    assert bench(model, *options) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["threads"] == usable
    assert f"-t {usable} " in (tmp_path / "calls").read_text()
    assert shown.err.splitlines() == [
        f"herd: --threads 999 are more than the {usable} usable here: running with {usable}"
    ]
    assert bench(model, *SHORT[:-2], "--batches", "1", "--depth", "0", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["threads"] == usable and shown.err == ""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo loading >&2; echo 'error: no such tensor' >&2; exit 7", "ended with code 7, its last lines:\n  loading"),
        ("exit 1", "ended with code 1, and printed nothing"),
        ("kill -9 $$", "died of signal 9"),
        ("echo '| model | t/s |'", "did not print its result as JSON, its last lines:\n  | model"),
        ("echo '[]'", "did not print its result as JSON"),
    ],
)
def test_a_failing_program_shows_its_last_lines(
    model: Path, tmp_path: Path, script: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(model, *SHORT, "--against", program(tmp_path / "llama-bench", script)) == 3
    shown = capsys.readouterr()
    assert f"herd: llama-bench {message}" in shown.err and shown.out == ""


def test_a_programs_words_cannot_steer_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(HerdError) as caught:
        measure.run_program(str(program(tmp_path / "p", r"printf '\033[2Jgone\n' >&2; exit 1")), [])
    assert "\x1b" not in str(caught.value) and "[2Jgone" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batches", "1,x"), "--batches is no list of numbers"),
        (("--batches", "0"), "allowed: numbers from 1 to 128"),
        (("--depth", ""), "--depth is no list of numbers"),
        (("--repetitions", "0"), "--repetitions is out of range"),
        (("--threads", "0"), "--threads is out of range"),
        (("--kv", "fp8"), "allowed: bf16, f32, int8"),
        (("--ctx", "3"), "nothing that is to be measured fits the context"),
        (("--ctx", "999"), "ctx is beyond the model's context"),
        (("--quant", "q9"), "weights cannot be held like this"),
        (("--against", "no-such-program"), "there is no such program"),
        (("--against", "sh", "--quant", "q4_0"), "--against compares on the same file"),
    ],
)
def test_wrong_use_is_explained(
    model: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(model, *arguments) == 2
    assert message in capsys.readouterr().err


def test_comparing_needs_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in tensor_shapes(TINY).items()}
    path = checkpoint.save(tmp_path / "hf", TINY, tensors)
    assert bench(path, "--against", "sh") == 2
    assert "herd quantize MODEL model.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_work_counts_what_multiplies(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(TINY, tied_embeddings=tied)
    work = measure.work_of(write(tmp_path / "m.gguf", config), None, "bf16")
    norms = sum(math.prod(shape) for shape in tensor_shapes(config).values() if len(shape) == 1)
    operations = work.operations(rows=1, outputs=1)
    assert operations == {"int8": 2 * (multiplying_parameter_count(config) - norms), "f32": 0, "bf16": 0}
    head = 2 * config.vocab_size * config.dim
    assert work.operations(rows=5, outputs=1)["int8"] == 5 * operations["int8"] - 4 * head
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2
    assert work.bytes_read(3, 100) - work.bytes_read(3, 0) == pytest.approx(3 * 100 * cache)
    assert work.bytes_read(3, 0) == work.bytes_read(1, 0)
    assert (work.bytes_read(1, 0) == work.weight_bytes) == tied


def test_plain_weights_count_as_plain_arithmetic(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", dtype="bf16")
    assert measure.work_of(path, None, "bf16").operations(1, 1)["int8"] == 0
    assert measure.work_of(path, "q4_0", "bf16").operations(1, 1)["f32"] == 0


def test_of_a_mixtures_experts_only_the_chosen_ones_are_read(tmp_path: Path) -> None:
    moe = MoeConfig(n_experts=4, top_k=1, ffn_dim=64)
    config = dataclasses.replace(TINY, generation="llama4", moe=moe)
    work = measure.work_of(write(tmp_path / "m.gguf", config), None, "bf16")
    one, many = work.bytes_read(1, 0), work.bytes_read(64, 0)
    experts = many - one
    layers = sum(config.is_moe_layer(i) for i in range(config.n_layers))
    per_weight = 34 / 32  # q8_0
    assert experts == pytest.approx(layers * 3 * 3 * config.dim * moe.ffn_dim * per_weight, rel=0.1)


def test_limits_take_the_better_of_two_measurements() -> None:
    best = measure.Limits(4.0, 8.0, 2.0, 3.0).best(measure.Limits(5.0, 6.0, 1.0, 4.0))
    assert best == measure.Limits(5.0, 8.0, 2.0, 4.0)
    assert best.share_of_bandwidth(10.0, 4.0) == 0.5
    assert best.share_of_peak({"int8": 8.0, "f32": 2.0, "bf16": 8.0}, 4.0) == 1.0


def test_measuring_gives_the_room_back_and_says_when_there_is_none(model: Path) -> None:
    backend = open_backend("native", BackendOptions(model, None, 64, 1, "f32"))
    runs = measure.measure_decode(backend, 3, 20, 5)
    assert next(runs) > 0 and next(runs) > 0
    runs.close()
    assert next(measure.measure_prefill(backend, 64)) > 0
    handles = []
    while (reserved := backend.reserve(1)) is not None:
        handles.append(reserved[0])
    assert len(handles) == backend.max_sequences
    for runs in (measure.measure_decode(backend, 1, 0, 1), measure.measure_prefill(backend, 8)):
        with pytest.raises(ResourceError, match="no room"):
            next(runs)
    backend.close()
