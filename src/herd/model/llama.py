"""Every Llama's text decoder, from token ids to logits: one module for all generations, shaped by its `LlamaConfig`.

Parameter names are the canonical tensor names of `herd.architecture.tensors`. Checked against transformers in
tests/model. Letters: B batch, S sequence, D model width, H query heads, G key heads, K head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from herd.architecture import AttentionTemperature, LlamaConfig
from herd.errors import UsageError
from herd.model.attention import attend
from herd.model.attention_mask import AttentionMask, KeyRanges, document_starts
from herd.model.cache import CacheWrite, KVCache
from herd.model.feed_forward import FeedForward
from herd.model.moe import MixtureOfExperts
from herd.model.norm import RMSNorm, rms_normalise
from herd.model.rope import Rotation, rotate, rotation


class Places(NamedTuple):
    """Where the tokens of a call stand: computed once, used by every layer."""

    turn: Rotation
    local: KeyRanges
    """Visible keys on layers with RoPE (inside a chunk, where the model has chunks)."""
    everywhere: KeyRanges
    """Visible keys on layers without RoPE."""
    temperature_BS: Tensor | None
    """Factor on the queries of layers without RoPE."""


class SequencePart(Protocol):
    """Which tokens of every row a model computes, where others compute the rest (herd.train.parallel.context)."""

    def mine(self, x: Tensor) -> Tensor:
        """The part of a tensor over the whole row, along axis 1."""

    def places(self, places: Places) -> Places:
        """The places of these tokens."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, or without them on Llama 4's NoPE layers."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.uses_rope = config.uses_rope(layer)
        self.norm_eps = config.norm_eps if config.qk_norm and self.uses_rope else None
        self.attend: Callable[[Tensor, Tensor, Tensor, KeyRanges], Tensor] = attend
        """Replaced where keys are on other ranks."""
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, places: Places, layer: int | None, write: CacheWrite | None) -> Tensor:
        """Same shape as `x_BSD`. `layer` and `write` belong to the cache."""
        q_BSHK = torch.unflatten(self.wq(x_BSD), -1, (-1, self.head_dim))
        k_BSGK = torch.unflatten(self.wk(x_BSD), -1, (-1, self.head_dim))
        v_BSGK = torch.unflatten(self.wv(x_BSD), -1, (-1, self.head_dim))
        if self.uses_rope:
            q_BSHK, k_BSGK = rotate(q_BSHK, places.turn), rotate(k_BSGK, places.turn)
            if self.norm_eps is not None:  # after the rotation, without a weight
                q_BSHK, k_BSGK = rms_normalise(q_BSHK, self.norm_eps), rms_normalise(k_BSGK, self.norm_eps)
        elif places.temperature_BS is not None:
            q_BSHK = (q_BSHK * places.temperature_BS[:, :, None, None]).to(q_BSHK.dtype)
        if write is not None and layer is not None:
            k_all, v_all = write.write(layer, k_BSGK, v_BSGK)
            if not write.from_empty:
                k_BSGK, v_BSGK = k_all, v_all
        o_BSHK = self.attend(q_BSHK, k_BSGK, v_BSGK, places.local if self.uses_rope else places.everywhere)
        y_BSD: Tensor = self.wo(o_BSHK.flatten(2))
        return y_BSD


class Block(nn.Module):
    """One pre-norm decoder layer: h = x + attention(norm(x)), then h + ffn(norm(h))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        if config.moe is not None and config.is_moe_layer(layer):
            self.moe = MixtureOfExperts(config.dim, config.moe)
        else:
            self.ffn = FeedForward(config.dim, config.ffn_dim)

    def forward(
        self, x_BSD: Tensor, places: Places, layer: int | None = None, write: CacheWrite | None = None
    ) -> Tensor:
        """Same shape as `x_BSD`."""
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), places, layer, write)
        feed_forward = self.moe if hasattr(self, "moe") else self.ffn
        y_BSD: Tensor = h_BSD + feed_forward(self.ffn_norm(h_BSD))
        return y_BSD


class Llama(nn.Module):
    """A Llama text decoder. Weights are uninitialised until `init_weights` or `herd.model.load`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.sequence: SequencePart | None = None
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, D]; the embedding itself when they are tied."""
        return self.embed.weight if self.config.tied_embeddings else self.output.weight

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits [B, S, V] in float32. The arguments are those of `hidden`."""
        x_BSD = self.hidden(
            tokens_BS, document_ids_BS=document_ids_BS, positions_BS=positions_BS, cache=cache, lengths=lengths
        )
        return functional.linear(x_BSD, self.output_weight).float()

    def hidden(
        self,
        tokens_BS: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """States after the final norm, [B, S, D].

        document_ids_BS: packed rows; neighbours with the same id are one document, which sees only itself and whose
        positions start at 0. · positions_BS: positions to use instead; they must grow by one inside a document. ·
        cache: append to it, and see what it holds. · lengths (with a cache): row b is lengths[b] tokens and padding.
        Raises UsageError for contradictory arguments, ContextLengthExceeded when the cache is full.
        """
        batch, width = tokens_BS.shape
        if lengths is not None and cache is None:
            raise UsageError("lengths say how many tokens of a row enter the cache", allowed="lengths with a cache")
        write = None if cache is None else cache.reserve([width] * batch if lengths is None else lengths, width)
        places = self.places(tokens_BS, document_ids_BS, positions_BS, write)
        if self.sequence is not None:
            tokens_BS, places = self.sequence.mine(tokens_BS), self.sequence.places(places)
        x_BSD = self.embed(tokens_BS)
        for i, block in enumerate(self.layers):
            x_BSD = block(x_BSD, places) if write is None else block(x_BSD, places, i, write)
        if write is not None:
            write.commit()
        y_BSD: Tensor = self.norm(x_BSD)
        return y_BSD

    def init_weights(self, seed: int) -> None:
        """Fill all weights: see `initial_weight`."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_weight(self.config, name, parameter.shape, seed))

    def places(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        write: CacheWrite | None = None,
    ) -> Places:
        """Where the tokens of whole rows stand; of `tokens_BS` only the shape counts."""
        config, device = self.config, tokens_BS.device
        batch, width = tokens_BS.shape
        cached, n_keys = None, width
        given_BS = positions_BS
        if write is not None and (documents_BS is not None or given_BS is not None):
            raise UsageError("a cache counts positions itself", allowed="no document_ids and no positions with a cache")
        if given_BS is None:
            positions_BS = torch.arange(width, device=device).expand(batch, width)
            if documents_BS is not None:
                positions_BS = positions_BS - document_starts(documents_BS)
            if write is not None and not write.from_empty:
                cached, n_keys = write.before, write.n_keys
                positions_BS = positions_BS + torch.tensor(cached, device=device).unsqueeze(1)
        assert positions_BS is not None

        def visible(chunk: int | None) -> KeyRanges:
            mask = AttentionMask(document_ids_BS=documents_BS, chunk=chunk, positions_BS=given_BS, cached=cached)
            return mask.key_ranges(width, n_keys, device)

        everywhere = visible(None)
        local = everywhere if config.attention_chunk is None else visible(config.attention_chunk)
        temperature = config.attention_temperature
        return Places(
            turn=rotation(config, positions_BS),
            local=local,
            everywhere=everywhere,
            temperature_BS=None if temperature is None else _temperature(positions_BS, temperature),
        )


def _temperature(positions_BS: Tensor, temperature: AttentionTemperature) -> Tensor:
    """ln(floor((position + 1) / floor_scale) + 1) · attn_scale + 1 (arXiv 2501.19399; Llama 4's NoPE layers)."""
    steps_BS = torch.floor((positions_BS.float() + 1) / temperature.floor_scale)
    return torch.log1p(steps_BS) * temperature.attn_scale + 1


def initial_weight(config: LlamaConfig, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The one initialisation: normal(0, 0.02), projections back into the residual stream divided by sqrt(2 L).

    Norm weights are 1. Every tensor draws from a generator of its own, so its values depend on the seed and its name
    alone (the scaling is GPT-2's).
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape)
    back = ".wo." in name or name.split(".")[-1] == "w2" or ".w2." in name
    std = 0.02 / math.sqrt(2 * config.n_layers) if back else 0.02
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(*shape).normal_(0.0, std, generator=generator)
