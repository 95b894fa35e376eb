"""What a Llama is, as data: one frozen dataclass for every generation, from LLaMA 1 to Llama 4's text model.

Letters used in shapes all over Herd: B batch, S sequence, D model width, H query heads, G key/value heads, K head
width, F feed-forward width, V vocabulary, E experts, L layers.
Sources: the Llama papers and Meta's reference code; the Llama 4 fields follow its model code.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from herd.errors import UsageError

Generation = Literal["llama1", "llama2", "codellama", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"]
ScalingKind = Literal["llama3", "linear", "dynamic", "yarn"]

# Far beyond every model (theta 4.5e10 and factor 128 are the largest known); within them no frequency becomes 0 or inf.
_LARGEST_THETA = 1e15
_LARGEST_FACTOR = 1e6


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on.

    "llama3": Llama 3.1's by-parts rule (frequencies.py has the formula) · "linear": position interpolation ·
    "dynamic": NTK-aware theta that follows the current length · "yarn": NTK-by-parts with attention temperature.
    """

    kind: ScalingKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        _require(self.kind in get_args(ScalingKind), "rope_scaling.kind", self.kind, ", ".join(get_args(ScalingKind)))
        factor_fits = _finite(self.factor) and 1 <= self.factor <= _LARGEST_FACTOR
        _require(factor_fits, "rope_scaling.factor", self.factor, f"a number from 1 to {_LARGEST_FACTOR:,.0f}")
        low, high = self.low_freq_factor, self.high_freq_factor
        _require(_finite(low) and low > 0, "rope_scaling.low_freq_factor", low, "a number > 0")
        _require(_finite(high) and high >= low, "rope_scaling.high_freq_factor", high, f"a number >= {low}")
        _positive("rope_scaling.original_context", self.original_context)


@dataclass(frozen=True)
class MoeConfig:
    """Llama 4's mixture of experts: sigmoid top-k routing beside one always-on shared expert of the same width.

    Layer i (from 0) is a mixture when (i + 1) % interleave == 0; `ffn_dim` is the width of one expert.
    """

    n_experts: int
    ffn_dim: int
    top_k: int = 1
    interleave: int = 1

    def __post_init__(self) -> None:
        for name in ("n_experts", "ffn_dim", "top_k", "interleave"):
            _positive(f"moe.{name}", getattr(self, name))
        _require(self.top_k <= self.n_experts, "moe.top_k", self.top_k, f"at most n_experts = {self.n_experts}")


@dataclass(frozen=True)
class AttentionTemperature:
    """Llama 4's query scale on layers without RoPE: ln(floor((pos + 1) / floor_scale) + 1) * attn_scale + 1."""

    floor_scale: int = 8192
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        _positive("attention_temperature.floor_scale", self.floor_scale)
        _require(_finite(self.attn_scale), "attention_temperature.attn_scale", self.attn_scale, "a finite number")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of one Llama. Values that contradict each other raise UsageError when the object is made."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    context_length: int = 8192
    tied_embeddings: bool = False
    moe: MoeConfig | None = None
    nope_interval: int = 0
    attention_chunk: int | None = None
    qk_norm: bool = False
    attention_temperature: AttentionTemperature | None = None
    generation: Generation = "llama3"

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "ffn_dim",
            "vocab_size",
            "context_length",
        ):
            _positive(name, getattr(self, name))
        _require(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads}")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE turns pairs)")
        _require(_finite(self.norm_eps) and self.norm_eps > 0, "norm_eps", self.norm_eps, "a number > 0")
        theta_fits = _finite(self.rope_theta) and 1 < self.rope_theta <= _LARGEST_THETA
        _require(theta_fits, "rope_theta", self.rope_theta, f"a number > 1, at most {_LARGEST_THETA:g}")
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic":
            _require(self.head_dim > 2, "head_dim", self.head_dim, "more than 2 with dynamic RoPE scaling")
        _require(_is_int(self.nope_interval) and self.nope_interval >= 0, "nope_interval", self.nope_interval, ">= 0")
        if self.attention_chunk is not None:
            _positive("attention_chunk", self.attention_chunk)
        _require(
            self.generation in get_args(Generation), "generation", self.generation, ", ".join(get_args(Generation))
        )
        if self.generation != "llama4":
            for name in ("moe", "nope_interval", "attention_chunk", "qk_norm", "attention_temperature"):
                value = getattr(self, name)
                _require(not value, name, value, f"unset: only llama4 has it, this is {self.generation}")

    def is_moe_layer(self, layer: int) -> bool:
        """True when layer `layer` (from 0) routes tokens to experts."""
        return self.moe is not None and (layer + 1) % self.moe.interleave == 0

    def uses_rope(self, layer: int) -> bool:
        """False on the layers (from 0) that Llama 4 leaves without rotary positions (iRoPE)."""
        return not self.nope_interval or (layer + 1) % self.nope_interval != 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlamaConfig:
        """Strict inverse of `to_dict`: unknown fields, missing fields and wrong types raise UsageError."""
        values = dict(data)
        nested = {"rope_scaling": RopeScaling, "moe": MoeConfig, "attention_temperature": AttentionTemperature}
        for name, kind in nested.items():
            if isinstance(values.get(name), Mapping):
                values[name] = _build(kind, values[name], f"{name}.")
        config = _build(cls, values, "")
        assert isinstance(config, LlamaConfig)
        return config


def ffn_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """The reference's rule: two thirds of 4·dim, times an optional multiplier, rounded up to a multiple."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _build(cls: type, data: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        _require(name in fields, f"{prefix}{name}", name, f"one of {', '.join(fields)}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in data]
    if missing:
        raise UsageError(f"LlamaConfig: field {prefix + missing[0]!r} is missing")
    return cls(**data)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise UsageError(f"LlamaConfig: field {name!r} is not valid", value=value, allowed=allowed)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(name: str, value: object) -> None:
    _require(_is_int(value) and value > 0, name, value, "a whole number > 0")  # type: ignore[operator]


def _finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # unlike math.isfinite, this takes whole numbers of any length
