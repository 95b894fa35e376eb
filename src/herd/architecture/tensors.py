"""The one naming of Llama's tensors, and how the three file formats name and lay out the same numbers.

Canonical names are those of the torch module; `tensor_shapes` gives them all with their shapes. Linear weights are
[out, in]. Rows of wq and wk are in the reference's order, where RoPE turns neighbouring pairs (x0, x1), (x2, x3), ….

A format is a table of `Rule`s: a stored tensor holds one canonical tensor, or several one after the other along an
axis, each in some `Layout`. Sources: Meta's reference code and its load hooks, the Hugging Face converters, and the
tensor-name lists of GGUF.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from herd.architecture.config import LlamaConfig
from herd.errors import UsageError

Format = Literal["hf", "meta", "gguf"]
Shape = tuple[int, ...]

Layout = Literal["same", "half_split", "transposed", "transposed_merged"]
"""How a canonical tensor lies in a file.

same · half_split: the K rows of every head reordered so that RoPE turns (x_j, x_{j+K/2}) instead of neighbours ·
transposed: last two axes swapped · transposed_merged: last two axes swapped, then the first two merged into one.
"""


def tensor_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Canonical name → shape of every tensor of the model, in the order of the forward pass."""
    dim, head_dim, ffn = config.dim, config.head_dim, config.ffn_dim
    shapes: dict[str, Shape] = {"embed.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        layer = f"layers.{i}."
        shapes[layer + "attention_norm.weight"] = (dim,)
        shapes[layer + "attention.wq.weight"] = (config.n_heads * head_dim, dim)
        shapes[layer + "attention.wk.weight"] = (config.n_kv_heads * head_dim, dim)
        shapes[layer + "attention.wv.weight"] = (config.n_kv_heads * head_dim, dim)
        shapes[layer + "attention.wo.weight"] = (dim, config.n_heads * head_dim)
        shapes[layer + "ffn_norm.weight"] = (dim,)
        if config.moe is not None and config.is_moe_layer(i):
            experts, width = config.moe.n_experts, config.moe.ffn_dim
            shapes[layer + "moe.router.weight"] = (experts, dim)
            shapes[layer + "moe.experts.w1"] = (experts, width, dim)
            shapes[layer + "moe.experts.w3"] = (experts, width, dim)
            shapes[layer + "moe.experts.w2"] = (experts, dim, width)
            shapes[layer + "moe.shared.w1.weight"] = (width, dim)
            shapes[layer + "moe.shared.w3.weight"] = (width, dim)
            shapes[layer + "moe.shared.w2.weight"] = (dim, width)
        else:
            shapes[layer + "ffn.w1.weight"] = (ffn, dim)
            shapes[layer + "ffn.w3.weight"] = (ffn, dim)
            shapes[layer + "ffn.w2.weight"] = (dim, ffn)
    shapes["norm.weight"] = (dim,)
    if not config.tied_embeddings:
        shapes["output.weight"] = (config.vocab_size, dim)
    return shapes


@dataclass(frozen=True)
class Rule:
    """One tensor of a file: its name there, the canonical tensors it holds, their layout, the axis that joins them.

    `axis` counts in the stored layout and matters only when there are several parts.
    """

    stored: str
    parts: tuple[str, ...]
    layout: Layout = "same"
    axis: int = 0

    def of_layer(self, layer: int) -> Rule:
        """The rule with `{i}` filled in."""
        return Rule(
            self.stored.replace("{i}", str(layer)),
            tuple(part.replace("{i}", str(layer)) for part in self.parts),
            self.layout,
            self.axis,
        )


def _rule(stored: str, *parts: str, layout: Layout = "same", axis: int = 0) -> Rule:
    return Rule(stored, parts, layout, axis)


_L = "layers.{i}."
_HF_COMMON = (
    _rule("model.embed_tokens.weight", "embed.weight"),
    _rule("model.layers.{i}.input_layernorm.weight", _L + "attention_norm.weight"),
    _rule("model.layers.{i}.self_attn.v_proj.weight", _L + "attention.wv.weight"),
    _rule("model.layers.{i}.self_attn.o_proj.weight", _L + "attention.wo.weight"),
    _rule("model.layers.{i}.post_attention_layernorm.weight", _L + "ffn_norm.weight"),
    _rule("model.norm.weight", "norm.weight"),
    _rule("lm_head.weight", "output.weight"),
)
_HF_LLAMA = (
    *_HF_COMMON,
    _rule("model.layers.{i}.self_attn.q_proj.weight", _L + "attention.wq.weight", layout="half_split"),
    _rule("model.layers.{i}.self_attn.k_proj.weight", _L + "attention.wk.weight", layout="half_split"),
    _rule("model.layers.{i}.mlp.gate_proj.weight", _L + "ffn.w1.weight"),
    _rule("model.layers.{i}.mlp.up_proj.weight", _L + "ffn.w3.weight"),
    _rule("model.layers.{i}.mlp.down_proj.weight", _L + "ffn.w2.weight"),
)
_HF_LLAMA4 = (
    *_HF_COMMON,
    _rule("model.layers.{i}.self_attn.q_proj.weight", _L + "attention.wq.weight"),
    _rule("model.layers.{i}.self_attn.k_proj.weight", _L + "attention.wk.weight"),
    _rule("model.layers.{i}.feed_forward.gate_proj.weight", _L + "ffn.w1.weight"),
    _rule("model.layers.{i}.feed_forward.up_proj.weight", _L + "ffn.w3.weight"),
    _rule("model.layers.{i}.feed_forward.down_proj.weight", _L + "ffn.w2.weight"),
    _rule("model.layers.{i}.feed_forward.router.weight", _L + "moe.router.weight"),
    _rule(
        "model.layers.{i}.feed_forward.experts.gate_up_proj",
        _L + "moe.experts.w1",
        _L + "moe.experts.w3",
        layout="transposed",
        axis=2,
    ),
    _rule("model.layers.{i}.feed_forward.experts.down_proj", _L + "moe.experts.w2", layout="transposed"),
    _rule("model.layers.{i}.feed_forward.shared_expert.gate_proj.weight", _L + "moe.shared.w1.weight"),
    _rule("model.layers.{i}.feed_forward.shared_expert.up_proj.weight", _L + "moe.shared.w3.weight"),
    _rule("model.layers.{i}.feed_forward.shared_expert.down_proj.weight", _L + "moe.shared.w2.weight"),
)
_META_COMMON = (
    _rule("tok_embeddings.weight", "embed.weight"),
    _rule("layers.{i}.attention.wo.weight", _L + "attention.wo.weight"),
    _rule("norm.weight", "norm.weight"),
    _rule("output.weight", "output.weight"),
)
_META_LLAMA = (
    *_META_COMMON,
    _rule("layers.{i}.attention_norm.weight", _L + "attention_norm.weight"),
    _rule("layers.{i}.attention.wq.weight", _L + "attention.wq.weight"),
    _rule("layers.{i}.attention.wk.weight", _L + "attention.wk.weight"),
    _rule("layers.{i}.attention.wv.weight", _L + "attention.wv.weight"),
    _rule("layers.{i}.ffn_norm.weight", _L + "ffn_norm.weight"),
    _rule("layers.{i}.feed_forward.w1.weight", _L + "ffn.w1.weight"),
    _rule("layers.{i}.feed_forward.w3.weight", _L + "ffn.w3.weight"),
    _rule("layers.{i}.feed_forward.w2.weight", _L + "ffn.w2.weight"),
)
_META_LLAMA4 = (
    *_META_COMMON,
    _rule("layers.{i}.attention.wqkv.layer_norm_weight", _L + "attention_norm.weight"),
    _rule(
        "layers.{i}.attention.wqkv.weight",
        _L + "attention.wq.weight",
        _L + "attention.wk.weight",
        _L + "attention.wv.weight",
    ),
)
_META_LLAMA4_DENSE = (
    _rule("layers.{i}.feed_forward.mlp.layer_norm_weight", _L + "ffn_norm.weight"),
    _rule("layers.{i}.feed_forward.mlp.fc1_weight", _L + "ffn.w1.weight", _L + "ffn.w3.weight"),
    _rule("layers.{i}.feed_forward.mlp.fc2_weight", _L + "ffn.w2.weight"),
)
_META_LLAMA4_MOE = (
    _rule("layers.{i}.feed_forward.norm.weight", _L + "ffn_norm.weight"),
    _rule("layers.{i}.feed_forward.router_DE", _L + "moe.router.weight", layout="transposed"),
    _rule("layers.{i}.feed_forward.experts.moe_w_in_eD_F", _L + "moe.experts.w1", layout="transposed_merged"),
    _rule("layers.{i}.feed_forward.experts.moe_w_swiglu_eD_F", _L + "moe.experts.w3", layout="transposed_merged"),
    _rule("layers.{i}.feed_forward.experts.moe_w_out_eF_D", _L + "moe.experts.w2", layout="transposed_merged"),
    _rule("layers.{i}.feed_forward.w_in_shared_FD.weight", _L + "moe.shared.w1.weight"),
    _rule("layers.{i}.feed_forward.w_swiglu_FD.weight", _L + "moe.shared.w3.weight"),
    _rule("layers.{i}.feed_forward.w_out_shared_DF.weight", _L + "moe.shared.w2.weight"),
)
_GGUF = (
    _rule("token_embd.weight", "embed.weight"),
    _rule("blk.{i}.attn_norm.weight", _L + "attention_norm.weight"),
    _rule("blk.{i}.attn_q.weight", _L + "attention.wq.weight"),
    _rule("blk.{i}.attn_k.weight", _L + "attention.wk.weight"),
    _rule("blk.{i}.attn_v.weight", _L + "attention.wv.weight"),
    _rule("blk.{i}.attn_output.weight", _L + "attention.wo.weight"),
    _rule("blk.{i}.ffn_norm.weight", _L + "ffn_norm.weight"),
    _rule("blk.{i}.ffn_gate.weight", _L + "ffn.w1.weight"),
    _rule("blk.{i}.ffn_up.weight", _L + "ffn.w3.weight"),
    _rule("blk.{i}.ffn_down.weight", _L + "ffn.w2.weight"),
    _rule("blk.{i}.ffn_gate_inp.weight", _L + "moe.router.weight"),
    _rule("blk.{i}.ffn_gate_exps.weight", _L + "moe.experts.w1"),
    _rule("blk.{i}.ffn_up_exps.weight", _L + "moe.experts.w3"),
    _rule("blk.{i}.ffn_down_exps.weight", _L + "moe.experts.w2"),
    _rule("blk.{i}.ffn_gate_shexp.weight", _L + "moe.shared.w1.weight"),
    _rule("blk.{i}.ffn_up_shexp.weight", _L + "moe.shared.w3.weight"),
    _rule("blk.{i}.ffn_down_shexp.weight", _L + "moe.shared.w2.weight"),
    _rule("output_norm.weight", "norm.weight"),
    _rule("output.weight", "output.weight"),
)


def _hf(config: LlamaConfig, layer: int) -> tuple[Rule, ...]:
    return _HF_LLAMA4 if config.generation == "llama4" else _HF_LLAMA


def _meta(config: LlamaConfig, layer: int) -> tuple[Rule, ...]:
    if config.generation != "llama4":
        return _META_LLAMA
    return _META_LLAMA4 + (_META_LLAMA4_MOE if config.is_moe_layer(layer) else _META_LLAMA4_DENSE)


def _gguf(config: LlamaConfig, layer: int) -> tuple[Rule, ...]:
    return _GGUF


_TABLES: dict[str, Callable[[LlamaConfig, int], tuple[Rule, ...]]] = {"hf": _hf, "meta": _meta, "gguf": _gguf}

IGNORED: dict[str, tuple[str, ...]] = {
    "hf": ("rotary_emb.inv_freq",),
    "meta": (
        "rope.freqs",
        "freqs_cis",
        "freq_cis",
        "_extra_state",
        "global_gate_stats_3E",
        "running_gate_stats_3E",
        "expert_activation_DE",
    ),
    "gguf": ("rope_freqs.weight",),
}
"""Endings of stored tensors that carry no weights of their own: tables that the config determines."""


def stored_tensors(fmt: Format, config: LlamaConfig) -> list[Rule]:
    """Every tensor a file of format `fmt` holds for this model, in the order of the forward pass.

    The parts of all rules together are exactly the names of `tensor_shapes(config)`.
    """
    if fmt not in _TABLES:
        raise UsageError("unknown checkpoint format", value=fmt, allowed=", ".join(_TABLES))
    shapes = tensor_shapes(config)
    table = _TABLES[fmt]
    rules: dict[str, Rule] = {}
    for name in shapes:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        rule = _find(table(config, layer), name, layer)
        rules.setdefault(rule.stored, rule)
    return list(rules.values())


def shard_axis(name: str, config: LlamaConfig) -> int | None:
    """Canonical axis along which Meta's model-parallel shards split tensor `name`; None when every shard has it whole.

    Column-parallel layers split their outputs, row-parallel layers their inputs. The embedding is split by width in
    LLaMA 1, 2 and Code Llama, and by vocabulary from Llama 3 on.
    """
    if name == "embed.weight":
        return 1 if config.generation in ("llama1", "llama2", "codellama") else 0
    if name.endswith("norm.weight") or ".router." in name:
        return None
    if ".experts." in name:
        return 2 if name.endswith("w2") else 1
    return 1 if ".wo." in name or ".w2." in name else 0


def _find(rules: tuple[Rule, ...], name: str, layer: int) -> Rule:
    for rule in rules:
        filled = rule.of_layer(layer)
        if name in filled.parts:
            return filled
    raise KeyError(name)
