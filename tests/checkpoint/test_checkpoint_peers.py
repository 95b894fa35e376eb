"""Files written here, read by other tools, and theirs read here: transformers, torch, the gguf package, Meta's code.

The forward pass below follows Meta's reference (interleaved rotary pairs, its fused Llama 4 names and load hooks). It
takes Meta's files through torch alone, so it is independent of Herd's tables, layouts and configurations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from herd.architecture import LlamaConfig, rope_frequencies
from herd.checkpoint import convert, open_checkpoint, save

transformers = pytest.importorskip("transformers")

ROWS = [
    "llama1",
    "llama2",
    "codellama",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama4-scout",
    "llama4-maverick",
    "llama4-odd",
]
TOKENS = torch.arange(24)[None] * 7 % 96
Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]


def _transformers_logits(directory: Path) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def _rotate(x_SHK: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """Meta's rotary embedding: neighbouring pairs as complex numbers."""
    size = x_SHK.shape[-1]
    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    if params.get("use_scaled_rope"):
        low, high, factor = 8192 / 1.0, 8192 / params["rope_high_freq_factor"], params["rope_scaling_factor"]
        scaled = []
        for frequency in frequencies:
            wavelength = 2 * math.pi / frequency
            if wavelength < high:
                scaled.append(frequency)
            elif wavelength > low:
                scaled.append(frequency / factor)
            else:
                smooth = (8192 / wavelength - 1) / (params["rope_high_freq_factor"] - 1)
                scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
        frequencies = torch.stack(scaled)
    angles = torch.outer(torch.arange(len(x_SHK)).float(), frequencies)
    turned = (
        torch.view_as_complex(x_SHK.reshape(*x_SHK.shape[:-1], -1, 2))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(2)


def _meta_logits(directory: Path) -> torch.Tensor:
    """Meta's reference forward pass over a single-shard directory, in float32."""
    params = json.loads((directory / "params.json").read_text())
    raw = torch.load(directory / "consolidated.00.pth", weights_only=True)
    w = {name: tensor.float() for name, tensor in raw.items()}
    heads, kv, dim, eps = params["n_heads"], params["n_kv_heads"], params["dim"], params["norm_eps"]
    size, h = dim // heads, w["tok_embeddings.weight"][TOKENS[0]]
    steps = torch.arange(len(h))
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        fused = "attention.wqkv.weight" in layer
        norm = layer["attention.wqkv.layer_norm_weight" if fused else "attention_norm.weight"]
        if fused:
            wq, wk, wv = layer["attention.wqkv.weight"].split([heads * size, kv * size, kv * size])
        else:
            wq, wk, wv = (layer[f"attention.{name}.weight"] for name in ("wq", "wk", "wv"))
        x = rms_norm(h, (dim,), norm, eps)
        q, k, v = (linear(x, m).view(len(h), -1, size) for m in (wq, wk, wv))
        rotary = not params.get("nope_layer_interval") or (i + 1) % params["nope_layer_interval"] != 0
        if rotary:
            q, k = _rotate(q, params), _rotate(k, params)
            if params.get("use_qk_norm"):
                q, k = rms_norm(q, (size,), eps=eps), rms_norm(k, (size,), eps=eps)
        elif params.get("attn_temperature_tuning"):
            q = (
                q
                * (torch.log(torch.floor((steps + 1) / params["floor_scale"]) + 1) * params["attn_scale"] + 1)[
                    :, None, None
                ]
            )
        mask = steps[:, None] >= steps[None]
        if rotary and params.get("attention_chunk_size"):
            mask = mask & (
                steps[:, None] // params["attention_chunk_size"] == steps[None] // params["attention_chunk_size"]
            )
        k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        o = scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=mask)
        h = h + linear(o[0].transpose(0, 1).reshape(len(h), -1), layer["attention.wo.weight"])
        h = h + _meta_ffn(layer, h, params)
    return linear(rms_norm(h, (dim,), w["norm.weight"], eps), w["output.weight"])[None]


def _meta_ffn(layer: dict[str, torch.Tensor], h: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    ffn = {name.removeprefix("feed_forward."): t for name, t in layer.items() if name.startswith("feed_forward.")}
    dim, eps = params["dim"], params["norm_eps"]
    if "w1.weight" in ffn:
        x = rms_norm(h, (dim,), layer["ffn_norm.weight"], eps)
        return linear(silu(linear(x, ffn["w1.weight"])) * linear(x, ffn["w3.weight"]), ffn["w2.weight"])
    if "mlp.fc1_weight" in ffn:
        x = rms_norm(h, (dim,), ffn["mlp.layer_norm_weight"], eps)
        w1, w3 = ffn["mlp.fc1_weight"].chunk(2)
        return linear(silu(linear(x, w1)) * linear(x, w3), ffn["mlp.fc2_weight"])
    x = rms_norm(h, (dim,), ffn["norm.weight"], eps)
    experts = params["moe_args"]["num_experts"]
    scores = x @ ffn["router_DE"]
    best = torch.topk(scores, params["moe_args"]["top_k"], dim=1)
    scores = torch.sigmoid(torch.full_like(scores, float("-inf")).scatter_(1, best.indices, best.values))
    w1 = ffn["experts.moe_w_in_eD_F"].view(experts, dim, -1)
    w3 = ffn["experts.moe_w_swiglu_eD_F"].view(experts, dim, -1)
    w2 = ffn["experts.moe_w_out_eF_D"].view(experts, -1, dim)
    out = linear(
        silu(linear(x, ffn["w_in_shared_FD.weight"])) * linear(x, ffn["w_swiglu_FD.weight"]),
        ffn["w_out_shared_DF.weight"],
    )
    for e in range(experts):
        routed = x * scores[:, e : e + 1]
        out = out + (silu(routed @ w1[e]) * (routed @ w3[e])) @ w2[e]
    return out


@pytest.mark.parametrize("row", ROWS)
def test_transformers_and_meta_code_compute_the_same_from_our_files(row: str, tmp_path: Path, small: Small) -> None:
    """One model saved in both layouts: names, permutation, fused tensors, transposes and both configs agree."""
    config, weights = small(row, "f32")
    save(tmp_path / "hf", config, weights)
    convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    theirs, reference = _transformers_logits(tmp_path / "hf"), _meta_logits(tmp_path / "meta")
    assert theirs.abs().max() > 0.1
    assert (theirs - reference).abs().max() < 2e-5


@pytest.mark.parametrize("row", ["llama2", "llama3.1", "llama3.2", "llama4-scout", "llama4-maverick"])
def test_a_model_saved_by_transformers_comes_back_bit_for_bit(row: str, tmp_path: Path, small: Small) -> None:
    """Their save → our open → our save → their load: same state dictionary, same configuration class."""
    config, weights = small(row)
    save(tmp_path / "ours", config, weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "theirs")
    with open_checkpoint(tmp_path / "theirs") as checkpoint:
        assert checkpoint.config.to_dict() | {"generation": ""} == config.to_dict() | {"generation": ""}
        save(tmp_path / "again", checkpoint.config, checkpoint, max_shard_bytes=40_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    expected = model.state_dict()
    found = again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_llama4_with_vision_gives_its_text_model(tmp_path: Path, small: Small) -> None:
    """Llama4ForConditionalGeneration: text_config, the language_model prefix, and vision tensors that are left out."""
    config, weights = small("llama4-scout")
    save(tmp_path / "text", config, weights)
    text = transformers.AutoConfig.from_pretrained(tmp_path / "text")
    vision = transformers.Llama4VisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28,
        patch_size=14, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
    )  # fmt: skip
    whole = transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=text, vision_config=vision)
    ).to(torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.bfloat16)
    whole.language_model.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    with open_checkpoint(tmp_path / "whole") as checkpoint:
        assert checkpoint.config == config
        assert any("vision_model" in name for name in checkpoint.skipped)
        assert all(checkpoint[name].tobytes() == weights[name].tobytes() for name in weights)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("row", ["llama2", "llama3.2", "llama4-maverick"])
def test_torch_loads_meta_shards(row: str, shards: int, tmp_path: Path, small: Small) -> None:
    config, weights = small(row)
    save(tmp_path / "meta", config, weights, format="meta", shards=shards)
    loaded = [
        torch.load(tmp_path / "meta" / f"consolidated.{s:02d}.pth", weights_only=True, mmap=mmap)
        for s in range(shards)
        for mmap in (False, True)
    ]
    embedding = weights["embed.weight"].astype(np.float32)
    axis = 1 if config.generation == "llama2" else 0
    for s, part in enumerate(np.split(embedding, shards, axis)):
        for state in loaded[2 * s : 2 * s + 2]:
            assert (state["tok_embeddings.weight"].float().numpy() == part).all()
            assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in state.values())
            if config.tied_embeddings:
                assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    # Row-parallel: the second feed-forward matrix is cut along its inputs.
    name = "layers.0.feed_forward." + ("mlp.fc2_weight" if config.moe else "w2.weight")
    assert loaded[0][name].shape == (64, 96 // shards)


def test_meta_files_saved_by_torch_are_read(tmp_path: Path, small: Small) -> None:
    """Parameters, views into shared storage, transposed views and extra state, as training code leaves them."""
    import io

    config, weights = small("llama3")
    save(tmp_path / "m", config, weights, format="meta")
    state: dict[str, Any] = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    both = torch.cat([state["layers.0.feed_forward.w1.weight"], state["layers.0.feed_forward.w3.weight"]])
    state["layers.0.feed_forward.w1.weight"], state["layers.0.feed_forward.w3.weight"] = both.chunk(2)
    state["layers.1.feed_forward.w2.weight"] = state["layers.1.feed_forward.w2.weight"].t().contiguous().t()
    state["norm.weight"] = torch.nn.Parameter(state["norm.weight"])
    state["layers.0.attention.wo._extra_state"] = io.BytesIO(b"anything")
    state["rope.freqs"] = torch.ones(8)
    torch.save(state, tmp_path / "m" / "consolidated.00.pth")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert all(checkpoint[name].tobytes() == weights[name].tobytes() for name in weights)
        assert "rope.freqs" in checkpoint.skipped


@pytest.mark.parametrize("row", ["llama2", "llama3.1", "llama3.2", "llama4-scout", "llama4-maverick"])
def test_the_gguf_package_reads_our_files_under_its_names(row: str, tmp_path: Path, small: Small) -> None:
    """Names by the package's own map from transformers' names; contents by llama.cpp's conversion rules."""
    config, weights = small(row, "f32")
    save(tmp_path / "m.gguf", config, weights, format="gguf", metadata={"name": "tiny"})
    save(tmp_path / "hf", config, weights)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    arch = gguf.MODEL_ARCH.LLAMA4 if config.generation == "llama4" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, config.n_layers)
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    expected = {}
    for name, tensor in state.items():
        array = tensor.numpy()
        if name == "lm_head.weight" and config.tied_embeddings:
            continue
        if name.endswith("gate_up_proj"):
            gate, up = np.split(array.swapaxes(-1, -2), 2, axis=-2)
            expected[names.get_name(name.replace("gate_up_proj", "gate_proj")) + ".weight"] = gate
            expected[names.get_name(name.replace("gate_up_proj", "up_proj")) + ".weight"] = up
            continue
        if name.endswith("down_proj"):
            array = array.swapaxes(-1, -2)
        if arch == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.n_heads if "q_proj" in name else config.n_kv_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        expected[names.get_name(name.removesuffix(".weight")) + ".weight"] = array
    if config.rope_scaling is not None:
        plain = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        expected["rope_freqs.weight"] = (plain / np.array(rope_frequencies(config))).astype(np.float32)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].data.reshape(array.shape), array, rtol=1e-6, atol=0)
    keys = gguf.Keys
    model = "llama4" if config.generation == "llama4" else "llama"
    contents = {key: field.contents() for key, field in reader.fields.items()}
    assert contents[keys.General.ARCHITECTURE] == model and contents[keys.General.NAME] == "tiny"
    for key, value in (
        (keys.LLM.BLOCK_COUNT, config.n_layers),
        (keys.LLM.EMBEDDING_LENGTH, config.dim),
        (keys.LLM.FEED_FORWARD_LENGTH, config.ffn_dim),
        (keys.LLM.CONTEXT_LENGTH, config.context_length),
        (keys.Attention.HEAD_COUNT, config.n_heads),
        (keys.Attention.HEAD_COUNT_KV, config.n_kv_heads),
        (keys.Rope.DIMENSION_COUNT, config.head_dim),
        (keys.Rope.FREQ_BASE, config.rope_theta),
        (keys.Attention.LAYERNORM_RMS_EPS, np.float32(config.norm_eps)),
    ):
        assert contents[key.format(arch=model)] == value
    if config.moe is not None:
        assert contents[keys.LLM.EXPERT_COUNT.format(arch=model)] == config.moe.n_experts
        assert contents[keys.LLM.INTERLEAVE_MOE_LAYER_STEP.format(arch=model)] == config.moe.interleave
        assert contents[keys.LLM.EXPERT_FEED_FORWARD_LENGTH.format(arch=model)] == config.moe.ffn_dim


@pytest.mark.parametrize("dtype", ["bf16", "f16", "q8_0", "q4_0"])
def test_the_gguf_package_dequantises_our_files_to_what_we_read(dtype: str, tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3", "f32")
    save(tmp_path / "m.gguf", config, weights, format="gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        name = {"token_embd.weight": "embed.weight", "blk.1.attn_q.weight": "layers.1.attention.wq.weight"}
        for tensor in reader.tensors:
            if tensor.name in name:
                theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                ours = checkpoint[name[tensor.name]].astype(np.float32)
                np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


def test_a_gguf_written_by_the_gguf_package_is_read(tmp_path: Path, small: Small) -> None:
    """As llama.cpp's converter writes it: no key of ours, no vocabulary size, the rope factors as a tensor."""
    config, weights = small("llama3.1", "f32")
    save(tmp_path / "ours.gguf", config, weights, format="gguf")
    ours = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv([config.n_kv_heads] * config.n_layers)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    for name, data in ours.items():
        matrix = data.ndim == 2 and name != "token_embd.weight"
        kind = gguf.GGMLQuantizationType.Q8_0
        if matrix:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.array(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "theirs.gguf") as checkpoint:
        assert checkpoint.config == config
        for name, array in weights.items():
            assert np.abs(checkpoint[name] - array).max() < 2e-3
        assert checkpoint.type_name("layers.0.ffn.w2.weight") == "q8_0"


@pytest.mark.parametrize("row", ["llama2", "llama3"])
def test_transformers_reads_our_gguf(row: str, tmp_path: Path, small: Small) -> None:
    """Its own reader undoes the permutation and builds a config by its own rules: its model computes the same."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    import herd.tokenizer

    text = "the quick brown fox jumps over the lazy dog and runs away " * 40
    tokenizer = herd.tokenizer.train([text, text.upper(), text.title()], vocab_size=300, n_specials=11)
    config, weights = small(row, "f32")
    config = replace(config, vocab_size=320)  # 20 rows more than the tokenizer has tokens
    for name in ("embed.weight", "output.weight"):
        weights[name] = (np.random.default_rng(0).standard_normal((320, 64)) * 0.05).astype(np.float32)
    save(tmp_path / "hf", config, weights)
    save(tmp_path / "m.gguf", config, weights, format="gguf", tokenizer=tokenizer, metadata={"name": "tiny"})
    parsed = load_gguf_checkpoint(str(tmp_path / "m.gguf"))["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**parsed)).eval()
    tensors = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors)
    with torch.no_grad():
        theirs = model(TOKENS).logits
    assert (theirs - _transformers_logits(tmp_path / "hf")).abs().max() < 1e-6
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.tokenizer.encode("the lazy dog") == tokenizer.encode("the lazy dog")
