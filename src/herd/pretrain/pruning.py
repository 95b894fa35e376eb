"""Structured pruning: a Llama cut down to a smaller shape by what some rows of text use least, in one shot.

Cut are layers, key heads with their queries, queries of a key head, places of a head, feed-forward channels and
channels of the residual stream, all by activations (as Minitron, arXiv 2407.14679, and ShortGPT, arXiv 2403.03853).
Llama 3.2 1B and 3B were pruned from 3.1 8B; how is not published, so every rule here is a choice of this project:

layer              1 - cos(state before it, state after it), a mean over tokens; those that change least go
head               E[x²] of its places · their squared columns of wo, summed
place of a head    values by the same, one for one; queries and keys by RoPE: of pairs 0, 1, 2, … those stay whose
                   frequencies the smaller head has, every K/K'-th
feed-forward       E[x²] of the channel · its squared column of w2
residual channel   its share of E[x²] behind each norm, a mean over all norms

What is left computes what it did: norms are scaled by √(f·D/D'), f the share of E[x²] before them in what stays, and
queries by √(K'/K). So a model whose other parts are zero is unchanged.

Letters: D width, H query heads, G key heads, K places of a head, F feed-forward width, V vocabulary; ' after cutting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from herd.architecture import LlamaConfig
from herd.errors import UsageError
from herd.model import Llama
from herd.model.norm import RMSNorm


@dataclass(frozen=True)
class Importance:
    """What rows of text use, means over tokens: `layers` [L]; E[x²] by the name of the module it is put into, and
    before norms as well as behind them ("layers.0.ffn_norm" and "layers.0.ffn_norm, out")."""

    layers: Tensor
    squares: dict[str, Tensor]


def prune(model: Llama, target: LlamaConfig, rows: Iterable[Sequence[int]]) -> Llama:
    """A new model of the target's shape out of `model`; `rows` are token ids of calibration text.

    A larger vocabulary gets rows for its new ids: the mean of the others. Raises UsageError for a target that is larger
    elsewhere, for mixtures of experts and for heads whose width is no whole part.
    """
    check(model.config, target)
    source = model.config
    used = measure(model, rows) if shrinks(source, target) else None
    cut = _Cut(model, target, used)
    with torch.device("meta"):
        smaller = Llama(target)
    for name, parameter in list(smaller.named_parameters()):
        module, _, leaf = name.rpartition(".")
        weight = cut.weight(name).contiguous().clone()
        assert weight.shape == parameter.shape, (name, weight.shape, parameter.shape)
        smaller.get_submodule(module).register_parameter(leaf, nn.Parameter(weight))
    return smaller


def shrinks(source: LlamaConfig, target: LlamaConfig) -> bool:
    """Whether anything is cut."""
    return any(getattr(target, name) < getattr(source, name) for name in _SIZES)


_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")


def check(source: LlamaConfig, target: LlamaConfig) -> None:
    """Raises UsageError, with every reason, where the target cannot be cut out of the source."""
    found = [f"{name} {getattr(source, name)}, not {getattr(target, name)}" for name in _SIZES
             if getattr(target, name) > getattr(source, name)]  # fmt: skip
    groups = source.n_heads // source.n_kv_heads
    if target.n_heads // target.n_kv_heads > groups:
        found.append(f"{groups} queries of a key head, not {target.n_heads // target.n_kv_heads}")
    if source.head_dim % target.head_dim:
        found.append(f"heads of {source.head_dim} places, of which {target.head_dim} are no whole part")
    if target.vocab_size < source.vocab_size:
        found.append(f"a vocabulary of {source.vocab_size:,}, which is not cut")
    if source.tied_embeddings and not target.tied_embeddings:
        found.append("one matrix for embedding and output")
    if source.moe or target.moe or source.nope_interval or target.nope_interval:
        found.append("mixtures of experts or layers without RoPE, which are not cut")
    if found:
        raise UsageError("this shape cannot be cut out of the checkpoint", allowed=f"it has {'; '.join(found)}")


@torch.inference_mode()
def measure(model: Llama, rows: Iterable[Sequence[int]]) -> Importance:
    """Run the rows and see what is used. Raises UsageError where there is none."""
    squares: dict[str, Tensor] = {}
    moved = torch.zeros(model.config.n_layers, dtype=torch.float64)
    tokens = 0

    def add(name: str, x: Tensor) -> None:
        total = x.float().square().flatten(0, -2).sum(0).double()
        squares[name] = squares[name] + total if name in squares else total

    def watch(name: str, module: nn.Module) -> list[Any]:
        hooks = [module.register_forward_pre_hook(lambda _, inputs: add(name, inputs[0]))]
        if isinstance(module, RMSNorm):
            hooks.append(module.register_forward_hook(lambda _, inputs, x: add(f"{name}, out", x)))
        return hooks

    def change(layer: int) -> Any:
        def add_change(_: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> None:
            moved[layer] += (1 - functional.cosine_similarity(inputs[0].float(), x.float(), dim=-1)).sum()

        return add_change

    hooks = [
        hook
        for name, module in model.named_modules()
        if isinstance(module, RMSNorm) or name.endswith((".wo", ".w2"))
        for hook in watch(name, module)
    ]
    hooks += [block.register_forward_hook(change(layer)) for layer, block in enumerate(model.layers)]
    try:
        for ids in rows:
            model.hidden(torch.tensor([list(ids)], device=model.embed.weight.device))
            tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise UsageError("there is no text to find out what can be cut", allowed="at least one calibration row")
    return Importance(moved / tokens, {name: total / tokens for name, total in squares.items()})


class _Cut:
    """Which parts of a model stay, and its weights without the rest."""

    def __init__(self, model: Llama, target: LlamaConfig, used: Importance | None) -> None:
        self._weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._source, self._target, self._used = model.config, target, used
        if used is None:
            self._layers, self._channels_D = list(range(target.n_layers)), torch.arange(target.dim)
        else:
            self._layers = largest(used.layers, target.n_layers).tolist()
            norms = [x / x.sum() for name, x in used.squares.items() if name.endswith(", out")]
            self._channels_D = largest(torch.stack(norms).sum(0), target.dim)

    def weight(self, name: str) -> Tensor:
        """The weight of this name in the smaller model."""
        if not name.startswith("layers."):
            x = self._weights[name]
            return self._vocabulary(x) if x.ndim == 2 else self._norm(name)
        _, number, rest = name.split(".", 2)
        old = f"layers.{self._layers[int(number)]}."
        if rest.endswith("norm.weight"):
            return self._norm(old + rest)
        if rest.startswith("ffn."):
            return self._feed_forward(old, rest)
        return self._attention(old, rest)

    def _norm(self, name: str) -> Tensor:
        source, target = self._source, self._target
        weight_D = self._weights[name][self._channels_D]
        if self._used is None:
            return weight_D
        before_D = self._used.squares[name.removesuffix(".weight")]
        kept = float(before_D[self._channels_D].sum() / before_D.sum())
        return weight_D * math.sqrt(kept * source.dim / target.dim)

    def _vocabulary(self, x_VD: Tensor) -> Tensor:
        x_VD = x_VD[:, self._channels_D]
        more = self._target.vocab_size - x_VD.shape[0]
        return torch.cat([x_VD, x_VD.mean(0, keepdim=True).expand(more, -1)])

    def _feed_forward(self, old: str, rest: str) -> Tensor:
        w2_DF = self._weights[old + "ffn.w2.weight"]
        stays_F = torch.arange(self._target.ffn_dim)
        if self._used is not None:
            importance_F = self._used.squares[old + "ffn.w2"] * w2_DF.double().square().sum(0)
            stays_F = largest(importance_F, self._target.ffn_dim)
        if rest == "ffn.w2.weight":
            return w2_DF[self._channels_D][:, stays_F]
        return self._weights[old + rest][stays_F][:, self._channels_D]

    def _attention(self, old: str, rest: str) -> Tensor:
        source, target = self._source, self._target
        heads, width = source.n_heads, source.head_dim
        stay_H, stay_G, places_GK = self._heads(old)
        x = self._weights[old + rest]
        if rest == "attention.wo.weight":
            places_HK = places_GK.repeat_interleave(target.n_heads // target.n_kv_heads, 0)
            x_DHK = torch.unflatten(x[self._channels_D], 1, (heads, width))[:, stay_H]
            return x_DHK.gather(2, places_HK.expand(len(x_DHK), -1, -1)).flatten(1)
        x = torch.unflatten(x[:, self._channels_D], 0, (-1, width))
        if rest == "attention.wv.weight":
            x_GKD = x[stay_G]
            return x_GKD.gather(1, places_GK.unsqueeze(2).expand(-1, -1, target.dim)).flatten(0, 1)
        pairs = torch.arange(0, width // 2, width // target.head_dim)
        turned_K = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
        if rest == "attention.wk.weight":
            return x[stay_G][:, turned_K].flatten(0, 1)
        return x[stay_H][:, turned_K].flatten(0, 1) * math.sqrt(target.head_dim / width)

    def _heads(self, old: str) -> tuple[Tensor, Tensor, Tensor]:
        """Query heads [H'], key heads [G'], and of each of these the places of its values [G', K']."""
        source, target = self._source, self._target
        if self._used is None:
            every = torch.arange(target.head_dim).expand(target.n_kv_heads, -1)
            return torch.arange(target.n_heads), torch.arange(target.n_kv_heads), every
        wo_DK = self._weights[old + "attention.wo.weight"].double()
        importance = self._used.squares[old + "attention.wo"] * wo_DK.square().sum(0)
        group = source.n_heads // source.n_kv_heads
        by_GQK = torch.unflatten(importance, 0, (source.n_kv_heads, group, source.head_dim))
        stay_G = largest(by_GQK.sum((1, 2)), target.n_kv_heads)
        stay_GQ = torch.stack([largest(one, target.n_heads // target.n_kv_heads) for one in by_GQK[stay_G].sum(2)])
        kept = torch.stack([by_GQK[g][queries] for g, queries in zip(stay_G.tolist(), stay_GQ, strict=True)])
        places_GK = torch.stack([largest(one, target.head_dim) for one in kept.sum(1)])
        return (stay_G.unsqueeze(1) * group + stay_GQ).flatten(), stay_G, places_GK


def largest(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, in ascending order; the earlier of equals."""
    return torch.sort(importance, descending=True, stable=True).indices[:count].sort().values
