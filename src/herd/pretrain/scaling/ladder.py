"""The plan of an IsoFLOP ladder: which shapes to train at each budget, on how many tokens, in how many steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from herd.architecture import (
    LlamaConfig,
    ffn_width,
    multiplying_parameter_count,
    parameter_count,
    training_flops_per_token,
)
from herd.config import Config
from herd.errors import UsageError

_NARROWEST, _NARROWEST_32, _WIDEST = 16, 128, 16_384
_FEWEST_STEPS = 12  # half a step is then some 4 % of the budget; the fit takes runs within 10 % as one
_APART = 1.25
"""Budgets differ by this factor or more, so that the fit tells their runs apart, up to half a step off as they are."""
_SMALL, _LARGE = (6e18, 250e3), (1e22, 4e6)
"""(budget in FLOPs, tokens of a batch) at the two ends of the paper's ladder."""
_BATCH_EXPONENT = math.log(_LARGE[1] / _SMALL[1]) / math.log(_LARGE[0] / _SMALL[0])
_LR_EXPONENT = math.log(2e-4 / 4e-4) / math.log(16e9 / 40e6)  # the paper's peak rates, from 40M to 16B parameters


class LadderConfig(Config):
    """The budgets of a ladder, and the sizes at each."""

    budgets: tuple[float, ...] = Field(min_length=2, description="training FLOPs of the ladder's rungs, two or more")
    sizes: int = Field(default=4, ge=3, le=32, description="models at each budget; a parabola needs three")
    ratio: float = Field(
        default=20.0,
        gt=0,
        le=1e6,
        description="tokens per weight where the best size is expected (Hoffmann et al.: 20)",
    )
    spread: float = Field(
        default=3.0, ge=1.5, le=100, description="the sizes reach from this many times fewer weights to so many more"
    )


@dataclass(frozen=True)
class Rung:
    """One model to train: its shape, and the steps that spend the budget on it.

    `flops` are exact for the steps there are; `lr_scale` multiplies the learning rates of the reference shape.
    """

    budget: float
    shape: LlamaConfig
    params: int
    weights: int
    seq_len: int
    batch_size: int
    steps: int
    tokens: int
    flops: float
    lr_scale: float

    @property
    def name(self) -> str:
        """As in `1e15-d128`."""
        return f"{self.budget:.4g}-d{self.shape.dim}".replace("+", "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the shape in the words of a recipe's `base.model`."""
        shape = {name: getattr(self.shape, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")}
        numbers = {name: getattr(self, name) for name in ("params", "weights", "tokens", "flops", "steps")}
        return {
            "name": self.name,
            "budget": self.budget,
            **numbers,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "lr_scale": self.lr_scale,
            "model": shape | {"head_dim": self.shape.head_dim},
        }


def plan(config: LadderConfig, reference: LlamaConfig, seq_len: int) -> list[Rung]:
    """The ladder's runs, from the smallest budget and model on.

    `reference` gives what all models share: vocabulary, context, rotary base, tied embeddings; learning rates are
    scaled from its size. Tokens are budget / FLOPs per token of the architecture, attention included, for rows of
    `seq_len` tokens. A batch holds 250K tokens at 6e18 FLOPs and 4M at 1e22, as in the paper, and between and beyond
    them C^0.374 as much; the rate falls as params^-0.116, from the paper's 4e-4 at 40M to 2e-4 at 16B.
    Raises UsageError for a budget that has no such sizes or is spent in fewer than 12 steps, and for budgets that are
    so near to each other that the fit would take them for one.
    """
    if seq_len > reference.context_length:
        allowed = f"up to {reference.context_length}"
        raise UsageError("rows are longer than the model's context", value=seq_len, allowed=allowed)
    for budget in config.budgets:
        if not 1.0 <= budget <= 1e40:
            raise UsageError("this is no budget", value=budget, allowed="FLOPs from 1 to 1e40, as 1e15")
    for one, other in itertools.pairwise(sorted(config.budgets)):
        if other < one * _APART:
            raise UsageError(
                "two budgets are as good as one", value=f"{one:.4g}, {other:.4g}", allowed=f"{_APART} times as much"
            )
    shapes = [(shape, multiplying_parameter_count(shape)) for shape in _shapes(reference)]
    per_token = {shape.dim: training_flops_per_token(shape, seq_len) for shape, _ in shapes}
    rungs = []
    for budget in sorted(config.budgets):
        for shape, weights in _chosen(budget, config, shapes, per_token):
            rungs.append(_rung(budget, shape, weights, per_token[shape.dim], reference, seq_len))
    return rungs


def shape_of(dim: int, reference: LlamaConfig) -> LlamaConfig:
    """The shape of width `dim`, with what `reference` says of the rest.

    Layers: max(√(dim/8), dim/128), which meets 4 at 128, Llama 3.2 1B's 16 at 2,048 and Llama 3.1 8B's 32 at 4,096.
    Heads are 16 wide below dim 128, 32 up to 512, 64 to 2,048, 128 beyond. Each has keys and values of its own: shared
    ones save memory when a model answers, and their number would change from width to width here.
    """
    n_heads = dim // _head_dim(dim)
    return LlamaConfig(
        dim=dim,
        n_layers=max(1, round(max(math.sqrt(dim / 8), dim / 128))),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=_head_dim(dim),
        ffn_dim=ffn_width(dim, None, 64),
        vocab_size=reference.vocab_size,
        context_length=reference.context_length,
        rope_theta=reference.rope_theta,
        norm_eps=reference.norm_eps,
        tied_embeddings=reference.tied_embeddings,
        generation=reference.generation,
    )


def _head_dim(dim: int) -> int:
    return 16 if dim < _NARROWEST_32 else 32 if dim <= 512 else 64 if dim <= 2048 else 128


def _shapes(reference: LlamaConfig) -> Iterator[LlamaConfig]:
    dim = _NARROWEST
    while dim <= _WIDEST:
        yield shape_of(dim, reference)
        dim += _head_dim(dim + 1)


def _chosen(
    budget: float, config: LadderConfig, shapes: list[tuple[LlamaConfig, int]], per_token: dict[int, float]
) -> list[tuple[LlamaConfig, int]]:
    """The shapes whose weights come nearest to steps of equal ratio around the expected best."""

    def ratio(shape: LlamaConfig, weights: int) -> float:
        return budget / per_token[shape.dim] / weights

    # Tokens per weight fall from shape to shape: the best is where they pass the expected ratio, between two shapes.
    best = min(shapes, key=lambda item: abs(math.log(ratio(*item) / config.ratio)))
    exact = best[1] * math.sqrt(ratio(*best) / config.ratio)  # ratio ~ weights^-2 at a fixed budget
    left = list(shapes)
    for i in range(config.sizes):
        target = exact * config.spread ** (2 * i / (config.sizes - 1) - 1)
        left.remove(min(left, key=lambda item: abs(math.log(item[1] / target))))
    chosen = [item for item in shapes if item not in left]
    if not chosen[0][1] < exact < chosen[-1][1]:
        raise UsageError(
            f"no models lie on both sides of {exact:,.0f} weights, where the best size is expected",
            value=f"budget {budget:.3g}",
            allowed=f"widths from {_NARROWEST} to {_WIDEST}: {shapes[0][1]:,} to {shapes[-1][1]:,} weights",
            fix="change the budgets, or the ratio, or take a smaller vocabulary",
        )
    return chosen


def _rung(
    budget: float, shape: LlamaConfig, weights: int, per_token: float, reference: LlamaConfig, seq_len: int
) -> Rung:
    batch_tokens = _SMALL[1] * (budget / _SMALL[0]) ** _BATCH_EXPONENT
    batch_size = max(1, round(batch_tokens / seq_len))
    steps = round(budget / per_token / (batch_size * seq_len))
    if steps < _FEWEST_STEPS:
        raise UsageError(
            f"a model of width {shape.dim} spends this budget in {steps} steps",
            value=f"budget {budget:.3g}",
            allowed=f"{_FEWEST_STEPS} steps or more",
            fix="take larger budgets, or shorter rows",
        )
    tokens, params = steps * batch_size * seq_len, parameter_count(shape)
    return Rung(
        budget=budget,
        shape=shape,
        params=params,
        weights=weights,
        seq_len=seq_len,
        batch_size=batch_size,
        steps=steps,
        tokens=tokens,
        flops=tokens * per_token,
        lr_scale=(params / parameter_count(reference)) ** _LR_EXPONENT,
    )
