"""RoPE for longer contexts: frequencies against transformers, the published thetas, files that keep them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from herd import FileFormatError, UsageError
from herd.architecture import (
    LlamaConfig,
    RopeScaling,
    StretchMethod,
    attention_scale,
    law_theta,
    ntk_theta,
    releases,
    rope_frequencies,
    stretched,
)
from herd.checkpoint.gguf_config import config_from_gguf, config_to_gguf, rope_divisors
from herd.checkpoint.hf_config import config_from_hf, config_to_hf
from herd.pretrain import CARD

SMALL = LlamaConfig(
    dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96, vocab_size=128, context_length=2048
)
LLAMA3 = releases["llama3-8b"].config
FILE = Path("model")
METHODS: list[StretchMethod] = ["law", "ntk", "linear", "yarn", "llama3"]


def _of_transformers(config: LlamaConfig, length: int | None = None) -> tuple[list[float], float]:
    """Frequencies and attention factor that transformers reads out of our config.json."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(**config_to_hf(config, "f32"))
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(theirs)
        frequencies, scale = rotary.inv_freq, rotary.attention_scaling
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
    return frequencies.tolist(), scale


@pytest.mark.parametrize("config", [SMALL, LLAMA3, releases["llama2-7b"].config], ids=["small", "llama3", "llama2"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1.5, 8, 512])
def test_stretched_frequencies_are_those_of_transformers(
    config: LlamaConfig, method: StretchMethod, factor: float
) -> None:
    longer = stretched(config, int(factor * config.context_length), method)
    frequencies, scale = _of_transformers(longer)
    # Where llama3 blends, transformers' float32 rounds on the scale of the frequency before it is divided.
    size = rope_frequencies(config) if method == "llama3" else frequencies
    errors = [abs(a - b) / c for a, b, c in zip(rope_frequencies(longer), frequencies, size, strict=True)]
    assert max(errors) < 1e-6
    assert attention_scale(longer) == pytest.approx(scale, rel=1e-6)
    assert rope_frequencies(longer) != rope_frequencies(config)


@pytest.mark.parametrize("method", ["yarn", "llama3"])
def test_by_parts_rules_look_at_turns_in_the_trained_context(method: Any) -> None:
    scaling = stretched(SMALL, 8 * 2048, method).rope_scaling
    assert scaling == RopeScaling(method, 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=2048)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_rope_is_stretched_further_by_its_own_kind(kind: Any) -> None:
    """In two steps as in one, as transformers has it; scaled pairs turn as often in the longer context."""
    once, twice = stretched(SMALL, 4 * 2048, kind), stretched(stretched(SMALL, 4 * 2048, kind), 32 * 2048, kind)
    assert twice == stretched(SMALL, 32 * 2048, kind)
    before, after = rope_frequencies(once), rope_frequencies(twice)
    assert after == pytest.approx(_of_transformers(twice)[0], rel=1e-5)
    assert after[-1] == pytest.approx(before[-1] / 8)
    assert (after[0] == before[0]) == (kind != "linear")
    for pair, (old, new) in enumerate(zip(before, after, strict=True)):
        assert old / 8 <= new * (1 + 1e-9) and new <= old, pair  # between as slow as the context is long, and as before


def test_llama_3_1_is_stretched_from_its_first_context() -> None:
    """The pairs that do not finish a turn in 8,192 tokens are slowed; Llama 3.2 has 32 where 3.1 has 8."""
    config = releases["llama3.1-8b"].config
    longer = stretched(config, 4 * config.context_length, "llama3")
    assert longer.rope_scaling == releases["llama3.2-1b"].config.rope_scaling
    assert (longer.rope_theta, longer.context_length) == (config.rope_theta, 524_288)


@pytest.mark.parametrize(
    ("kind", "method", "said"),
    [
        ("llama3", "law", "--method llama3"),
        ("yarn", "llama3", "--method yarn"),
        ("llama3", "ntk", "scaled already"),
        ("dynamic", "law", "follows the length"),
    ],
)
def test_scalings_are_not_combined(kind: Any, method: Any, said: str) -> None:
    config = dataclasses.replace(SMALL, rope_scaling=RopeScaling(kind, 4.0, original_context=2048))
    with pytest.raises(UsageError, match=said):
        stretched(config, 4 * 2048, method)


@pytest.mark.parametrize("length", [100, 2048, 2049, 16_384])
def test_dynamic_frequencies_follow_the_length_as_in_transformers(length: int) -> None:
    config = dataclasses.replace(SMALL, rope_scaling=RopeScaling("dynamic", 4.0, original_context=2048))
    assert rope_frequencies(config, length) == pytest.approx(_of_transformers(config, length)[0], rel=1e-6)


def test_the_theta_law_gives_the_thetas_of_the_card() -> None:
    """The last published theta is the law's; the others lie at 0.68 to 1.05 of it (the team tuned them)."""
    shares = [stage.theta / law_theta(5e5, 8192, stage.context) for stage in CARD]
    assert shares[-1] == pytest.approx(1, rel=1e-3)
    assert shares == pytest.approx([0.682, 0.731, 1.052, 0.782, 0.9996], abs=1e-3)
    assert law_theta(5e5, 8192, 8192) == pytest.approx(5e5)


@pytest.mark.parametrize(("trained", "context"), [(8192, 65_536), (512, 4096), (2048, 1 << 20)])
def test_the_pair_that_just_turned_once_turns_once_in_the_new_context(trained: int, context: int) -> None:
    theta, new = 5e5, law_theta(5e5, trained, context)
    share = math.log(trained / (2 * math.pi)) / math.log(theta)  # of the pairs; 2π·theta^share = trained
    assert 2 * math.pi * new**share == pytest.approx(context)


@pytest.mark.parametrize("stretch", [2.0, 8.0])
def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_by_the_stretch(stretch: float) -> None:
    new = dataclasses.replace(SMALL, rope_theta=ntk_theta(SMALL.rope_theta, stretch, SMALL.head_dim))
    before, after = rope_frequencies(SMALL), rope_frequencies(new)
    assert after[0] == before[0] == 1
    assert before[-1] / after[-1] == pytest.approx(stretch)
    assert [ntk_theta(5e5, 2**n / 8192, 128) for n in (16, 22)] == pytest.approx([4.13e6, 283e6], rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [65_536, 1 << 20, 4_194_304, 100_001])
def test_files_keep_a_stretched_model(method: StretchMethod, context: int) -> None:
    longer = stretched(LLAMA3, context, method)
    assert longer.context_length == context
    assert config_from_hf(json.loads(json.dumps(config_to_hf(longer, "bf16"))), FILE) == longer
    metadata = config_to_gguf(longer, "bf16")
    metadata |= {key: _as_f32(value) for key, value in metadata.items()}
    divisors = rope_divisors(longer) if method == "llama3" else None
    back = config_from_gguf(metadata, FILE, vocab_size=longer.vocab_size, tied=False, divisors=divisors)
    if method == "linear" or method == "yarn":  # the factor has seven digits there
        assert longer.rope_scaling and back.rope_scaling
        assert back.rope_scaling.factor == pytest.approx(longer.rope_scaling.factor, rel=1e-6)
        back = dataclasses.replace(back, rope_scaling=longer.rope_scaling)
    assert back == longer


def _as_f32(value: Any) -> Any:
    import numpy as np

    return float(np.float32(value)) if isinstance(value, float) else value


def test_keys_of_the_gguf_file_are_those_of_the_gguf_package() -> None:
    keys = pytest.importorskip("gguf").Keys.Rope
    metadata = config_to_gguf(stretched(LLAMA3, 65_536, "yarn"), "bf16")
    said = {
        getattr(keys, name).format(arch="llama")
        for name in ("FREQ_BASE", "SCALING_TYPE", "SCALING_FACTOR", "SCALING_ORIG_CTX_LEN")
    }
    assert said <= set(metadata)
    assert metadata["llama.rope.scaling.original_context_length"] == 8192
    assert metadata["llama.rope.scaling.factor"] == 8


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("attn_factor", 1.0, 0.5),
        ("yarn_attn_factor", 1.0, 2.0),
        ("yarn_ext_factor", 1.0, 0.0),
        ("yarn_ext_factor", -1.0, 0.5),
        ("yarn_beta_fast", 32.0, 16.0),
        ("yarn_beta_slow", 1.0, 2.0),
        ("yarn_log_multiplier", 0.0, 0.1),
        ("alpha", 0.0, 1000.0),
    ],
)
def test_variants_of_yarn_in_gguf_are_refused_not_ignored(key: str, neutral: float, other: float) -> None:
    config = stretched(LLAMA3, 65_536, "yarn")
    metadata = config_to_gguf(config, "bf16")
    read = {"vocab_size": config.vocab_size, "tied": False, "divisors": None}
    assert config_from_gguf(metadata | {f"llama.rope.scaling.{key}": neutral}, FILE, **read) == config  # type: ignore[arg-type]
    with pytest.raises(FileFormatError, match=key):
        config_from_gguf(metadata | {f"llama.rope.scaling.{key}": other}, FILE, **read)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "context", "method", "said"),
    [
        (LLAMA3, 8192, "law", "more than 8192"),
        (LLAMA3, 65_536, "magic", "law, ntk, linear, yarn, llama3"),
        (releases["llama3.1-8b"].config, 1 << 20, "law", "scaled already"),
        (releases["llama4-scout-17b-16e"].config, 1 << 30, "yarn", "look back one chunk"),
        (dataclasses.replace(SMALL, head_dim=2), 4096, "ntk", "head_dim above 2"),
        (dataclasses.replace(SMALL, context_length=4), 4096, "law", "7 or more"),
    ],
)
def test_what_cannot_be_stretched(config: LlamaConfig, context: int, method: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        stretched(config, context, method)
