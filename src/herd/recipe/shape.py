"""The shape of a model to train, as recipes write it; a `LlamaConfig` once the vocabulary is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from herd.architecture import AttentionTemperature, LlamaConfig, MoeConfig, RopeScaling, ffn_width, releases
from herd.architecture.config import Generation, ScalingKind
from herd.config import Config
from herd.errors import UsageError, near


class ScalingShape(Config):
    """How rotary frequencies are stretched, as in `herd.architecture.RopeScaling`."""

    kind: ScalingKind = Field(description="llama3: by parts; linear: position interpolation; dynamic: NTK; yarn")
    factor: float = Field(ge=1, le=1e6, description="longer by this")
    low_freq_factor: float = Field(default=1.0, gt=0, description="llama3: up to so many turns it is interpolated")
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3: from so many turns on it stays")
    original_context: int = Field(default=8192, ge=1, description="context before stretching")


class ExpertsShape(Config):
    """Llama 4's mixture of experts, as in `herd.architecture.MoeConfig`."""

    n_experts: int = Field(ge=1, le=4096, description="routed experts E")
    ffn_dim: int = Field(ge=1, description="width of an expert")
    top_k: int = Field(default=1, ge=1, description="experts of a token")
    interleave: int = Field(default=1, ge=1, description="every so many layers is a mixture")


class TemperatureShape(Config):
    """Llama 4's query scale on layers without RoPE, as in `herd.architecture.AttentionTemperature`."""

    floor_scale: int = Field(default=8192, ge=1, description="positions of a step of the scale")
    attn_scale: float = Field(default=0.1, description="weight of its logarithm")


class ModelShape(Config):
    """A Llama: a released one, or a dense one by its sizes; what is given beside `release` takes the release's place.

    The defaults that depend on others follow the family's own rules.
    """

    release: str | None = Field(
        default=None, description="a released model by name, as in llama3.1-8b: every size that is not given is its"
    )
    dim: int = Field(default=256, ge=8, le=65536, description="width D")
    n_layers: int = Field(default=4, ge=1, le=1024, description="layers L")
    n_heads: int = Field(default=4, ge=1, le=1024, description="query heads H")
    n_kv_heads: int | None = Field(default=None, ge=1, description="key and value heads G; null: as many as n_heads")
    head_dim: int | None = Field(default=None, ge=2, description="width K of a head, even; null: dim / n_heads")
    ffn_dim: int | None = Field(
        default=None, ge=1, description="feed-forward width F; null: 8/3 of dim, rounded up to a multiple of 64"
    )
    context_length: int = Field(default=512, ge=1, description="tokens of context")
    rope_theta: float = Field(default=500_000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: ScalingShape | None = Field(
        default=None, description="how they are stretched: {kind, factor, original_context, ...}; null: they are not"
    )
    norm_eps: float = Field(default=1e-5, gt=0, lt=1, description="epsilon of RMSNorm")
    tied_embeddings: bool = Field(default=False, description="the output matrix is the embedding")
    generation: Generation = Field(default="llama3", description="what files say it is; those below need llama4")
    moe: ExpertsShape | None = Field(default=None, description="mixture of experts: {n_experts, ffn_dim, ...}")
    nope_interval: int = Field(default=0, ge=0, description="every so many layers has no RoPE; 0: all have it")
    attention_chunk: int | None = Field(
        default=None, ge=1, description="tokens that see each other on layers with RoPE; null: all"
    )
    qk_norm: bool = Field(default=False, description="normalise queries and keys on layers with RoPE")
    attention_temperature: TemperatureShape | None = Field(
        default=None, description="scale queries on layers without RoPE: {floor_scale, attn_scale}"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_release(cls, data: Any) -> Any:
        """Fill in the sizes of a release, so that everything that is asked of the shape is there."""
        if not isinstance(data, Mapping) or not isinstance(name := data.get("release"), str):
            return data
        if name not in releases:
            raise ValueError(f"there is no release {name!r}; {near(name, releases)}")
        return {**shape_of(releases[name].config), **data}

    @model_validator(mode="after")
    def _fits(self) -> ModelShape:
        try:
            self.to_llama(vocab_size=256)  # LlamaConfig checks what depends on several fields
        except UsageError as error:
            raise ValueError(str(error)) from None  # so that it names recipe and stage
        return self

    def to_llama(self, vocab_size: int) -> LlamaConfig:
        """The complete configuration. Raises UsageError when the values contradict each other."""
        if self.head_dim is None and self.dim % self.n_heads:
            raise UsageError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}, so head_dim must be given")
        scaling, moe, temperature = self.rope_scaling, self.moe, self.attention_temperature
        return LlamaConfig(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            head_dim=self.head_dim or self.dim // self.n_heads,
            ffn_dim=self.ffn_dim or ffn_width(self.dim, None, 64),
            vocab_size=vocab_size,
            context_length=self.context_length,
            rope_theta=self.rope_theta,
            rope_scaling=None if scaling is None else RopeScaling(**scaling.model_dump()),
            norm_eps=self.norm_eps,
            tied_embeddings=self.tied_embeddings,
            moe=None if moe is None else MoeConfig(**moe.model_dump()),
            nope_interval=self.nope_interval,
            attention_chunk=self.attention_chunk,
            qk_norm=self.qk_norm,
            attention_temperature=None if temperature is None else AttentionTemperature(**temperature.model_dump()),
            generation=self.generation,
        )


def shape_of(config: LlamaConfig) -> dict[str, Any]:
    """The shape as a recipe writes it, every size given; the vocabulary's size is the tokenizer's."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "vocab_size"}
