"""Which format each tensor of a quantised GGUF file gets: the usual mixes, by the names that llama.cpp gave them.

A mix has one base format and spends more bits where errors cost most: the value projections and the feed-forward's way
back, in the layers that matter most, and the output matrix. Vectors and routers stay in float32. Rows that do not fill
a format's blocks take the nearest format that they fill, and float16 where there is none.

Two more are the schemes in which Llamas were released with integer weights: "int4_g32" is that of Llama 3.2 for phones
(embedding and head in 8 bits with a scale a row, activations in 8 bits with a scale a token), "int4_g128" that of
Llama 4 (experts only, so that Scout fits one accelerator; the rest stays in bfloat16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from herd.architecture import LlamaConfig
from herd.checkpoint.blocks import Rounding
from herd.checkpoint.numbers import BLOCKS

Layers = Literal["all", "key", "first"]
"""Layers that get a better format: all · the key ones, first and last eighth and every third between · first eighth."""


Activations = Literal["block", "token"]
"""What shares a scale where inputs of products are rounded to 8 bits: 32 neighbours, or a token's whole row."""


@dataclass(frozen=True)
class Mix:
    """`better` has endings of tensors' names with the format and the layers it is for; `file_type` is the number in the
    file's head. `rounding`: formats that are rounded by a plain rule. `experts_only`: of a mixture of experts, the
    other matrices stay in bfloat16. `activations`: what shares a scale where they are rounded to 8 bits."""

    base: str
    file_type: int
    output: str = "q6_k"
    embedding: str | None = None
    better: tuple[tuple[str, str, Layers], ...] = ()
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    experts_only: bool = False
    activations: Activations = "block"


_EXPERTS = ("exps.weight", "shexp.weight")  # routed ones, the shared one
_VALUES, _DOWN, _BACK = "attn_v.weight", "ffn_down.weight", "attn_output.weight"

MIXES = {
    "q8_0": Mix("q8_0", 7, output="q8_0"),
    "q4_0": Mix("q4_0", 2, output="q8_0", embedding="q8_0"),
    "q4_1": Mix("q4_1", 3),
    "q5_0": Mix("q5_0", 8),
    "q5_1": Mix("q5_1", 9),
    "iq4_nl": Mix("iq4_nl", 25),
    "iq4_xs": Mix("iq4_xs", 30, better=((_VALUES, "q5_k", "all"), (_DOWN, "q5_k", "first"))),
    "q2_k": Mix("q2_k", 10, better=((_VALUES, "q4_k", "all"), (_DOWN, "q3_k", "all"), (_BACK, "q3_k", "all"))),
    "q3_k": Mix("q3_k", 11),
    "q3_k_m": Mix(
        "q3_k",
        12,
        better=(
            (_VALUES, "q5_k", "first"),
            (_VALUES, "q4_k", "all"),
            (_DOWN, "q5_k", "first"),
            (_DOWN, "q4_k", "all"),
            (_BACK, "q4_k", "all"),
        ),
    ),
    "q4_k": Mix("q4_k", 14),
    "q4_k_s": Mix("q4_k", 14, better=((_VALUES, "q5_k", "first"), (_DOWN, "q5_k", "first"))),
    "q4_k_m": Mix("q4_k", 15, better=((_VALUES, "q6_k", "key"), (_DOWN, "q6_k", "key"))),
    "q5_k": Mix("q5_k", 16),
    "q5_k_m": Mix("q5_k", 17, better=((_VALUES, "q6_k", "key"), (_DOWN, "q6_k", "key"))),
    "q6_k": Mix("q6_k", 18),
    # Symmetric scales: (2^bits - 1) / 2 levels to a side in Llama 3.2's tools, 2^(bits - 1) in Llama 4's.
    "int4_g32": Mix(
        "q4_0",
        2,
        output="q8_0",
        embedding="q8_0",
        rounding={"q4_0": Rounding(32, 7.5), "q8_0": Rounding(0, 127.5)},
        activations="token",
    ),
    "int4_g128": Mix(
        "q4_0", 2, output="bf16", embedding="bf16", rounding={"q4_0": Rounding(128, 8.0)}, experts_only=True
    ),
}
"""Mixes by name. The first match in `better` counts."""

_FALLBACK = {
    "q2_k": "iq4_nl",
    "q3_k": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""For rows of 32·n that are not 256·n."""


def gguf_type(name: str, shape: tuple[int, ...], dtype: str, config: LlamaConfig) -> str:
    """Format of the GGUF tensor `name` in a file of number format or mix `dtype`."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "f32"
    if dtype not in MIXES:
        return dtype
    wanted = _wanted(name, MIXES[dtype], config)
    while wanted in BLOCKS and shape[-1] % BLOCKS[wanted].weights:
        if wanted not in _FALLBACK:
            return "f16"
        wanted = _FALLBACK[wanted]
    return wanted


def rounding_of(type_name: str, dtype: str | None) -> Rounding | None:
    """The plain rule by which number format or mix `dtype` rounds weights to `type_name`; None: a search."""
    return MIXES[dtype].rounding.get(type_name) if dtype in MIXES else None


def weighs_errors(dtype: str) -> bool:
    """Whether importance has a say in number format or mix `dtype`: not in plain rules, of which q8_0 is one."""
    return dtype in MIXES and MIXES[dtype].base not in ("q8_0", *MIXES[dtype].rounding)


def activations_of(dtype: str | None) -> Activations:
    """How activations are rounded before they are multiplied with weights of number format or mix `dtype`."""
    return MIXES[dtype].activations if dtype in MIXES else "block"


def _wanted(name: str, mix: Mix, config: LlamaConfig) -> str:
    if name == "output.weight" or (name == "token_embd.weight" and config.tied_embeddings):
        return mix.output
    if name == "token_embd.weight":
        return mix.embedding or mix.base
    if mix.experts_only and config.moe is not None and not name.endswith(_EXPERTS):
        return "bf16"
    layer = int(name.split(".")[1])
    for ending, better, layers in mix.better:
        if name.endswith(ending) and _is_among(layer, layers, config.n_layers):
            return better
    return mix.base


def _is_among(layer: int, layers: Layers, n_layers: int) -> bool:
    eighth = n_layers // 8
    if layers == "all" or layer < eighth:
        return True
    return layers == "key" and (layer >= n_layers - eighth or (layer - eighth) % 3 == 2)
