"""LoRA adapters at run time: equal to weights with the change merged in, several in one batch, each with its cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from herd import LLM, FileFormatError, UsageError
from herd.architecture import MoeConfig, stored_tensors
from herd.checkpoint import open_checkpoint, read_adapter, save

PROMPTS = ["def f(x):\n    return x", "import os", "class A:\n" + "    x = 1\n" * 12]
ATTENTION = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: Path, targets: tuple[str, ...], rank: int, **settings: Any) -> Path:
    """An adapter with random changes, in PEFT's layout."""
    rng = np.random.default_rng(rank)
    tensors = {}
    with open_checkpoint(model) as opened:
        for rule in stored_tensors("hf", opened.config):
            shape = opened.shape(rule.parts[0])
            if rule.stored.split(".")[-2] in targets:
                stem = "base_model.model." + rule.stored.removesuffix(".weight")
                a, b = (rank, shape[1]), (shape[0], rank)
                tensors[stem + ".lora_A.weight"] = rng.normal(0, shape[1] ** -0.5, a).astype(np.float32)
                tensors[stem + ".lora_B.weight"] = rng.normal(0, 0.3, b).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(model: Path, adapter: Path, out: Path) -> Path:
    """The model with alpha / rank · B·A added to its stored matrices, straight from the files."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes, weights = load_file(adapter / "adapter_model.safetensors"), load_file(model / "model.safetensors")
    for name in [name for name in changes if "lora_A" in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        factor = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
        weights[target] = weights[target] + np.float32(factor) * (
            changes[name.replace("lora_A", "lora_B")] @ changes[name]
        )
    shutil.copytree(model, out)
    save_file(weights, out / "model.safetensors")
    return out


def ask(llm: LLM, prompts: Any, adapter: str | None = None) -> Any:
    return llm.generate(prompts, max_tokens=24, temperature=0, top_logprobs=1, ignore_eos=True, adapter=adapter)


@pytest.mark.parametrize(("targets", "rank"), [(ATTENTION, 4), (ALL, 3), (("down_proj",), 16)])
def test_equal_to_the_merged_model(tiny: Path, tmp_path: Path, targets: tuple[str, ...], rank: int) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny, targets, rank, use_rslora=rank == 3)
    with (
        LLM(tiny, kv="f32", backend="native") as llm,
        LLM(merged(tiny, adapter, tmp_path / "merged"), kv="f32") as other,
    ):
        llm.load_adapter(adapter, "a")
        for prompt in PROMPTS:
            ours, theirs = ask(llm, prompt, "a"), ask(other, prompt)
            assert ours.token_ids == theirs.token_ids
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
            assert ask(llm, prompt).logprobs != ours.logprobs


@pytest.mark.parametrize(("targets", "rank"), [(ATTENTION, 4), (ALL, 3)])
def test_scores_and_vectors_are_the_merged_models(
    tiny: Path, tmp_path: Path, targets: tuple[str, ...], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of texts that take several native calls, of long ones in windows, and beside a stream without adapter."""
    monkeypatch.setattr("herd.engine.native_backend.ROWS", 16)
    adapter = write_adapter(tmp_path / "adapter", tiny, targets, rank)
    long = [5 + i * 17 % 500 for i in range(300)]
    with (
        LLM(tiny, kv="f32", backend="native") as llm,
        LLM(merged(tiny, adapter, tmp_path / "merged"), kv="f32", backend="native") as other,
    ):
        llm.load_adapter(adapter, "a")
        plain = [score.logprobs for score in llm.score(PROMPTS)], llm.embed(PROMPTS)
        stream = llm.stream(PROMPTS[2], max_tokens=9, ignore_eos=True)
        next(stream)
        for ours, theirs in zip(llm.score(PROMPTS, adapter="a"), other.score(PROMPTS), strict=True):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
            assert ours.logprobs not in plain[0]
        windows = (model.score(long, overlap=50, adapter=name).logprobs for model, name in ((llm, "a"), (other, None)))
        np.testing.assert_allclose(*windows, atol=2e-4)
        vectors = llm.embed(PROMPTS, adapter="a")
        np.testing.assert_allclose(vectors, other.embed(PROMPTS), atol=2e-4)
        assert not np.isclose(vectors, plain[1], atol=2e-2).all(axis=1).any()
        assert len(list(stream)) == 8
        assert [score.logprobs for score in llm.score(PROMPTS)] == plain[0], "the adapter is for who asks for it"
        np.testing.assert_array_equal(llm.embed(PROMPTS), plain[1])
        llm.unload_adapter("a")
        for call in (llm.score, llm.embed):
            with pytest.raises(UsageError, match="no such adapter"):
                call(PROMPTS[0], adapter="a")


def test_several_in_one_batch(tiny: Path, tmp_path: Path) -> None:
    """The same prompts with two adapters and none, all at once: bit for bit what each gives alone."""
    with LLM(tiny, quant="q8_0", backend="native") as llm:
        for i, targets in enumerate((ATTENTION, ALL)):
            llm.load_adapter(write_adapter(tmp_path / str(i), tiny, targets, 4 + i), str(i))
        kinds = [None, "0", "1"]
        alone = {(kind, prompt): ask(llm, prompt, kind) for kind in kinds for prompt in PROMPTS}
        assert len({tuple(alone[kind, PROMPTS[2]].token_ids) for kind in kinds}) == 3
        streams = {
            key: llm.stream(key[1], max_tokens=24, temperature=0, top_logprobs=1, ignore_eos=True, adapter=key[0])
            for key in alone
        }
        ends: dict[Any, Any] = {}
        while streams:  # one token of each in turn: all are in the batch together
            for key in list(streams):
                chunk = next(streams[key])
                if chunk.completion is not None:
                    ends[key] = chunk.completion
                    del streams[key]
        for key, completion in ends.items():
            assert (completion.token_ids, completion.logprobs) == (alone[key].token_ids, alone[key].logprobs)


def test_unloaded_and_loaded_again(tiny: Path, tmp_path: Path) -> None:
    """Another adapter under the same name finds nothing of the first one's cache; what runs keeps what it needs."""
    first, second = (write_adapter(tmp_path / str(i), tiny, ALL, 4 + i) for i in range(2))
    with LLM(tiny, backend="native") as llm:
        llm.load_adapter(second, "a")
        expected = ask(llm, PROMPTS[2], "a").logprobs
    with LLM(tiny, backend="native") as llm:
        llm.load_adapter(first, "a")
        assert ask(llm, PROMPTS[2], "a").logprobs != expected
        stream = llm.stream(PROMPTS[0], max_tokens=9, ignore_eos=True, adapter="a")
        late = llm.stream(PROMPTS[0], max_tokens=9, adapter="a")
        next(stream)
        with pytest.raises(UsageError, match="running"):
            llm.unload_adapter("a")
        stream.close()
        llm.unload_adapter("a")
        with pytest.raises(UsageError, match="no such adapter"):
            llm.unload_adapter(None)  # type: ignore[arg-type]
        for use in (lambda: next(late), lambda: ask(llm, PROMPTS[0], "a"), lambda: llm.unload_adapter("a")):
            with pytest.raises(UsageError, match="no such adapter"):
                use()
        early = llm.stream(PROMPTS[0], max_tokens=9)
        llm.load_adapter(second, "a")
        replaced = llm.stream(PROMPTS[0], max_tokens=9, adapter="a")
        llm.unload_adapter("a")
        llm.load_adapter(second, "a")
        with pytest.raises(UsageError, match="another adapter"):
            next(replaced)
        next(early)
        early.close()
        again = ask(llm, PROMPTS[2], "a")
        assert again.logprobs == expected and again.timings.reused_tokens == 0


def test_a_mixture_takes_changes_to_its_shared_network(make_model: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"moe": MoeConfig(n_experts=3, ffn_dim=96), "generation": "llama4", "tied_embeddings": False}
    model = make_model(**changes)
    with open_checkpoint(model) as opened:
        rng = np.random.default_rng(0)
        a, b = rng.normal(0, 0.2, (4, 48)).astype(np.float32), rng.normal(0, 0.3, (96, 4)).astype(np.float32)
        name = "layers.1.moe.shared.w1.weight"
        weights = {key: opened[key] + (b @ a if key == name else np.float32(0)) for key in opened}
        other = save(tmp_path / "merged", opened.config, weights, dtype="f32", tokenizer=opened.tokenizer)
    folder = tmp_path / "adapter"
    folder.mkdir()
    stem = "base_model.model.model.layers.1.feed_forward.shared_expert.gate_proj"
    save_file({stem + ".lora_A.weight": a, stem + ".lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with LLM(model, kv="f32") as llm, LLM(other, kv="f32") as expected:
        llm.load_adapter(folder, "shared")
        ours, theirs = ask(llm, PROMPTS[0], "shared"), ask(expected, PROMPTS[0])
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)


def test_what_does_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tiny, ATTENTION, 4)
    with open_checkpoint(tiny) as opened:
        config = opened.config
    settings = json.loads((good / "adapter_config.json").read_text())
    absent = {name: value for name, value in settings.items() if name != "peft_type"}
    wrong = [("peft_type", absent)]
    for field, value in (
        ("r", 5),
        ("use_dora", True),
        ("alora_invocation_tokens", [128000]),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("lora_alpha", None),
        ("lora_alpha", 10**99),
        ("lora_alpha", 10**400),
    ):
        wrong.append((field, settings | {field: value}))
    for i, (field, settings) in enumerate(wrong):
        bad = tmp_path / str(i)
        bad.mkdir()
        (bad / "adapter_config.json").write_text(json.dumps(settings))
        (bad / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
        with pytest.raises(FileFormatError, match="lora_A" if field == "r" else None) as caught:
            read_adapter(bad, config)
        assert field in str(caught.value) or field == "r" or "endless" in str(caught.value)
    tensors = load_file(good / "adapter_model.safetensors")
    for change in ("missing", "unknown"):
        broken = dict(tensors)
        first = broken.pop(min(broken))
        if change == "unknown":
            broken[min(tensors)] = first
            broken["base_model.model.model.embed_tokens.lora_embedding_A"] = first
        save_file(broken, good / "adapter_model.safetensors")
        with pytest.raises(FileFormatError, match="missing" if change == "missing" else "not a change to a projection"):
            read_adapter(good, config)
    save_file(tensors, good / "adapter_model.safetensors")
    with LLM(tiny, backend="native") as llm:
        llm.load_adapter(good, "a")
        with pytest.raises(UsageError, match="name"):
            llm.load_adapter(good, "a")
        with pytest.raises(UsageError, match="no such adapter"):
            llm.generate("x", adapter="b")
    pytest.importorskip("torch")
    with LLM(tiny, backend="torch") as llm, pytest.raises(UsageError, match="native"):
        llm.load_adapter(good, "a")
