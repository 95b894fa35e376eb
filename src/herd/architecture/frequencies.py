"""Rotary frequencies of every Llama, in pure Python, as the one source for the torch model and the native engine.

θ_j = theta^(-2j/K) for j = 0 … K/2-1 (RoFormer, arXiv 2104.09864), then scaled:
- llama3 (Meta's reference): with wavelength λ = 2π/θ and C = original context, θ stays when λ < C/high, becomes
  θ/factor when λ > C/low, and is blended between: s = (C/λ - low)/(high - low); (1-s)·θ/factor + s·θ.
- linear, or position interpolation (arXiv 2306.15595): θ/factor.
- dynamic NTK: theta·s^(K/(K-2)), s following the length.
- yarn (arXiv 2309.00071): per-dimension ramp between θ/factor and θ over the number of turns in C, from β=32 to α=1.
"""

from __future__ import annotations

import math

from herd.architecture.config import LlamaConfig, RopeScaling
from herd.errors import UsageError

_YARN_FAST_TURNS = 32.0  # dimensions that turn more often than this within C keep their frequency
_YARN_SLOW_TURNS = 1.0  # dimensions that turn less often than this are interpolated


def rope_frequencies(config: LlamaConfig, length: int | None = None) -> list[float]:
    """Angular frequency of each of the K/2 pairs, in radians per position.

    `length` matters to "dynamic" scaling only: the number of positions in use (default: the configured context).
    """
    scaling, head_dim, theta = config.rope_scaling, config.head_dim, config.rope_theta
    if scaling is not None and scaling.kind == "dynamic":
        theta = _dynamic_theta(scaling, head_dim, theta, length or config.context_length)
    plain = [theta ** (-2.0 * j / head_dim) for j in range(head_dim // 2)]
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in plain]
    if scaling.kind == "llama3":
        return [_llama3(frequency, scaling) for frequency in plain]
    return [_yarn(j, frequency, scaling, head_dim, theta) for j, frequency in enumerate(plain)]


def attention_scale(config: LlamaConfig) -> float:
    """Factor on the rotated queries and keys: YaRN's 0.1·ln(s) + 1, and 1 for everything else."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn" or scaling.factor <= 1:
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    wavelength = 2 * math.pi / frequency
    context, low, high = scaling.original_context, scaling.low_freq_factor, scaling.high_freq_factor
    if wavelength > context / low:
        return frequency / scaling.factor
    if wavelength < context / high or low == high:
        return frequency
    keep = (context / wavelength - low) / (high - low)
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def ntk_theta(theta: float, stretch: float, head_dim: int) -> float:
    """NTK-aware base: theta·s^(K/(K-2)), with which the slowest pair turns s times more slowly, the fastest as before.

    `stretch` s is the new context over the trained one. Raises UsageError for heads of width 2, which have one pair.
    """
    if head_dim <= 2:
        raise UsageError("heads this narrow have no slowest pair", value=head_dim, allowed="a head_dim above 2")
    return float(theta * stretch ** (head_dim / (head_dim - 2)))


def law_theta(theta: float, trained: int, context: int) -> float:
    """The base for `context` positions of a model trained on `trained` of them with base `theta`:

    theta^(ln(context/2π) / ln(trained/2π)): the pair that just finished a turn within the trained context finishes one
    within the new context too (scaling laws of RoPE-based extrapolation, arXiv 2310.05209).
    Raises UsageError for a context of fewer positions than one turn of the fastest pair, 2π.
    """
    if min(trained, context) < 7:
        raise UsageError(
            "the theta law needs contexts longer than 2π", value=min(trained, context), allowed="7 or more"
        )
    return float(theta ** (math.log(context / (2 * math.pi)) / math.log(trained / (2 * math.pi))))


def _dynamic_theta(scaling: RopeScaling, head_dim: int, theta: float, length: int) -> float:
    length = max(length, scaling.original_context)
    stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    return ntk_theta(theta, stretch, head_dim)


def _yarn(j: int, frequency: float, scaling: RopeScaling, head_dim: int, theta: float) -> float:
    def dimension_of(turns: float) -> float:
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension_of(_YARN_FAST_TURNS)), 0)
    last = min(math.ceil(dimension_of(_YARN_SLOW_TURNS)), head_dim - 1)
    ramp = min(max((j - first) / max(last - first, 1e-3), 0.0), 1.0)
    return (1 - ramp) * frequency + ramp * frequency / scaling.factor
