"""Herd's torch model against transformers, one row per architecture, on small random models.

    python benchmarks/parity_table.py

max |Δlogit|: largest difference of any logit over two rows of tokens, float32. greedy: how many of 64 greedy tokens are
the same in transformers (cached), Herd with its cache, and Herd recomputing everything at every step.
Weights are drawn so that logits are of order 1, or small differences would prove nothing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import transformers

from herd.architecture import (
    AttentionTemperature,
    LlamaConfig,
    MoeConfig,
    RopeScaling,
    stored_tensors,
    tensor_shapes,
)
from herd.checkpoint.layout import stored_blocks
from herd.model import KVCache, Llama, from_arrays

STEPS = 64
DENSE = LlamaConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=160, context_length=512
)
LLAMA4 = dataclasses.replace(
    DENSE, n_layers=4, ffn_dim=128, moe=MoeConfig(n_experts=4, ffn_dim=48), nope_interval=4, generation="llama4"
)


def _dense(**changes: Any) -> LlamaConfig:
    return dataclasses.replace(DENSE, **changes)


def _llama4(**changes: Any) -> LlamaConfig:
    return dataclasses.replace(LLAMA4, **changes)


_LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
_LLAMA4_SCALING = RopeScaling("llama3", 16.0, 1.0, 1.0, 64)
_TEMPERATURE = AttentionTemperature(floor_scale=16, attn_scale=0.1)
CASES: dict[str, LlamaConfig] = {
    "Llama 1/2, MHA, theta 1e4": _dense(n_kv_heads=4, rope_theta=1e4, generation="llama2"),
    "Llama 2 70B, GQA, theta 1e4": _dense(rope_theta=1e4, generation="llama2"),
    "Code Llama, MHA, theta 1e6": _dense(n_kv_heads=4, rope_theta=1e6, generation="codellama"),
    "Llama 3, GQA, theta 5e5": _dense(),
    "Llama 3, one key head": _dense(n_kv_heads=1),
    "Llama 3.1, llama3 scaling": _dense(rope_scaling=_LLAMA3_SCALING, generation="llama3.1"),
    "Llama 3.2, tied, llama3 scaling": _dense(
        rope_scaling=dataclasses.replace(_LLAMA3_SCALING, factor=32.0), tied_embeddings=True, generation="llama3.2"
    ),
    "linear scaling": _dense(rope_scaling=RopeScaling("linear", 4.0, original_context=128)),
    "dynamic NTK scaling": _dense(rope_scaling=RopeScaling("dynamic", 4.0, original_context=64)),
    "YaRN scaling": _dense(rope_scaling=RopeScaling("yarn", 8.0, original_context=64)),
    "Llama 4, every layer MoE": _llama4(),
    "Llama 4, every second layer MoE": _llama4(moe=MoeConfig(n_experts=4, ffn_dim=48, interleave=2)),
    "Llama 4, top-2 routing": _llama4(moe=MoeConfig(n_experts=4, ffn_dim=48, top_k=2)),
    "Llama 4, no NoPE layers": _llama4(nope_interval=0),
    "Llama 4, chunk 24, beyond it": _llama4(attention_chunk=24),
    "Llama 4, QK norm": _llama4(qk_norm=True),
    "Llama 4, attention temperature": _llama4(attention_temperature=_TEMPERATURE),
    "Llama 4 Scout, all of it": _llama4(
        attention_chunk=24, qk_norm=True, attention_temperature=_TEMPERATURE, rope_scaling=_LLAMA4_SCALING
    ),
    "Llama 4 Maverick, all of it": _llama4(
        moe=MoeConfig(n_experts=8, ffn_dim=48, interleave=2), attention_chunk=24, attention_temperature=_TEMPERATURE
    ),
}


def random_arrays(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep activations of order 1: normal / sqrt(inputs), norms around 1, a spread-out output."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("norm.weight"):
            array = 1 + 0.2 * rng.standard_normal(shape)
        elif name in ("embed.weight", "output.weight"):
            array = rng.standard_normal(shape) * (1 if name == "embed.weight" else 2) / math.sqrt(shape[1]) * 2
        else:
            array = rng.standard_normal(shape) / math.sqrt(shape[-1])
        arrays[name] = array.astype(np.float32)
    return arrays


def peer(config: LlamaConfig, arrays: dict[str, np.ndarray]) -> transformers.PreTrainedModel:
    """transformers' model with the same weights, named and laid out by the tables of `herd.architecture`."""
    common = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=_positions(config),
        tie_word_embeddings=config.tied_embeddings,
        rope_parameters=_rope_parameters(config),
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    if config.generation == "llama4":
        assert config.moe is not None
        temperature = config.attention_temperature
        model: transformers.PreTrainedModel = transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                **common,
                intermediate_size=config.moe.ffn_dim,
                intermediate_size_mlp=config.ffn_dim,
                num_local_experts=config.moe.n_experts,
                num_experts_per_tok=config.moe.top_k,
                interleave_moe_layer_step=config.moe.interleave,
                no_rope_layers=[int(config.uses_rope(i)) for i in range(config.n_layers)],
                attention_chunk_size=config.attention_chunk or 4096,
                use_qk_norm=config.qk_norm,
                attn_temperature_tuning=temperature is not None,
                floor_scale=temperature.floor_scale if temperature else 8192,
                attn_scale=temperature.attn_scale if temperature else 0.1,
            )
        )
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, intermediate_size=config.ffn_dim))
    state = {}
    for rule in stored_tensors("hf", config):
        blocks = list(stored_blocks(rule, [arrays[part] for part in rule.parts], config.head_dim))
        state[rule.stored] = torch.from_numpy(np.concatenate(blocks))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _positions(config: LlamaConfig) -> int:
    # transformers takes the original context of "dynamic" from here.
    scaling = config.rope_scaling
    return scaling.original_context if scaling is not None and scaling.kind == "dynamic" else config.context_length


def _rope_parameters(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    parameters = {"rope_type": scaling.kind, "rope_theta": config.rope_theta, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
    return parameters


def greedy(model: Llama, prompt_S: torch.Tensor, *, cached: bool) -> list[int]:
    """64 greedy tokens after a prompt, with the cache or without."""
    ids: list[int] = prompt_S.tolist()
    cache = KVCache(model.config, 1, len(ids) + STEPS) if cached else None
    new = ids
    for _ in range(STEPS):
        tokens = torch.tensor([new if cached else ids])
        token = int(model(tokens, cache=cache)[0, -1].argmax())
        ids, new = [*ids, token], [token]
    return ids[len(prompt_S) :]


@torch.no_grad()
def compare(config: LlamaConfig, length: int = 100) -> dict[str, float]:
    """Largest logit difference, the logits' spread, and equal greedy tokens with and without Herd's cache."""
    arrays = random_arrays(config)
    ours, theirs = from_arrays(config, arrays), peer(config, arrays)
    tokens_BS = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    ours_BSV, theirs_BSV = ours(tokens_BS), theirs(tokens_BS, use_cache=False).logits
    prompt_S = tokens_BS[0, :20]
    expected = theirs.generate(
        prompt_S[None],
        attention_mask=torch.ones(1, 20),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
    )
    tail = expected[0, 20:].tolist()
    return {
        "difference": float((ours_BSV - theirs_BSV).abs().max()),
        "spread": float(theirs_BSV.std()),
        "greedy_cached": sum(a == b for a, b in zip(greedy(ours, prompt_S, cached=True), tail, strict=True)),
        "greedy_full": sum(a == b for a, b in zip(greedy(ours, prompt_S, cached=False), tail, strict=True)),
    }


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32\n")
    print("| architecture | max \\|Δlogit\\| | std of logits | greedy, cached | greedy, recomputed |")
    print("|---|---|---|---|---|")
    for name, config in CASES.items():
        row = compare(config)
        print(
            f"| {name} | {row['difference']:.1e} | {row['spread']:.2f} | {row['greedy_cached']:.0f}/{STEPS} "
            f"| {row['greedy_full']:.0f}/{STEPS} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
