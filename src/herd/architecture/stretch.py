"""A Llama for a longer context than it was trained on: which base or which scaling of the rotary frequencies to take.

- law: a larger base by the theta law, and training at the new length; what Gradient's Llama 3 with 4M tokens did.
- ntk: a larger base by the NTK-aware rule, which changes less.
- linear: position interpolation (arXiv 2306.15595).   - yarn: interpolation by parts (arXiv 2309.00071).
- llama3: Llama 3.1's by-parts rule with its published ramp, 1 to 4 turns in the trained context.

A model whose RoPE is scaled already, as Llama 3.1's, is stretched by its own kind of scaling only: the factor grows
with the context and all else stays, so that the pairs that are scaled turn as often in the new context as in the old
one. YaRN was trained so, from a factor of 16 to 32 (arXiv 2309.00071, section 4.1); Llama 3.2 has 3.1's rule with 32
for 8. A larger base would turn pairs into the ramp between kept and scaled frequencies, and slow them far more than
the context grows.
Only numbers change here, no weights; all but yarn need training at the new length to work well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from herd.architecture.config import LlamaConfig, RopeScaling
from herd.architecture.frequencies import law_theta, ntk_theta
from herd.errors import UsageError

StretchMethod = Literal["law", "ntk", "linear", "yarn", "llama3"]


def stretched(config: LlamaConfig, context: int, method: StretchMethod = "law") -> LlamaConfig:
    """The same model with `context` positions.

    Its own context and theta are taken for those it was trained with. A new theta is rounded to four digits, like the
    published ones, so that the 32-bit number in a GGUF file stands for the same.
    Raises UsageError for a context that is not longer, an unknown method, RoPE that is scaled already by another
    method, and Llama 4, whose rotary layers never look further back than a chunk.
    """
    if method not in get_args(StretchMethod):
        raise UsageError("unknown way to stretch RoPE", value=method, allowed=", ".join(get_args(StretchMethod)))
    trained = config.context_length
    if context <= trained:
        raise UsageError("the model has this context already", value=context, allowed=f"more than {trained} tokens")
    if config.generation == "llama4":
        raise UsageError(
            "Llama 4's layers with RoPE look back one chunk only, so there is nothing to stretch",
            value=config.attention_chunk,
            allowed="every earlier Llama",
        )
    factor = context / trained
    if config.rope_scaling is not None:
        return replace(config, context_length=context, rope_scaling=_further(config.rope_scaling, factor, method))
    if method == "law":
        theta = _few_digits(law_theta(config.rope_theta, trained, context))
        return replace(config, context_length=context, rope_theta=theta)
    if method == "ntk":
        theta = _few_digits(ntk_theta(config.rope_theta, factor, config.head_dim))
        return replace(config, context_length=context, rope_theta=theta)
    if method == "linear":  # the trained context plays no part in it, and no file says it
        return replace(config, context_length=context, rope_scaling=RopeScaling("linear", factor))
    return replace(config, context_length=context, rope_scaling=RopeScaling(method, factor, original_context=trained))


def _further(scaling: RopeScaling, factor: float, method: StretchMethod) -> RopeScaling:
    """The scaling of a context `factor` times as long."""
    if scaling.kind == "dynamic":
        raise UsageError(
            "the model's RoPE follows the length of the text by itself, so there is nothing to stretch",
            value=scaling.kind,
            allowed="a model with plain RoPE, or with linear, yarn or llama3 scaling",
        )
    if method != scaling.kind:
        raise UsageError(
            "the model's RoPE is scaled already, and only its own kind of scaling can go on from there",
            value=f"{method} on {scaling.kind}",
            allowed=scaling.kind,
            fix=f"--method {scaling.kind}",
        )
    return replace(scaling, factor=scaling.factor * factor)


def _few_digits(theta: float) -> float:
    return float(f"{theta:.4g}")
