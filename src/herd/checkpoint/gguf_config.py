"""LlamaConfig ⇄ GGUF metadata, as llama.cpp reads it, for the architectures "llama" and "llama4".

Llama 3's frequency scaling is not metadata there but a tensor, `rope_freqs.weight`: for each rotated pair the number
its frequency is divided by. Files that other tools wrote give the scaling back by comparing that tensor with the
published ones. What GGUF has no key for stands in a key of our own, "herd.config", which other readers skip.
llama.cpp has Llama 4's chunk (8192), NoPE interval (4) and temperature in its code, and QK norm follows from the number
of experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from herd.architecture import (
    AttentionTemperature,
    Generation,
    LlamaConfig,
    MoeConfig,
    RopeScaling,
    rope_frequencies,
)
from herd.checkpoint.fields import Fields, build_config, guess_generation
from herd.checkpoint.mixes import MIXES, Activations, activations_of
from herd.checkpoint.numbers import Array
from herd.errors import FileFormatError, UsageError
from herd.files import parse_json
from herd.ggufmeta import MetadataValue

__all__ = ["activations_from_gguf", "config_from_gguf", "config_to_gguf", "rope_divisors"]

# llama.cpp's llama_ftype
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32} | {name: mix.file_type for name, mix in MIXES.items()}
# (factor, low, high) of every released scaling; the original context is 8192 in all of them.
_PUBLISHED = ((8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (16.0, 1.0, 1.0), (8.0, 1.0, 1.0))
_UNSAID = ("generation", "nope_interval", "attention_chunk", "qk_norm", "attention_temperature")


def config_from_gguf(
    metadata: Mapping[str, MetadataValue], file: Path, *, vocab_size: int, tied: bool, divisors: Array | None
) -> LlamaConfig:
    """Build a LlamaConfig from GGUF metadata.

    `vocab_size` is the embedding's number of rows, `tied` whether the file has no output tensor, `divisors` the
    contents of `rope_freqs.weight`, if it is there. FileFormatError names contradictory or missing keys.
    """
    top = Fields(metadata, file)
    arch = metadata.get("general.architecture")
    if arch not in ("llama", "llama4"):
        top.fail("general.architecture", "is not a Llama", value=arch, allowed="llama, llama4")
    if metadata.get("split.count", 1) not in (0, 1):
        fix = "join the parts with llama.cpp's gguf-split --merge"
        top.fail("split.count", "the model is split over several files", value=metadata["split.count"], fix=fix)
    prefix = f"{arch}."
    own = {key.removeprefix(prefix): _uniform(value) for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(own, file, prefix)
    if fields.integer("vocab_size", vocab_size) != vocab_size:
        fields.fail("vocab_size", "contradicts the embedding", value=own["vocab_size"], allowed=f"{vocab_size}")
    dim, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    theta = _decimal(fields.number("rope.freq_base", 10_000.0))
    context = fields.integer("context_length")
    unsaid, stated = _unsaid(top)
    layers = fields.integer("block_count")
    base: dict[str, Any] = {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": _head_dim(fields, dim, heads),
        "ffn_dim": fields.integer("feed_forward_length"),
        "vocab_size": vocab_size,
        "norm_eps": _decimal(fields.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "context_length": context,
        "tied_embeddings": tied,
    }
    scaling = _scaling(top, fields, context, base, stated, divisors)
    if arch == "llama":
        if fields.integer("expert_count", 0, low=0):
            fields.fail("expert_count", "no dense Llama has experts", value=own["expert_count"], allowed="0")
        base["generation"] = guess_generation(vocab_size, context, theta, scaling, tied)
    else:
        base |= _llama4(fields)
    return build_config(file, lambda: LlamaConfig(**base | unsaid, rope_scaling=scaling))


def _uniform(value: MetadataValue) -> MetadataValue:
    """Per-layer lists whose entries are all equal stand for that entry, as llama.cpp allows for head counts."""
    return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value


def _decimal(value: float) -> float:
    """The shortest decimal that the 32-bit float stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _head_dim(fields: Fields, dim: int, heads: int) -> int:
    stated = {
        fields.integer(name)
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
        if fields.has(name)
    }
    if not stated:
        if dim % heads:
            fields.fail("attention.head_count", "does not divide embedding_length", value=heads)
        return dim // heads
    if len(stated) > 1:
        fields.fail("attention.key_length", "heads of several widths are not a Llama", value=sorted(stated))
    return stated.pop()


def _llama4(fields: Fields) -> dict[str, Any]:
    """Llama 4's settings with the values that llama.cpp has in its code."""
    experts = fields.integer("expert_count", 0, low=0)
    moe = None
    if experts:
        top_k = fields.integer("expert_used_count")
        if top_k > experts:
            fields.fail("expert_used_count", "is more than there are experts", value=top_k, allowed=f"1 to {experts}")
        width = fields.integer("expert_feed_forward_length")
        moe = MoeConfig(experts, width, top_k, fields.integer("interleave_moe_layer_step"))
    base: dict[str, Any] = {"moe": moe, "qk_norm": experts != 128, "generation": "llama4"}
    if fields.data.get("attention.sliding_window") == 0:
        return base
    return base | {"attention_chunk": 8192, "nope_interval": 4, "attention_temperature": AttentionTemperature()}


def _unsaid(top: Fields) -> tuple[dict[str, Any], object]:
    """From the "herd.config" key: values of fields that GGUF has no key for, and the llama3 RoPE scaling."""
    text = top.data.get("herd.config")
    if text is None:
        return {}, None
    data = parse_json(text.encode(), top.file, "herd.config") if isinstance(text, str) else None
    if not isinstance(data, dict) or set(data) - {*_UNSAID, "rope_scaling"}:
        top.fail("herd.config", "has unknown contents", value=text, allowed=", ".join([*_UNSAID, "rope_scaling"]))
    found = {name: value for name, value in data.items() if name != "rope_scaling"}
    if found.get("generation", "llama3") not in get_args(Generation):
        top.fail("herd.config", "has an unknown generation", value=found["generation"])
    if not isinstance(found.get("qk_norm", False), bool):
        top.fail("herd.config", "qk_norm must be true or false", value=found["qk_norm"])
    temperature = found.get("attention_temperature")
    if temperature is not None:
        found["attention_temperature"] = _dataclass(top, AttentionTemperature, temperature)
    return found, data.get("rope_scaling")


def _dataclass(top: Fields, kind: type[Any], values: object) -> Any:
    try:
        return kind(**values)  # type: ignore[arg-type]
    except (TypeError, UsageError) as error:
        raise FileFormatError(f"has unusable contents ({error})", file=top.file, field="herd.config") from None


def _scaling(
    top: Fields, fields: Fields, context: int, base: Mapping[str, Any], stated: object, divisors: Array | None
) -> RopeScaling | None:
    if divisors is not None:
        return _scaling_of_divisors(top, base, stated, divisors)
    if stated is not None:
        top.fail("herd.config", "says llama3 RoPE scaling, but the tensor rope_freqs.weight is missing", value=stated)
    _check_scaling(fields)
    kind = fields.data.get("rope.scaling.type", "none")
    if kind == "none":
        if fields.has("rope.scale_linear"):  # files of 2023
            return _positive_scaling(fields, "rope.scale_linear", kind="linear")
        return None
    if kind == "linear":
        return _positive_scaling(fields, "rope.scaling.factor", kind="linear")
    if kind == "yarn":
        original = fields.integer("rope.scaling.original_context_length", context)
        return _positive_scaling(fields, "rope.scaling.factor", kind="yarn", original_context=original)
    fields.fail("rope.scaling.type", "is not known", value=kind, allowed="none, linear, yarn")


def _check_scaling(fields: Fields) -> None:
    """Variants of YaRN that llama.cpp can read from a file: only the paper's own values for Llama are supported."""
    for name in ("attn_factor", "yarn_attn_factor"):
        fields.must_be(f"rope.scaling.{name}", 1.0)
    fields.must_be("rope.scaling.yarn_ext_factor", 1.0, -1.0)  # -1 leaves it to the type of scaling
    fields.must_be("rope.scaling.yarn_beta_fast", 32.0)
    fields.must_be("rope.scaling.yarn_beta_slow", 1.0)
    for name in ("alpha", "yarn_log_multiplier"):
        fields.must_be(f"rope.scaling.{name}", 0.0)


def _positive_scaling(fields: Fields, name: str, **values: Any) -> RopeScaling | None:
    factor = _decimal(fields.number(name))
    try:
        return None if factor == 1 else RopeScaling(factor=factor, **values)
    except UsageError as error:
        fields.fail(name, error.what, value=error.value, allowed=error.allowed)


def _scaling_of_divisors(top: Fields, base: Mapping[str, Any], stated: object, divisors: Array) -> RopeScaling:
    known = [RopeScaling("llama3", *published) for published in _PUBLISHED]
    candidates = [_dataclass(top, RopeScaling, stated)] if stated is not None else known
    plain = build_config(top.file, lambda: LlamaConfig(**base))
    for scaling in candidates:
        expected = rope_divisors(dataclasses.replace(plain, rope_scaling=scaling))
        if expected.shape == divisors.shape and np.allclose(divisors, expected, rtol=1e-4, atol=0):
            return scaling
    raise FileFormatError(
        "is not the frequency table of any known RoPE scaling",
        file=top.file,
        field="rope_freqs.weight",
        value=np.array2string(divisors[-4:]),
        allowed="; ".join(f"llama3, factor {s.factor:g}" for s in candidates),
    )


def rope_divisors(config: LlamaConfig) -> Array:
    """What each pair's frequency is divided by under "llama3" scaling: float32 [K/2], for `rope_freqs.weight`."""
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    scaled = rope_frequencies(config)
    return np.array([a / b for a, b in zip(plain, scaled, strict=True)], np.float32)


def config_to_gguf(config: LlamaConfig, dtype: str) -> dict[str, MetadataValue]:
    """GGUF metadata of the model for weights stored mainly as `dtype`; the vocabulary comes from the tokenizer."""
    arch = "llama4" if config.generation == "llama4" else "llama"
    own: dict[str, MetadataValue] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        raise UsageError(
            "GGUF cannot express dynamic RoPE scaling", value=scaling.factor, allowed="llama3, linear, yarn"
        )
    if scaling is not None and scaling.kind != "llama3":
        own |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        if scaling.kind == "yarn":
            own["rope.scaling.original_context_length"] = scaling.original_context
    if config.moe is not None:
        own |= {
            "expert_count": config.moe.n_experts,
            "expert_used_count": config.moe.top_k,
            "expert_feed_forward_length": config.moe.ffn_dim,
            "interleave_moe_layer_step": config.moe.interleave,
        }
    if arch == "llama4" and config.attention_chunk is None and not config.nope_interval:
        own["attention.sliding_window"] = 0
    unsaid = {name: value for name, value in config.to_dict().items() if name in _UNSAID}
    if arch == "llama":
        unsaid = {"generation": config.generation}
    if scaling is not None and scaling.kind == "llama3":
        unsaid["rope_scaling"] = dataclasses.asdict(scaling)
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in own.items()},
        "herd.config": json.dumps(unsaid, sort_keys=True),
        **({"herd.activations": activations_of(dtype)} if activations_of(dtype) != "block" else {}),
    }


def activations_from_gguf(metadata: Mapping[str, MetadataValue], file: Path) -> Activations:
    """How the weights want activations rounded. FileFormatError for another value."""
    value = metadata.get("herd.activations", "block")
    if value in get_args(Activations):
        return cast("Activations", value)
    Fields(metadata, file).fail(
        "herd.activations", "is not known", value=value, allowed=", ".join(get_args(Activations))
    )
