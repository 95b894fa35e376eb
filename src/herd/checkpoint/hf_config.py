"""LlamaConfig ⇄ the Hugging Face `config.json`, for LlamaForCausalLM and the text model of Llama 4.

Both spellings of rotary settings are read: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`. Both
are written, so that any reader finds its own. A setting that would change the mathematics (a bias, another
activation, a quantised checkpoint, foreign model code) is an error, never ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast, get_args

from herd.architecture import AttentionTemperature, Generation, LlamaConfig, MoeConfig, RopeScaling
from herd.checkpoint.fields import Fields, build_config, guess_generation
from herd.errors import UsageError

__all__ = ["config_from_hf", "config_to_hf"]

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM"),
    "llama4_text": ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    "llama4": ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
}
# Settings of other models that reuse the name "llama"; null or absent in every Llama.
_FOREIGN = (
    "sliding_window", "logit_scale", "logits_scaling", "residual_multiplier", "attention_multiplier",
    "embedding_multiplier", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip
_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def config_from_hf(data: dict[str, Any], file: Path) -> LlamaConfig:
    """Build a LlamaConfig from the contents of `config.json`. FileFormatError for anything that is not a Llama."""
    top = Fields(data, file)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        top.fail("model_type", "is not a Llama", value=model_type, allowed=", ".join(_ARCHITECTURES))
    architectures, known = data.get("architectures") or [], _ARCHITECTURES[model_type]
    if not isinstance(architectures, list) or any(name not in known for name in architectures):
        allowed = ", ".join(known)
        top.fail("architectures", "is not a Llama language model", value=architectures, allowed=allowed)
    if top.has("auto_map"):
        top.fail("auto_map", "asks for model code from the repository, which Herd never runs")
    if top.has("quantization_config"):
        fix = "get the unquantised weights, or a GGUF file"
        top.fail("quantization_config", "quantised Hugging Face checkpoints are not supported", fix=fix)
    if model_type == "llama":
        return _dense(top)
    return _llama4(top.part("text_config") if model_type == "llama4" else top, top)


def _dense(fields: Fields) -> LlamaConfig:
    _check_mathematics(fields)
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    context = fields.integer("max_position_embeddings", 2048)
    theta, scaling = _rope(fields, 10_000.0, context)
    vocab, tied = fields.integer("vocab_size"), fields.flag("tie_word_embeddings", False)
    generation = _generation(fields) or guess_generation(vocab, context, theta, scaling, tied)
    return build_config(
        fields.file,
        lambda: LlamaConfig(
            dim=dim,
            n_layers=fields.integer("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=_head_dim(fields, dim, heads),
            ffn_dim=fields.integer("intermediate_size"),
            vocab_size=vocab,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            context_length=context,
            tied_embeddings=tied,
            generation=generation,
        ),
    )


def _llama4(text: Fields, top: Fields) -> LlamaConfig:
    _check_mathematics(text)
    dim, heads, layers = (text.integer(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    context = text.integer("max_position_embeddings", 131_072)
    theta, scaling = _rope(text, 500_000.0, context)
    nope = _nope_interval(text, layers)
    chunk = text.integer("attention_chunk_size") if text.has("attention_chunk_size") else None
    if not _uses_chunks(text, layers, nope):
        chunk = None
    temperature = None
    if text.data.get("attn_temperature_tuning", True):  # early files say 4 for true
        temperature = AttentionTemperature(text.integer("floor_scale", 8192), text.number("attn_scale", 0.1))
    tied = text.flag("tie_word_embeddings", top.flag("tie_word_embeddings", False))
    return build_config(
        text.file,
        lambda: LlamaConfig(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=text.integer("num_key_value_heads", heads),
            head_dim=_head_dim(text, dim, heads),
            ffn_dim=text.integer("intermediate_size_mlp"),
            vocab_size=text.integer("vocab_size"),
            norm_eps=text.number("rms_norm_eps", 1e-5),
            rope_theta=theta,
            rope_scaling=scaling,
            context_length=context,
            tied_embeddings=tied,
            moe=_moe(text, layers),
            nope_interval=nope,
            attention_chunk=chunk,
            qk_norm=text.flag("use_qk_norm", True),
            attention_temperature=temperature,
            generation="llama4",
        ),
    )


def _check_mathematics(fields: Fields) -> None:
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("partial_rotary_factor", 1.0)
    for name in _FOREIGN:
        fields.must_be(name)


def _generation(fields: Fields) -> Generation | None:
    """What Herd wrote beside the standard fields: the one thing they cannot say."""
    if not fields.has("herd"):
        return None
    value = fields.part("herd").data.get("generation")
    if value not in get_args(Generation):
        fields.fail("herd.generation", "is not known", value=value, allowed=", ".join(get_args(Generation)))
    return cast(Generation, value)


def _head_dim(fields: Fields, dim: int, heads: int) -> int:
    if not fields.has("head_dim") and dim % heads:
        fields.fail("num_attention_heads", "does not divide hidden_size", value=heads, allowed=f"divisors of {dim}")
    return fields.integer("head_dim", dim // heads)


def _rope(fields: Fields, default_theta: float, context: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from all the places they may stand in; two that differ are an error."""
    thetas = {"rope_theta": fields.number("rope_theta")} if fields.has("rope_theta") else {}
    scalings: dict[str, RopeScaling | None] = {}
    for name in ("rope_parameters", "rope_scaling"):
        if fields.has(name):
            part = fields.part(name)
            if part.has("rope_theta"):
                thetas[f"{name}.rope_theta"] = part.number("rope_theta")
            scalings[name] = _scaling(part, context)
    if len(set(thetas.values())) > 1:
        fields.fail("rope_theta", "contradicts rope_parameters", value=thetas)
    if len(set(scalings.values())) > 1:
        fields.fail("rope_scaling", "contradicts rope_parameters", value=fields.data["rope_scaling"])
    return next(iter(thetas.values()), default_theta), next(iter(scalings.values()), None)


def _scaling(part: Fields, context: int) -> RopeScaling | None:
    kind = part.data.get("rope_type") or part.data.get("type") or "default"
    part.must_be("partial_rotary_factor", 1.0)
    if kind == "default":
        return None
    if kind not in ("llama3", "linear", "dynamic", "yarn"):
        part.fail("rope_type", "is not known", value=kind, allowed="default, llama3, linear, dynamic, yarn")
    factor = part.number("factor")
    if kind == "llama3":
        return _valid_scaling(
            part,
            kind=kind,
            factor=factor,
            low_freq_factor=part.number("low_freq_factor"),
            high_freq_factor=part.number("high_freq_factor"),
            original_context=part.integer("original_max_position_embeddings"),
        )
    if kind == "linear":
        return _valid_scaling(part, kind=kind, factor=factor)
    if kind == "yarn":
        part.must_be("beta_fast", 32)
        part.must_be("beta_slow", 1)
        part.must_be("truncate", True)
        for name in ("mscale", "mscale_all_dim"):
            part.must_be(name)
        if part.has("attention_factor"):
            usual = 0.1 * math.log(factor) + 1
            if abs(part.number("attention_factor") - usual) > 1e-6:
                part.fail("attention_factor", "only YaRN's own value is supported", allowed=f"{usual}")
    original = part.integer("original_max_position_embeddings", context)
    return _valid_scaling(part, kind=kind, factor=factor, original_context=original)


def _valid_scaling(part: Fields, **values: Any) -> RopeScaling:
    try:
        return RopeScaling(**values)
    except UsageError as error:
        part.fail("factor", error.what, value=error.value, allowed=error.allowed)


def _per_layer(text: Fields, name: str, layers: int) -> list[Any]:
    """A list with one item per layer: its length is checked before anything of the size `layers` is made."""
    value = text.data[name]
    if not isinstance(value, list) or len(value) != layers:
        text.fail(name, "must be a list with one item per layer", value=value, allowed=f"{layers} items")
    return value


def _flags(text: Fields, name: str, layers: int) -> list[bool]:
    value = _per_layer(text, name, layers)
    if any(item not in (0, 1) for item in value):
        text.fail(name, "must be one 0 or 1 per layer", value=value)
    return [bool(item) for item in value]


def _nope_interval(text: Fields, layers: int) -> int:
    """Every how manieth layer has no RoPE. The list, where given, says 1 for layers WITH rotary positions."""
    if not text.data.get("no_rope_layers"):
        interval = text.integer("no_rope_layer_interval", 4)
        return interval if interval <= layers else 0
    rotary = _flags(text, "no_rope_layers", layers)
    if all(rotary):
        return 0
    interval = rotary.index(False) + 1
    if rotary != [(i + 1) % interval != 0 for i in range(layers)]:
        text.fail("no_rope_layers", "is not a regular pattern", value=text.data["no_rope_layers"])
    return interval


def _uses_chunks(text: Fields, layers: int, nope: int) -> bool:
    """Whether RoPE layers attend in chunks; `layer_types` must say the same for all of them."""
    if not text.has("layer_types"):
        return True
    given = _per_layer(text, "layer_types", layers)
    expected = ["full_attention" if nope and (i + 1) % nope == 0 else "chunked_attention" for i in range(layers)]
    if given == expected:
        return "chunked_attention" in given
    if given != ["full_attention"] * layers:
        text.fail("layer_types", "contradicts no_rope_layers", value=given)
    return False


def _moe(text: Fields, layers: int) -> MoeConfig | None:
    listed = text.data.get("moe_layers")
    if listed == []:
        return None
    interleave = text.integer("interleave_moe_layer_step", 1)
    every = range(interleave - 1, layers, interleave)  # costs nothing, however many layers the file claims
    if listed is not None and not (isinstance(listed, list) and len(listed) == len(every) and listed == list(every)):
        text.fail("moe_layers", "contradicts interleave_moe_layer_step", value=listed)
    experts = text.integer("num_local_experts", 16)
    top_k = text.integer("num_experts_per_tok", 1)
    if top_k > experts:
        text.fail("num_experts_per_tok", "is more than there are experts", value=top_k, allowed=f"1 to {experts}")
    return MoeConfig(n_experts=experts, ffn_dim=text.integer("intermediate_size"), top_k=top_k, interleave=interleave)


def config_to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The contents of `config.json` for weights stored mainly as `dtype` ("f32", "f16", "bf16")."""
    rope = _rope_to_hf(config)
    data: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": _NAMES[dtype],
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": {**(rope or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.generation != "llama4":
        return data | {"mlp_bias": False, "herd": {"generation": config.generation}}
    return data | _llama4_to_hf(config)


def _llama4_to_hf(config: LlamaConfig) -> dict[str, Any]:
    moe, layers = config.moe, range(config.n_layers)
    rotary = [config.uses_rope(i) for i in layers]
    chunked = config.attention_chunk is not None
    temperature = config.attention_temperature
    scales = temperature or AttentionTemperature()
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": moe.ffn_dim if moe else config.ffn_dim,
        "intermediate_size_mlp": config.ffn_dim,
        "num_local_experts": moe.n_experts if moe else 0,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "interleave_moe_layer_step": moe.interleave if moe else 1,
        "moe_layers": [i for i in layers if config.is_moe_layer(i)],
        "use_qk_norm": config.qk_norm,
        "no_rope_layers": [int(uses) for uses in rotary],
        "no_rope_layer_interval": config.nope_interval or config.n_layers + 1,
        "attention_chunk_size": config.attention_chunk,
        "layer_types": ["chunked_attention" if chunked and uses else "full_attention" for uses in rotary],
        "attn_temperature_tuning": temperature is not None,
        "floor_scale": scales.floor_scale,
        "attn_scale": scales.attn_scale,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def _rope_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    data: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        data["low_freq_factor"] = scaling.low_freq_factor
        data["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind in ("llama3", "yarn"):
        data["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "dynamic" and scaling.original_context != config.context_length:
        raise UsageError(
            "the Hugging Face layout stretches dynamic RoPE from the context length only",
            value=scaling.original_context,
            allowed=f"rope_scaling.original_context = {config.context_length}",
        )
    return data
