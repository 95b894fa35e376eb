"""The shape of a model to train, as recipes write it; a `LlamaConfig` once the vocabulary is known."""

from __future__ import annotations

from pydantic import Field, model_validator

from herd.architecture import LlamaConfig, ffn_width
from herd.config import Config
from herd.errors import UsageError


class ModelShape(Config):
    """A dense Llama 3. The defaults that depend on others follow the family's own rules."""

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
    norm_eps: float = Field(default=1e-5, gt=0, lt=1, description="epsilon of RMSNorm")
    tied_embeddings: bool = Field(default=False, description="the output matrix is the embedding")

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
            norm_eps=self.norm_eps,
            tied_embeddings=self.tied_embeddings,
            generation="llama3",
        )
