"""Published cluster configurations on ranks that are not there: every split is real, nothing is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from herd.architecture import parameter_count, releases, tensor_shapes
from herd.errors import UsageError
from herd.train.parallel import ParallelConfig
from herd.train.parallel.dry_run import HeldModel, dry_run

PAPER = {"tp": 8, "pp": 16, "virtual": 8, "schedule": "interleaved", "shard": True}
RUNS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama3.1-8b", 8, {"shard": True}),
    ("llama3.1-70b", 256, {"tp": 8, "shard": True}),
    ("llama3.1-405b", 8192, PAPER),  # Table 4 of the Llama 3 paper, its three rows
    ("llama3.1-405b", 16384, PAPER),
    ("llama3.1-405b", 16384, {**PAPER, "cp": 16}),
    ("llama3.1-405b", 512, {"tp": 16, "pp": 4, "shard": True}),  # more tensor ranks than key heads
    ("llama3.2-1b", 64, {"tp": 4, "pp": 2, "shard": True}),  # tied
    ("llama4-scout-17b-16e", 512, {"tp": 8, "ep": 16, "shard": True}),
    ("llama4-maverick-17b-128e", 1024, {"tp": 4, "ep": 128, "shard": True, "replicas": 2}),
]


@pytest.mark.parametrize("name, ranks, split", RUNS, ids=[f"{name} on {ranks}" for name, ranks, _ in RUNS])
def test_every_rank_holds_its_share(name: str, ranks: int, split: dict[str, Any]) -> None:
    config, parallel = releases[name].config, ParallelConfig(**split)
    pp, block = parallel.pp, parallel.tp * parallel.cp
    stages = [
        dry_run(config, parallel, ranks, rank=stage * block) for stage in (range(pp) if pp < 5 else (0, 7, pp - 1))
    ]
    for held in stages:
        _check_shapes(held, name, parallel, ranks)
    if pp < 5:  # all stages were looked at: together they have every tensor once, and a tied embedding twice
        layers = [layer for held in stages for layer in held.layers]
        assert layers == list(range(config.n_layers))
        names = {tensor.name for held in stages for tensor in held.tensors}
        assert names - {"output.weight"} == set(tensor_shapes(config)) - {"output.weight"}
    shards = ranks // pp // parallel.tp // parallel.replicas
    whole = parameter_count(config) / (pp * parallel.tp * shards)
    # What does not divide is on the first ranks: norms are on all tensor ranks, and the first stage has the embedding.
    assert stages[0].parameters < 1.6 * whole + 1e6


def _check_shapes(held: HeldModel, name: str, parallel: ParallelConfig, ranks: int) -> None:
    shapes = tensor_shapes(releases[name].config)
    sizes = {"tp": parallel.tp, "ep": parallel.ep}
    for tensor in held.tensors:
        whole = shapes["embed.weight" if tensor.name == "output.weight" and tensor.name not in shapes else tensor.name]
        assert tensor.shape == tuple(whole)
        split = math.prod(tensor.shape) / math.prod(tensor.local_shape)
        shards = ranks // parallel.pp // parallel.tp // parallel.replicas
        expert = ".experts." in tensor.name
        by_tp = "norm" not in tensor.name and "router" not in tensor.name
        if by_tp and tensor.name.split(".")[-2] in ("wk", "wv"):
            by_tp = releases[name].config.n_kv_heads % parallel.tp == 0
        expected = shards * (sizes["tp"] if by_tp else 1)
        if expert:
            assert split == expected, tensor  # whatever the number of experts, no rank has more than its share
            continue
        # The others lie along their first axis, of which the first ranks have the larger part.
        rows = tensor.shape[0] // (sizes["tp"] if by_tp and tensor.local_shape[1:] == tensor.shape[1:] else 1)
        assert split == pytest.approx(expected * rows / shards / math.ceil(rows / shards)), tensor


def test_a_layout_that_does_not_divide_is_refused_before_anything_is_split() -> None:
    parallel = ParallelConfig(tp=3, shard=True)
    with pytest.raises(UsageError, match="a multiple of 3 ranks"):
        dry_run(releases["llama3.1-8b"].config, parallel, 64)
    with pytest.raises(UsageError, match="tp=3 does not divide n_heads = 32"):
        parallel.check(releases["llama3.1-8b"].config, 8192, 512, 1, 63)
