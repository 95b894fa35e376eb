"""The releases table against published integers, and the config's own checks."""

from __future__ import annotations

import dataclasses
import math

import pytest

from herd import UsageError
from herd.architecture import (
    LlamaConfig,
    MoeConfig,
    RopeScaling,
    active_parameter_count,
    ffn_width,
    kv_cache_bytes,
    parameter_count,
    releases,
    rope_frequencies,
    training_flops_per_token,
    weight_bytes,
)

SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=128)


@pytest.mark.parametrize("name", releases)
def test_parameter_count_from_shapes_is_the_published_integer(name: str) -> None:
    assert parameter_count(releases[name].config) == releases[name].parameters


# Written out from the model cards, independently of releases.py.
PUBLISHED = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b-instruct": 70_553_706_496,
    "llama4-scout-17b-16e": 107_769_861_120,
    "llama4-maverick-17b-128e": 400_711_848_960,
}


def test_every_release_of_the_fact_sheet_is_there() -> None:
    assert {name: releases[name].parameters for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "width"),
    [(4096, None, 256, 11008), (8192, 1.3, 4096, 28672), (4096, 1.3, 1024, 14336), (16384, 1.2, 4096, 53248)],
)
def test_ffn_width_rule(dim: int, multiplier: float | None, multiple_of: int, width: int) -> None:
    assert ffn_width(dim, multiplier, multiple_of) == width


def test_active_parameters_of_llama4_are_17_billion() -> None:
    assert round(active_parameter_count(releases["llama4-scout-17b-16e"].config) / 1e9, 2) == 17.17
    assert round(active_parameter_count(releases["llama4-maverick-17b-128e"].config) / 1e9, 2) == 17.18


def test_flops_of_405b_reproduce_the_paper() -> None:
    # 3.8e25 FLOPs for 15.6T tokens is 6·N·D; attention at 8K adds a few percent on top.
    flops = training_flops_per_token(releases["llama3.1-405b"].config, 8192) * 15.6e12
    assert 3.7e25 < flops < 4.1e25


def test_weight_and_cache_sizes() -> None:
    config = releases["llama3-8b"].config
    assert weight_bytes(config, "bf16") == 2 * 8_030_261_248
    assert 8.49 < 8 * weight_bytes(config, "q8_0") / 8_030_261_248 < 8.51
    assert kv_cache_bytes(config, 8192) == 2 * 32 * 8 * 128 * 8192 * 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"dim": 0}, "dim"),
        ({"dim": True}, "dim"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"norm_eps": math.nan}, "norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"norm_eps": 10**400}, "norm_eps"),
        ({"head_dim": 2, "rope_scaling": RopeScaling("dynamic", 2.0)}, "head_dim"),
        ({"generation": "llama9"}, "generation"),
        ({"qk_norm": True}, "qk_norm"),
        ({"moe": MoeConfig(4, 8)}, "moe"),
    ],
)
def test_contradictions_are_errors_that_name_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(UsageError, match=field):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [{"factor": 0.5}, {"factor": 8, "high_freq_factor": 0.5}, {"factor": math.inf}, {"factor": 1e7}]
)
def test_bad_rope_scaling(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="rope_scaling"):
        RopeScaling("llama3", **arguments)


@pytest.mark.parametrize("name", ["llama1-7b", "llama3.1-405b", "llama4-maverick-17b-128e"])
def test_plain_data_round_trip(name: str) -> None:
    config = releases[name].config
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_from_dict_is_strict() -> None:
    data = SMALL.to_dict()
    with pytest.raises(UsageError, match="hidden_size"):
        LlamaConfig.from_dict(data | {"hidden_size": 3})
    del data["dim"]
    with pytest.raises(UsageError, match="'dim' is missing"):
        LlamaConfig.from_dict(data)


def test_layer_kinds_of_llama4() -> None:
    scout, maverick = releases["llama4-scout-17b-16e"].config, releases["llama4-maverick-17b-128e"].config
    assert sum(not scout.uses_rope(i) for i in range(48)) == 12
    assert not scout.uses_rope(3) and scout.uses_rope(0)
    assert [maverick.is_moe_layer(i) for i in range(4)] == [False, True, False, True]
    assert all(scout.is_moe_layer(i) for i in range(48))


@pytest.mark.parametrize("kind", ["llama3", "linear", "dynamic", "yarn"])
@pytest.mark.parametrize("theta", [1.0000001, 1e4, 1e15])
@pytest.mark.parametrize("factor", [1.0, 1e6])
@pytest.mark.parametrize("head_dim", [4, 256])
def test_every_allowed_rope_gives_usable_frequencies(kind: str, theta: float, factor: float, head_dim: int) -> None:
    scaling = RopeScaling(kind, factor)  # type: ignore[arg-type]
    config = dataclasses.replace(SMALL, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    frequencies = rope_frequencies(config, 1 << 40)
    assert len(frequencies) == head_dim // 2
    assert all(0 < frequency <= 1 for frequency in frequencies)
