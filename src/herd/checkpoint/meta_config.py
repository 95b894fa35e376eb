"""LlamaConfig ⇄ Meta's `params.json`, and the inverse of its feed-forward width rule.

`params.json` states the feed-forward width by a rule, the vocabulary of Llama 1 and 2 as -1 ("ask the tokenizer"), and
neither the context length nor whether the embedding is tied. Herd writes what it cannot say into `herd.json` beside
it; where that is absent, the embedding's shape and the released models' values fill the gaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

from herd.architecture import AttentionTemperature, Generation, LlamaConfig, MoeConfig, RopeScaling, ffn_width
from herd.checkpoint.fields import Fields, build_config, guess_generation
from herd.errors import UsageError

__all__ = ["config_from_meta", "config_to_meta", "sidecar"]

_CONTEXT = {"llama1": 2048, "llama2": 4096, "codellama": 16_384, "llama3": 8192}
_LONG_CONTEXT = 131_072  # Llama 3.1 and later
# Parts that turn the text model into another one.
_FOREIGN = ("quantization_args", "lora_args")


def config_from_meta(
    data: Mapping[str, Any], file: Path, *, vocab_size: int, tied: bool, extra: Mapping[str, Any] | None = None
) -> LlamaConfig:
    """Build a LlamaConfig from `params.json`.

    `vocab_size` is the embedding's number of rows, `tied` whether the output head is the embedding, `extra` the
    contents of `herd.json`, if there is one. FileFormatError names contradictory or missing fields.
    """
    params = Fields(data, file)
    if isinstance(data.get("model"), Mapping):  # Llama 4 nests everything once more
        params = params.part("model")
    for name in _FOREIGN:
        params.must_be(name)
    params.must_be("vision_num_cross_attention_layers", -1, 0)
    dim, heads = params.integer("dim"), params.integer("n_heads")
    stated = params.data.get("vocab_size", -1)
    if stated not in (-1, vocab_size):
        params.fail("vocab_size", "contradicts the embedding", value=stated, allowed=f"-1 or {vocab_size}")
    if dim % heads:
        params.fail("n_heads", "does not divide dim", value=heads, allowed=f"divisors of {dim}")
    moe = _moe(params, dim) if params.has("moe_args") else None
    is_llama4 = moe is not None or params.has("nope_layer_interval") or (extra or {}).get("generation") == "llama4"
    theta = params.number("rope_theta", 10_000.0)
    scaling = _scaling(params, is_llama4, tied)
    generation, context = _not_in_params(params, vocab_size, theta, scaling, tied, is_llama4, extra)
    temperature = None
    if params.flag("attn_temperature_tuning", False):
        temperature = AttentionTemperature(params.integer("floor_scale", 8192), params.number("attn_scale", 0.1))
    multiplier = params.number("ffn_dim_multiplier") if params.has("ffn_dim_multiplier") else None
    return build_config(
        file,
        lambda: LlamaConfig(
            dim=dim,
            n_layers=params.integer("n_layers"),
            n_heads=heads,
            n_kv_heads=params.integer("n_kv_heads", heads),
            head_dim=params.integer("head_dim", dim // heads),
            ffn_dim=ffn_width(dim, multiplier, params.integer("multiple_of", 256)),
            vocab_size=vocab_size,
            norm_eps=params.number("norm_eps", 1e-5),
            rope_theta=theta,
            rope_scaling=scaling,
            context_length=context,
            tied_embeddings=tied,
            moe=moe,
            nope_interval=params.integer("nope_layer_interval", 0, low=0),
            attention_chunk=params.integer("attention_chunk_size") if params.has("attention_chunk_size") else None,
            qk_norm=params.flag("use_qk_norm", False),
            attention_temperature=temperature,
            generation=generation,
        ),
    )


def _moe(params: Fields, dim: int) -> MoeConfig:
    moe = params.part("moe_args")
    experts, top_k = moe.integer("num_experts"), moe.integer("top_k", 1)
    if top_k > experts:
        moe.fail("top_k", "is more than there are experts", value=top_k, allowed=f"1 to {experts}")
    width = expert_width(
        dim,
        params.number("ffn_exp", 4.0),
        params.number("ffn_dim_multiplier", 1.0),
        params.integer("multiple_of", 256),
        moe.number("capacity_factor", 1.0) if moe.flag("auto_scale_F", True) else None,
    )
    return MoeConfig(
        n_experts=experts, ffn_dim=width, top_k=top_k, interleave=moe.integer("interleave_moe_layer_step", 1)
    )


def expert_width(dim: int, exp: float, multiplier: float, multiple_of: int, capacity: float | None) -> int:
    """Width of one expert by the reference's rule (llama4 moe.py); `capacity` is None when it does not scale."""
    width = int(multiplier * int(2 * int(exp * dim) / 3))
    if capacity is not None:
        width = int(width / (capacity + 1))
    return width + -width % multiple_of


def _scaling(params: Fields, is_llama4: bool, tied: bool) -> RopeScaling | None:
    """Llama 3.x scaling. The factor that files leave out: 16 for Llama 4, 8 for Llama 3.1 and 3.3, and 32 for the tied
    3.2 models, as their Hugging Face configurations say (Meta's code computes with 8 there)."""
    if not params.flag("use_scaled_rope", False):
        return None
    factor = params.number("rope_scaling_factor", 16.0 if is_llama4 else 32.0 if tied else 8.0)
    high = params.number("rope_high_freq_factor", 1.0 if is_llama4 else 4.0)
    try:
        return RopeScaling("llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=high)
    except UsageError as error:
        params.fail("rope_scaling_factor", error.what, value=error.value, allowed=error.allowed)


def _not_in_params(
    params: Fields,
    vocab_size: int,
    theta: float,
    scaling: RopeScaling | None,
    tied: bool,
    is_llama4: bool,
    extra: Mapping[str, Any] | None,
) -> tuple[Generation, int]:
    """Generation and context length: from `herd.json`, else from what tells the releases apart."""
    if extra is not None:
        fields = Fields(extra, params.file.with_name("herd.json"))
        value = fields.data.get("generation")
        if value not in get_args(Generation):
            fields.fail("generation", "is not known", value=value, allowed=", ".join(get_args(Generation)))
        return cast(Generation, value), fields.integer("context_length")
    if is_llama4:
        return "llama4", 262_144
    # Llama 1 has no grouped heads and, in the sizes that Llama 2 has too, another epsilon.
    like_llama1 = not params.has("n_kv_heads") and params.number("norm_eps", 1e-5) == 1e-6
    generation = guess_generation(vocab_size, 2048 if like_llama1 else 4096, theta, scaling, tied)
    return generation, _CONTEXT.get(generation, _LONG_CONTEXT)


def sidecar(config: LlamaConfig) -> dict[str, Any]:
    """What `params.json` cannot say, for `herd.json`."""
    return {"generation": config.generation, "context_length": config.context_length}


def config_to_meta(config: LlamaConfig) -> dict[str, Any]:
    """The contents of `params.json`. UsageError for what Meta's code cannot compute."""
    if config.head_dim * config.n_heads != config.dim:
        _inexpressible("head_dim", config.head_dim, f"dim / n_heads = {config.dim // config.n_heads}")
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **_width_to_meta(config),
    }
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling.kind != "llama3":
            _inexpressible("rope_scaling.kind", scaling.kind, "llama3")
        if scaling.low_freq_factor != 1:
            _inexpressible("rope_scaling.low_freq_factor", scaling.low_freq_factor, "1.0")
        if scaling.original_context != 8192:
            _inexpressible("rope_scaling.original_context", scaling.original_context, "8192")
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": scaling.factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
        }
    elif config.generation not in ("llama1", "llama2", "codellama"):
        params["use_scaled_rope"] = False
    if config.generation == "llama4":
        params |= _llama4_to_meta(config)
    return params


def _llama4_to_meta(config: LlamaConfig) -> dict[str, Any]:
    params: dict[str, Any] = {
        "nope_layer_interval": config.nope_interval or None,
        "attention_chunk_size": config.attention_chunk,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.attention_temperature is not None,
    }
    if config.attention_temperature is not None:
        params["floor_scale"] = config.attention_temperature.floor_scale
        params["attn_scale"] = config.attention_temperature.attn_scale
    return params


def _width_to_meta(config: LlamaConfig) -> dict[str, Any]:
    """A multiplier and rounding that give back the widths: a published pair when one does, else an exact one."""
    for multiplier, multiple_of in _multipliers(config):
        if ffn_width(config.dim, multiplier, multiple_of) != config.ffn_dim:
            continue
        params: dict[str, Any] = {"multiple_of": multiple_of}
        if multiplier is not None:
            params["ffn_dim_multiplier"] = multiplier
        if config.moe is None:
            return params
        for exp, capacity in _expert_scales(config.dim, multiplier or 1.0, config.moe.ffn_dim):
            if expert_width(config.dim, exp, multiplier or 1.0, multiple_of, capacity) == config.moe.ffn_dim:
                moe = {
                    "num_experts": config.moe.n_experts,
                    "capacity_factor": capacity,
                    "auto_scale_F": True,
                    "top_k": config.moe.top_k,
                    "interleave_moe_layer_step": config.moe.interleave,
                }
                return params | {"ffn_exp": exp, "ffn_dim_multiplier": multiplier or 1.0, "moe_args": moe}
    raise AssertionError("the pair without rounding gives any width")


def _expert_scales(dim: int, multiplier: float, width: int) -> Iterator[tuple[float, float]]:
    """(ffn_exp, capacity_factor) for an expert `width`: Llama 4's own, then one that hits it before any rounding."""
    yield 4.0, 1.0
    exp = 4.0
    while (full := expert_width(dim, exp, multiplier, 1, None)) <= width + 1:
        exp *= 2
    yield exp, full / (width + 0.5) - 1


def _multipliers(config: LlamaConfig) -> Iterator[tuple[float | None, int]]:
    """Pairs of the released models, ordered so that each gets its own, then one that hits any width."""
    if config.generation == "llama4":
        yield 1.2, 2048
    yield from ((None, 256), (1.5, 256), (1.3, 4096), (1.3, 1024), (1.2, 4096))
    yield (config.ffn_dim + 0.5) / int(2 * (4 * config.dim) / 3), 1


def _inexpressible(field: str, value: object, allowed: str) -> NoReturn:
    raise UsageError(
        f"Meta's params.json cannot express {field}", value=value, allowed=allowed, fix="herd convert SRC DST --to hf"
    )
