"""The naming tables against transformers' own models and the gguf package's lists; frequencies against transformers."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from herd.architecture import (
    AttentionTemperature,
    LlamaConfig,
    MoeConfig,
    RopeScaling,
    releases,
    rope_frequencies,
    shard_axis,
    stored_tensors,
    tensor_shapes,
)
from herd.architecture.frequencies import attention_scale
from herd.architecture.tensors import Format

DENSE = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=128)
TIED = dataclasses.replace(DENSE, tied_embeddings=True)
MOE = dataclasses.replace(
    DENSE,
    n_layers=4,
    generation="llama4",
    moe=MoeConfig(n_experts=4, ffn_dim=32, interleave=2),
    nope_interval=4,
    attention_chunk=16,
    qk_norm=True,
    attention_temperature=AttentionTemperature(),
)


@pytest.mark.parametrize("fmt", get_args(Format))
@pytest.mark.parametrize("config", [DENSE, TIED, MOE, *(r.config for r in releases.values())])
def test_every_table_covers_each_tensor_once(fmt: Format, config: LlamaConfig) -> None:
    rules = stored_tensors(fmt, config)
    parts = [part for rule in rules for part in rule.parts]
    assert sorted(parts) == sorted(tensor_shapes(config))
    assert len({rule.stored for rule in rules}) == len(rules)


def _stored_shape(rule, shapes):  # type: ignore[no-untyped-def]
    """Shape in the file, from the canonical shapes and the rule alone."""
    parts = [shapes[part] for part in rule.parts]
    if rule.layout.startswith("transposed"):
        parts = [(*shape[:-2], shape[-1], shape[-2]) for shape in parts]
    if rule.layout == "transposed_merged":
        parts = [(shape[0] * shape[1], shape[2]) for shape in parts]
    total = list(parts[0])
    total[rule.axis] = sum(shape[rule.axis] for shape in parts)
    return tuple(total)


@pytest.mark.parametrize("config", [DENSE, TIED])
def test_hf_names_and_shapes_are_those_of_transformers(config: LlamaConfig) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_dim,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied_embeddings,
        )
    )
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = tensor_shapes(config)
    assert {rule.stored: _stored_shape(rule, shapes) for rule in stored_tensors("hf", config)} == expected


def test_hf_names_and_shapes_of_llama4_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    moe = MOE.moe
    assert moe is not None
    model = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            hidden_size=MOE.dim,
            num_hidden_layers=MOE.n_layers,
            num_attention_heads=MOE.n_heads,
            num_key_value_heads=MOE.n_kv_heads,
            head_dim=MOE.head_dim,
            intermediate_size=moe.ffn_dim,
            intermediate_size_mlp=MOE.ffn_dim,
            num_local_experts=moe.n_experts,
            interleave_moe_layer_step=moe.interleave,
            vocab_size=MOE.vocab_size,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    )
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = tensor_shapes(MOE)
    assert {rule.stored: _stored_shape(rule, shapes) for rule in stored_tensors("hf", MOE)} == expected


def test_gguf_names_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for config, arch in ((DENSE, gguf.MODEL_ARCH.LLAMA), (MOE, gguf.MODEL_ARCH.LLAMA4)):
        known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
        for rule in stored_tensors("gguf", config):
            block, layer = rule.stored.removesuffix(".weight"), rule.stored.split(".")[1]
            if block.startswith("blk."):
                block = block.replace(f"blk.{layer}.", "blk.{bid}.")
            assert block in known


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_sharded_axes_divide(config: LlamaConfig) -> None:
    for name, shape in tensor_shapes(config).items():
        axis = shard_axis(name, config)
        assert axis is None or shape[axis] % 2 == 0
    old = dataclasses.replace(DENSE, generation="llama2")
    assert shard_axis("embed.weight", old) == 1 and shard_axis("embed.weight", DENSE) == 0


SCALINGS = [
    RopeScaling("llama3", factor=8.0),
    RopeScaling("llama3", factor=32.0, original_context=64),
    RopeScaling("linear", factor=4.0),
    RopeScaling("yarn", factor=4.0, original_context=256),
    RopeScaling("dynamic", factor=2.0, original_context=128),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.kind}-{s.factor}")
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_equal_transformers(scaling: RopeScaling, theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = 512
    config = dataclasses.replace(
        DENSE, head_dim=64, rope_theta=theta, rope_scaling=scaling, context_length=scaling.original_context
    )
    parameters = {
        "rope_type": scaling.kind,
        "rope_theta": theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    peer = transformers.LlamaConfig(
        head_dim=64,
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=scaling.original_context,
        rope_parameters=parameters,
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](peer, "cpu", seq_len=length)
    assert rope_frequencies(config, length) == pytest.approx(expected.tolist(), rel=1e-5)
    assert attention_scale(config) == pytest.approx(factor)


def test_llama4_scaling_is_a_hard_step() -> None:
    config = releases["llama4-scout-17b-16e"].config
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    ratios = {round(p / s, 6) for p, s in zip(plain, rope_frequencies(config), strict=True)}
    assert ratios == {1.0, 16.0}
