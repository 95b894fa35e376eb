"""The native engine computes what Herd's torch model computes, on every architecture, cut into steps in any way.

The architectures are those of benchmarks/parity_table.py, which holds the torch model against transformers, and shapes
that fill no vector. With block formats, torch runs on the weights as they come back from their blocks; what remains is
the rounding of activations to 8 bits, whose size is stated here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from herd import checkpoint
from herd.architecture import LlamaConfig, MoeConfig, RopeScaling
from herd.checkpoint import open_checkpoint
from herd.checkpoint.blocks import dequantize, quantize
from herd.checkpoint.mixes import MIXES, Activations, activations_of, rounding_of
from herd.checkpoint.numbers import BLOCKS
from herd.engine.backend import BackendOptions, Span

native = pytest.importorskip("herd._native")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from herd.engine.native_backend import NativeBackend, open_backend  # noqa: E402
from herd.engine.native_weights import weight_formats  # noqa: E402
from herd.model import from_arrays, moe  # noqa: E402


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "parity_table.py"
    spec = importlib.util.spec_from_file_location("herd_parity_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = _load()
DENSE: LlamaConfig = table.DENSE
SCOUT = "Llama 4 Scout, all of it"
CASES: dict[str, LlamaConfig] = {
    **table.CASES,
    "dynamic NTK scaling": dataclasses.replace(DENSE, rope_scaling=RopeScaling("dynamic", 4.0, original_context=512)),
    "odd widths": dataclasses.replace(DENSE, dim=60, n_heads=6, n_kv_heads=3, head_dim=18, ffn_dim=90, vocab_size=161),
    "narrow heads": dataclasses.replace(DENSE, dim=34, n_heads=5, n_kv_heads=1, head_dim=6, ffn_dim=33, vocab_size=7),
    "wide heads": dataclasses.replace(DENSE, dim=48, n_heads=2, n_kv_heads=2, head_dim=272, ffn_dim=31),
    "40 heads of one key head": dataclasses.replace(DENSE, n_heads=40, n_kv_heads=1, head_dim=8),
    "one layer": dataclasses.replace(DENSE, n_layers=1),
    "experts of odd width, all chosen": dataclasses.replace(
        table.CASES[SCOUT], ffn_dim=90, moe=MoeConfig(n_experts=3, ffn_dim=41, top_k=3), attention_chunk=17
    ),
}
LENGTH = 300  # beyond every chunk, and several pages


@contextmanager
def opened(path: Path, *, quant: str | None = None, kv: Any = "f32", threads: int = 1) -> Iterator[NativeBackend]:
    backend = open_backend(BackendOptions(path=path, quant=quant, ctx=None, threads=threads, kv=kv))
    try:
        yield backend
    finally:
        backend.close()


def saved(folder: Path, config: LlamaConfig, arrays: dict[str, np.ndarray], **how: Any) -> Path:
    path = folder / ("model.gguf" if how.get("format") == "gguf" else "model")
    checkpoint.save(path, config, arrays, **{"format": "hf", "dtype": "f32", **how})
    return path


def tokens_of(config: LlamaConfig, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


@torch.no_grad()
def expected_logits(config: LlamaConfig, arrays: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    model = from_arrays(config, arrays).eval()
    logits: np.ndarray = model(torch.tensor([tokens]))[0].numpy()
    return logits


def whole(backend: NativeBackend, tokens: list[int]) -> np.ndarray:
    reserved = backend.reserve(len(tokens))
    assert reserved is not None
    logits = backend.step([Span(reserved[0], tokens, outputs=len(tokens))])
    backend.release(reserved[0])
    return logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_torch(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    arrays, tokens = table.random_arrays(config), tokens_of(config, LENGTH)
    expected = expected_logits(config, arrays, tokens)
    assert 1 < np.abs(expected).max() < 40, "an absolute difference would mean nothing"
    with opened(saved(tmp_path, config, arrays)) as backend:
        np.testing.assert_allclose(whole(backend, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["Llama 3.1, llama3 scaling", SCOUT, "odd widths", "dynamic NTK scaling"])
def test_prompts_in_pieces_beside_decoding_rows(name: str, tmp_path: Path) -> None:
    """Sequences advance by spans of different length in one step, with logits after any of their last tokens."""
    config = CASES[name]
    arrays = table.random_arrays(config, seed=4)
    texts = [tokens_of(config, LENGTH - 5 * i, seed=i) for i in range(5)]
    rng = np.random.default_rng(8)
    with opened(saved(tmp_path, config, arrays)) as backend:
        handles = [backend.reserve(LENGTH)[0] for _ in texts]  # type: ignore[index]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        at = [0] * len(texts)
        while any(at[i] < len(text) for i, text in enumerate(texts)):
            spans, owners = [], []
            for i in rng.permutation(len(texts)).tolist():
                # The first decodes token by token, the others take pieces; some wait.
                piece = texts[i][at[i] :][: 1 if i == 0 else int(rng.integers(0, 40))]
                if piece:
                    assert backend.grow(handles[i], len(piece))
                    spans.append(Span(handles[i], piece, outputs=int(rng.integers(0, len(piece) + 1))))
                    owners.append(i)
                    at[i] += len(piece)
            if not spans:
                continue
            logits = backend.step(spans)
            assert len(logits) == sum(span.outputs for span in spans)
            ends = np.cumsum([span.outputs for span in spans])
            for i, span, end in zip(owners, spans, ends.tolist(), strict=True):
                gap = np.full((len(span.tokens) - span.outputs, config.vocab_size), np.nan, np.float32)
                found[i] += [gap, logits[end - span.outputs : end]]
    for text, parts in zip(texts, found, strict=True):
        logits = np.concatenate(parts)
        seen = ~np.isnan(logits[:, 0])
        assert seen.sum() > 30
        np.testing.assert_allclose(logits[seen], expected_logits(config, arrays, text)[seen], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["Llama 3.2, tied, llama3 scaling", "Llama 4 Maverick, all of it", "narrow heads"])
def test_scores_and_states_equal_torch(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    arrays = table.random_arrays(config, seed=2)
    texts = [tokens_of(config, n, seed=n) for n in (1, 2, 65, 300)]
    model = from_arrays(config, arrays).eval()
    with opened(saved(tmp_path, config, arrays)) as backend, torch.no_grad():
        scores, states = backend.score(texts), backend.embed(texts)
        for text, score, state in zip(texts, scores, states, strict=True):
            ids = torch.tensor([text])
            logprobs = torch.log_softmax(model(ids)[0].double(), dim=-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(score, logprobs.numpy(), atol=1e-4)
            np.testing.assert_allclose(state, model.hidden(ids)[0].mean(0).numpy(), atol=2e-5)


WIDE = dataclasses.replace(DENSE, n_layers=1, dim=256, n_heads=8, n_kv_heads=4, head_dim=32, ffn_dim=512)
WIDE_LLAMA4 = dataclasses.replace(
    table.CASES[SCOUT], n_layers=1, dim=256, head_dim=32, ffn_dim=512, moe=MoeConfig(n_experts=4, ffn_dim=256)
)


@pytest.mark.parametrize("config", [WIDE, WIDE_LLAMA4], ids=["dense", "llama4"])
@pytest.mark.parametrize("quant", ["f16", "bf16", *MIXES])
def test_weights_in_few_bits_equal_torch_on_the_same_weights(
    config: LlamaConfig, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer, so that a code that differs by one is not carried on into others; inputs are rounded in torch too."""
    arrays, tokens = table.random_arrays(config), tokens_of(config, 120)
    path = saved(tmp_path, config, arrays)
    formats, weights = in_few_bits(path, arrays, quant)
    model = from_arrays(config, weights).eval()
    with opened(path, quant=quant) as backend:
        found = whole(backend, tokens)
    share = activations_of(quant)
    round_inputs(model, formats, share, monkeypatch)
    with torch.no_grad():
        x_SD = model.hidden(torch.tensor([tokens]))[0]
        head = as_multiplied(x_SD, formats["output.weight"], share)
        expected = torch.nn.functional.linear(head, model.output_weight).numpy()
    error = np.abs(found - expected).max(1) / expected.std()
    # On which rows an input lies between two codes depends on the processor, as torch's sums do: 11 % were most.
    assert np.quantile(error, 0.8) <= 1e-5, "measured: 3e-6"
    assert error.max() <= 0.15, "measured: 0.045, where an input lies between two codes and torch takes the other"


def in_few_bits(path: Path, arrays: dict[str, np.ndarray], quant: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The format of each weight that has one, and all weights as they come back from it."""
    with open_checkpoint(path) as stored:
        formats = weight_formats(stored, quant)
    return formats, {
        name: through(formats[name], array, quant) if name in formats else array for name, array in arrays.items()
    }


def to_int8_and_back(x: torch.Tensor, share: Activations) -> torch.Tensor:
    """The engine's rounding of what block formats are multiplied with: scale max|x| / 127 of 32 numbers or a row."""
    blocks = x.reshape(*x.shape[:-1], -1, 32 if share == "block" else x.shape[-1])
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks / scale.clamp_min(1e-30)) * scale).reshape(x.shape)


def as_multiplied(x: torch.Tensor, kind: str, share: Activations) -> torch.Tensor:
    """Inputs as the engine rounds them for weights of a format."""
    if kind in BLOCKS:
        return to_int8_and_back(x, share)
    return x.bfloat16().float() if kind == "bf16" and native.isa() in ("avx512_bf16", "amx") else x


def round_inputs(
    model: torch.nn.Module, formats: dict[str, str], share: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let torch round as the engine does before every product."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in formats:
            kind = formats[f"{name}.weight"]
            module.register_forward_pre_hook(lambda _, inputs, kind=kind: (as_multiplied(inputs[0], kind, share),))
    experts = {formats[name] for name in formats if ".moe.experts." in name}
    if experts:
        kind = experts.pop()  # all of them are in blocks, or none
        grouped = moe.grouped_linear
        monkeypatch.setattr(
            moe, "grouped_linear", lambda x, w, counts: grouped(as_multiplied(x, kind, share), w, counts)
        )


def through(type_name: str, array: np.ndarray, quant: str) -> np.ndarray:
    """What remains of weights after a format."""
    data = quantize(type_name, array, rounding=rounding_of(type_name, quant))
    return dequantize(type_name, data).reshape(array.shape)


@pytest.mark.parametrize(("name", "bound"), [("Llama 3.1, llama3 scaling", 0.03), (SCOUT, 0.15)])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_rounding_inputs_costs_little(name: str, bound: float, quant: str, tmp_path: Path) -> None:
    """Against torch without that rounding, in units of the logits' spread; measured: 0.022, and with experts 0.1."""
    width = {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "ffn_dim": 512}
    config = dataclasses.replace(CASES[name], **width)
    if config.moe is not None:
        config = dataclasses.replace(config, moe=MoeConfig(n_experts=4, ffn_dim=256))
    arrays, tokens = table.random_arrays(config), tokens_of(config, 120)
    path = saved(tmp_path, config, arrays)
    _, weights = in_few_bits(path, arrays, quant)
    expected = expected_logits(config, weights, tokens)
    with opened(path, quant=quant) as backend:
        error = np.sqrt(((whole(backend, tokens) - expected) ** 2).mean()) / expected.std()
    assert error <= bound


@pytest.mark.parametrize("mix", ["q4_k_m", "int4_g32", "int4_g128"])
@pytest.mark.parametrize("config", [WIDE, WIDE_LLAMA4], ids=["dense", "llama4"])
def test_a_quantised_file_and_quantising_at_load_are_the_same(config: LlamaConfig, mix: str, tmp_path: Path) -> None:
    arrays, tokens = table.random_arrays(config), tokens_of(config, 80)
    with opened(saved(tmp_path, config, arrays), quant=mix) as backend:
        at_load = whole(backend, tokens)
    with opened(saved(tmp_path, config, arrays, format="gguf", dtype=mix)) as backend:
        np.testing.assert_array_equal(whole(backend, tokens), at_load)


@pytest.mark.parametrize(("kv", "bound"), [("bf16", 0.03), ("int8", 0.1)])
def test_a_rounded_cache_stays_close(kv: str, bound: float, tmp_path: Path) -> None:
    """Root mean square of the change, in units of the logits' own spread."""
    for name in ("Llama 3.1, llama3 scaling", SCOUT, "odd widths"):
        config = CASES[name]
        arrays, tokens = table.random_arrays(config), tokens_of(config, 200)
        expected = expected_logits(config, arrays, tokens)
        with opened(saved(tmp_path / name, config, arrays), kv=kv) as backend:
            error = np.sqrt(((whole(backend, tokens) - expected) ** 2).mean()) / expected.std()
        assert error <= bound, f"{name}; measured: at most 0.017 and 0.056"
