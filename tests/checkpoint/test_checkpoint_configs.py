"""Configurations of every release through every format, and files as other tools published them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd import FileFormatError, UsageError, releases
from herd.architecture import LlamaConfig, MoeConfig, RopeScaling, ffn_width
from herd.checkpoint.gguf_config import config_from_gguf, config_to_gguf, rope_divisors
from herd.checkpoint.hf_config import config_from_hf, config_to_hf
from herd.checkpoint.meta_config import config_from_meta, config_to_meta, expert_width, sidecar

FILE = Path("config.json")
NAMES = sorted(releases)


def _through_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("name", NAMES)
def test_every_release_comes_back_from_every_format(name: str) -> None:
    config = releases[name].config
    assert config_from_hf(_through_json(config_to_hf(config, "bf16")), FILE) == config
    vocab, tied = config.vocab_size, config.tied_embeddings
    params = _through_json(config_to_meta(config))
    assert config_from_meta(params, FILE, vocab_size=vocab, tied=tied, extra=sidecar(config)) == config
    metadata = {
        key: float(np.float32(value)) if isinstance(value, float) else value  # as GGUF stores numbers
        for key, value in config_to_gguf(config, "bf16").items()
    }
    scaled = config.rope_scaling is not None
    divisors = rope_divisors(config) if scaled else None
    assert config_from_gguf(metadata, FILE, vocab_size=vocab, tied=tied, divisors=divisors) == config


@pytest.mark.parametrize("name", NAMES)
def test_releases_are_recognised_without_our_own_keys(name: str) -> None:
    """Everything but the name of the generation follows from the standard fields, as other tools write them."""
    config = releases[name].config
    data = config_to_hf(config, "bf16")
    data.pop("herd", None)
    found = config_from_hf(data, FILE)
    assert replace(found, generation=config.generation) == config
    # Llama 3.3 is 3.1 in every field; Code Llama's 70B-Instruct and -Python have Llama 2's theta and context.
    same = {"llama3.3": {"llama3.1"}, "codellama": {"codellama", "llama2"}}
    assert found.generation in same.get(config.generation, {config.generation})
    metadata = config_to_gguf(config, "bf16")
    metadata.pop("herd.config")
    divisors = rope_divisors(config) if config.rope_scaling else None
    found = config_from_gguf(
        metadata, FILE, vocab_size=config.vocab_size, tied=config.tied_embeddings, divisors=divisors
    )
    assert replace(found, generation=config.generation) == config


# params.json as Meta published it (vocabulary -1: the tokenizer's), and which release each must be.
META_FILES = {
    "llama1-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
    "llama2-13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1},
    "llama2-70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-05, "vocab_size": -1,
    },
    "codellama-7b": {
        "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1,
        "rope_theta": 1000000,
    },
    "llama3-8b": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    },
    "llama3.1-405b": {
        "dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256,
        "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "llama3.2-1b": {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.5,
        "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
    "llama4-scout-17b-16e": {
        "model": {
            "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "ffn_exp": 4.0,
            "ffn_dim_multiplier": 1.2, "multiple_of": 2048, "norm_eps": 1e-05, "rope_theta": 500000.0,
            "use_scaled_rope": True, "nope_layer_interval": 4, "attention_chunk_size": 8192, "use_qk_norm": True,
            "attn_temperature_tuning": True, "floor_scale": 8192.0,
            "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
            "vision_args": {"dim": 1408},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", META_FILES)
def test_metas_own_params_give_the_release(name: str) -> None:
    config = releases[name].config
    found = config_from_meta(
        META_FILES[name], Path("params.json"), vocab_size=config.vocab_size, tied=config.tied_embeddings
    )
    assert found == config


@pytest.mark.parametrize("name", [name for name in META_FILES if name != "llama1-7b"])
def test_the_width_rule_is_inverted_to_metas_own_numbers(name: str) -> None:
    theirs = META_FILES[name].get("model", META_FILES[name])
    ours = config_to_meta(releases[name].config)
    for key in ("multiple_of", "ffn_dim_multiplier", "ffn_exp"):
        assert ours.get(key) == theirs.get(key)  # type: ignore[union-attr]


@given(
    dim=st.integers(1, 300).map(lambda n: 2 * n),
    ffn=st.integers(1, 4000),
    expert=st.integers(1, 4000) | st.none(),
)
def test_any_width_can_be_expressed(dim: int, ffn: int, expert: int | None) -> None:
    config = LlamaConfig(
        dim=dim, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=dim, ffn_dim=ffn, vocab_size=10,
        moe=MoeConfig(2, expert) if expert else None, generation="llama4" if expert else "llama3",
    )  # fmt: skip
    params = _through_json(config_to_meta(config))
    assert ffn_width(dim, params.get("ffn_dim_multiplier"), params["multiple_of"]) == ffn
    if expert:
        moe = params["moe_args"]
        width = expert_width(
            dim, params["ffn_exp"], params["ffn_dim_multiplier"], params["multiple_of"], moe["capacity_factor"]
        )
        assert width == expert
    assert config_from_meta(params, FILE, vocab_size=10, tied=False, extra=sidecar(config)) == config


HF_FILES: dict[str, dict[str, Any]] = {
    # Before transformers 5, as published: theta and scaling apart, no head_dim.
    "llama2-7b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
        "vocab_size": 32000,
    },
    "llama3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    # From transformers 5 on: everything rotary in one object.
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0,
                            "low_freq_factor": 1.0, "original_max_position_embeddings": 8192},
        "vocab_size": 128256,
    },
    "llama4-maverick-17b-128e-instruct": {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "boi_token_index": 200080,
        "image_token_index": 200092, "tie_word_embeddings": False, "vision_config": {"hidden_size": 1408},
        "text_config": {
            "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0,
            "attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 2, "intermediate_size": 8192,
            "intermediate_size_mlp": 16384, "max_position_embeddings": 1048576, "model_type": "llama4_text",
            "moe_layers": list(range(1, 48, 2)), "no_rope_layers": [], "num_attention_heads": 40,
            "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 128,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "use_qk_norm": False,
            "vocab_size": 202048,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HF_FILES)
def test_published_configs_give_the_release(name: str) -> None:
    assert config_from_hf(HF_FILES[name], FILE) == releases[name].config


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_other_rope_scalings(kind: Any) -> None:
    original = 4096 if kind == "dynamic" else 2048 if kind == "yarn" else 8192
    config = replace(releases["llama2-7b"].config, rope_scaling=RopeScaling(kind, 4.0, original_context=original))
    assert config_from_hf(_through_json(config_to_hf(config, "f16")), FILE) == config
    with pytest.raises(UsageError, match=r"cannot express rope_scaling\.kind"):
        config_to_meta(config)
    if kind == "dynamic":
        with pytest.raises(UsageError, match="cannot express dynamic"):
            config_to_gguf(config, "f16")
        with pytest.raises(UsageError, match="context length only"):
            config_to_hf(replace(config, context_length=8192), "f16")
    else:
        metadata = config_to_gguf(config, "f16")
        assert metadata["llama.rope.scaling.type"] == kind
        assert config_from_gguf(metadata, FILE, vocab_size=32_000, tied=False, divisors=None) == config


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"beta_fast": 16}, "beta_fast"),
        ({"mscale": 1.0}, "mscale"),
        ({"attention_factor": 2.0}, "attention_factor"),
        ({"truncate": False}, "truncate"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_yarn_variants_are_refused_not_approximated(extra: dict[str, Any], field: str) -> None:
    data = config_to_hf(replace(releases["llama2-7b"].config, rope_scaling=RopeScaling("yarn", 4.0)), "f16")
    del data["rope_parameters"]
    data["rope_scaling"] |= extra
    with pytest.raises(FileFormatError) as caught:
        config_from_hf(data, FILE)
    assert caught.value.field == f"rope_scaling.{field}"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"no_rope_layers": [1, 0, 1, 1] * 12}, "no_rope_layers"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({"no_rope_layers": "all"}, "no_rope_layers"),
        ({"moe_layers": [0, 5]}, "moe_layers"),
        ({"layer_types": ["chunked_attention"] * 48}, "layer_types"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok"),
        ({"intermediate_size_mlp": None}, "intermediate_size_mlp"),
        ({"use_qk_norm": 1}, "use_qk_norm"),
        ({"attn_scale": 0}, "attn_scale"),
    ],
)
def test_irregular_llama4_configs_are_refused(change: dict[str, Any], field: str) -> None:
    data = json.loads(json.dumps(HF_FILES["llama4-maverick-17b-128e-instruct"]))
    data["text_config"] |= change
    with pytest.raises(FileFormatError) as caught:
        config_from_hf(data, FILE)
    assert caught.value.field == f"text_config.{field}"


def test_factors_that_no_known_scaling_has_are_refused() -> None:
    config = releases["llama3.1-8b"].config
    metadata = config_to_gguf(config, "bf16")
    wrong = rope_divisors(config) * np.float32(1.01)
    for data in (metadata, {key: value for key, value in metadata.items() if key != "herd.config"}):
        with pytest.raises(FileFormatError, match="frequency table"):
            config_from_gguf(data, FILE, vocab_size=config.vocab_size, tied=False, divisors=wrong)


def test_an_unknown_head_width_cannot_go_to_meta() -> None:
    with pytest.raises(UsageError, match="cannot express head_dim"):
        config_to_meta(replace(releases["llama3-8b"].config, head_dim=64))
