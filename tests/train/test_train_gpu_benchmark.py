"""benchmarks/train_gpu.py on a small scale: what it runs on GPUs, and the arithmetic of its table."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao", reason="torchao is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks"
KINDS = [(precision, system) for precision in ("bf16", "float8") for system in ("herd", "plain")]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("train_gpu")


def run(command: list[str], *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [*command, str(FOLDER / "train_gpu.py"), "--device", "cpu", "--shrink", "--json", "--minutes", "30", *options],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "29617"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(result: dict[str, Any], shapes: list[str], ranks: int) -> None:
    rows = result["rows"]
    assert [(r["shape"], r["precision"], r["system"]) for r in rows] == [(s, *kind) for s in shapes for kind in KINDS]
    for herd, plain in zip(rows[::2], rows[1::2], strict=True):
        assert herd["ranks"] == ranks
        assert herd["herd_is"] == pytest.approx(herd["tokens_per_second"] / plain["tokens_per_second"], abs=2e-3)
        for row in (herd, plain):
            assert row["loss"] == pytest.approx(math.log(256), abs=0.3), "random tokens out of 256"
            assert "mfu" not in row, "no card, no published peak"
            # 3 layers of 64 · (64 + 32 + 32 + 64) and 3 · 64 · 128, and the output of 64 · 256; 4 heads of 16 over 32.
            flops = 6 * (3 * (64 * 192 + 3 * 64 * 128) + 64 * 256 + 3 * (2 * 64) + 64 + 3 * 64 * 32)
            assert row["flops_per_second"] / row["tokens_per_second"] == pytest.approx(flops, rel=0.02)
            share = row["flops_per_second"] / result["matmul_flops"]
            assert row["mfu_of_matmul"] == pytest.approx(share)
            assert row["flops_per_second_as_torchtitan"] > row["flops_per_second"]


def test_every_system_trains_in_every_precision() -> None:
    check(run([sys.executable], "--shape", "8b-width", "--documents", "3"), ["8b-width"], 1)


@pytest.mark.slow
def test_two_ranks_shard_and_recompute() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29618"]
    check(run(torchrun, "--shape", "1b", "--recompute", "selective", "--reshard"), ["1b"], 2)


@pytest.mark.parametrize("name", ["1b", "3b", "8b-width"])
def test_both_systems_have_as_many_weights_and_fit_a_gpu_of_80_gb(script: ModuleType, name: str) -> None:
    from train_gpu_peer import PlainLlama

    from herd.model import Llama

    with torch.device("meta"):
        ours, peer = (kind(script.SHAPES[name].config) for kind in (Llama, PlainLlama))
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    # fp32 weights, gradients and two moments, and a bf16 copy: some 20 GB are left for activations and logits.
    assert 18 * count < 60e9


@pytest.mark.parametrize("name", ["1b", "8b-width"])
def test_the_peer_is_the_same_model(script: ModuleType, name: str) -> None:
    """The same logits from the same weights. The peer turns halves of a head where Herd turns neighbours."""
    from train_gpu_peer import PlainLlama

    from herd.model import Llama

    config = dataclasses.replace(script.shrunk(script.SHAPES[name]).config, rope_scaling=None)
    ours, peer = Llama(config), PlainLlama(config)
    torch.manual_seed(0)
    weights = {key: torch.randn(weight.shape) / 8 for key, weight in ours.state_dict().items()}
    ours.load_state_dict(weights)
    for key, weight in weights.items():
        if ".wq." in key or ".wk." in key:
            weights[key] = torch.unflatten(weight, 0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
    peer.load_state_dict(weights)
    tokens = torch.arange(64).view(2, 32)
    pairs = torch.arange(0, 16, 2) / 16
    angles = torch.arange(32).unsqueeze(1) / config.rope_theta**pairs
    torch.testing.assert_close(peer(tokens, angles.cos(), angles.sin()), ours(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("card", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("Tesla T4", None),
    ],
)
def test_the_published_peak_is_found_by_the_cards_name(script: ModuleType, card: str, tera: float | None) -> None:
    assert script.published_peak(card) == (None if tera is None else tera * 1e12)


def test_without_a_gpu_nothing_is_measured(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_gpu.py"])
    assert script.main() == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no GPU" in captured.err
