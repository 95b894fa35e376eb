"""Every instruction set of this machine computes the same model: whole steps, not their matrix products alone.

Attention, norms, rotation, adapters and caches have kernels of their own for each set. With weights and a cache in
float32 each set is held against torch in float64; what rounds (weights in blocks, inputs to int8, a cache in few bits)
is held against the scalar set, since a number that lies between two codes may fall to either side.

The instruction set is chosen when a process starts (HERD_ISA): each has a process of its own that computes all cases,
with the compiled part that this one runs (make sanitize puts another in its place).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from herd import checkpoint
from herd.architecture import AttentionTemperature, LlamaConfig, MoeConfig, RopeScaling, tensor_shapes

native = pytest.importorskip("herd._native")
torch = pytest.importorskip("torch")

from herd.model import from_arrays  # noqa: E402

KVS = ("f32", "bf16", "int8")
# Tokens of two sequences in each step: single ones and pieces, within chunks and a page and over their ends.
PIECES = ((1, 13), (7, 1), (16, 1), (1, 1), (33, 40), (23, 6))
LENGTHS = tuple(sum(pieces) for pieces in zip(*PIECES, strict=True))

CHILD = """
import pickle, sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
from herd import _native
from herd.checkpoint import LowRank
from herd.engine.backend import BackendOptions, Span
from herd.engine.native_backend import open_backend

def compute(path, quant, kv, texts, change, pieces):
    backend = open_backend(BackendOptions(path=Path(path), quant=quant, ctx=None, threads=1, kv=kv))
    backend.load_adapter("change", {name: LowRank(*parts) for name, parts in change.items()})
    handles = [backend.reserve(len(texts[0]))[0], backend.reserve(len(texts[1]), adapter="change")[0]]
    rows, at = [[], []], [0, 0]
    for counts in pieces:
        spans = []
        for i, count in enumerate(counts):
            assert backend.grow(handles[i], count)
            spans.append(Span(handles[i], texts[i][at[i] : at[i] + count], outputs=count))
            at[i] += count
        logits = backend.step(spans)
        rows[0].append(logits[: counts[0]])
        rows[1].append(logits[counts[0] :])
    found = {"logits": np.concatenate(rows[0]), "logits with an adapter": np.concatenate(rows[1])}
    found["scores"], found["states"] = np.concatenate(backend.score(texts)), backend.embed(texts)
    backend.close()
    return found

cases, kvs, pieces = pickle.load(open(sys.argv[1], "rb"))
results = {(name, kv): compute(*case[:2], kv, *case[2:], pieces) for name, case in cases.items() for kv in kvs}
pickle.dump((_native.isa(), results), open(sys.argv[2], "wb"))
"""

ODD = LlamaConfig(
    dim=60, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=18, ffn_dim=90, vocab_size=161, context_length=128,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), generation="llama3.1",
)  # fmt: skip
WIDE = LlamaConfig(
    dim=256, n_layers=1, n_heads=8, n_kv_heads=4, head_dim=32, ffn_dim=512, vocab_size=160, context_length=128
)
LLAMA4 = LlamaConfig(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=90, vocab_size=160, context_length=128,
    moe=MoeConfig(n_experts=4, ffn_dim=41, top_k=2), nope_interval=4, attention_chunk=24, qk_norm=True,
    attention_temperature=AttentionTemperature(16, 0.1), generation="llama4",
)  # fmt: skip
CASES: dict[str, tuple[LlamaConfig, str]] = {
    "dense": (ODD, "f32"),
    "Llama 4": (LLAMA4, "f32"),
    "bf16": (WIDE, "bf16"),
    "Llama 4 in bf16": (LLAMA4, "bf16"),
    "q4_k_m": (WIDE, "q4_k_m"),
    "int4_g128": (WIDE, "int4_g128"),
    "int4_g32": (WIDE, "int4_g32"),
}
# Whether weights are float32, and the cache -> bound of the difference to the scalar set (measured).
BOUNDS = {
    (True, "f32"): 1e-5,  # 9e-7
    (True, "bf16"): 5e-4,  # 5e-5
    (True, "int8"): 1e-3,  # 2e-4
    **{(False, kv): 0.03 for kv in KVS},  # 8e-3: one layer, so that a code that differs is not carried on into others
}


class Model(NamedTuple):
    """A model, two texts for it, and a low-rank change that the second is computed with."""

    config: LlamaConfig
    arrays: dict[str, np.ndarray]
    texts: list[list[int]]
    change: dict[str, tuple[np.ndarray, np.ndarray]]


def model_of(config: LlamaConfig) -> Model:
    """Weights that keep activations of order 1 and logits of a few."""
    rng = np.random.default_rng(6)
    arrays = {}
    for name, shape in tensor_shapes(config).items():
        norm, ends = name.endswith("norm.weight"), name in ("embed.weight", "output.weight")
        spread = 0.2 if norm else (3 if ends else 1) / shape[-1] ** 0.5
        arrays[name] = (norm + spread * rng.standard_normal(shape)).astype(np.float32)
    change = {}
    for name in ("layers.0.attention.wq.weight", "layers.0.attention.wv.weight", "layers.0.attention.wo.weight"):
        height, width = arrays[name].shape
        parts = rng.normal(0, width**-0.5, (3, width)), rng.normal(0, 0.3, (height, 3))
        change[name] = parts[0].astype(np.float32), parts[1].astype(np.float32)
    return Model(config, arrays, [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS], change)


MODELS = {name: model_of(config) for name, (config, _) in CASES.items()}


@pytest.fixture(scope="module")
def computed(
    tmp_path_factory: pytest.TempPathFactory, on_each_isa: Callable[..., dict[str, Any]]
) -> dict[str, dict[tuple[str, str], Any]]:
    """What each instruction set of this machine computes, all cases together."""
    folder = tmp_path_factory.mktemp("isas")
    cases = {}
    for name, (config, quant) in CASES.items():
        model = MODELS[name]
        path = checkpoint.save(folder / name, config, model.arrays, format="hf", dtype="f32")
        cases[name] = str(path), quant, model.texts, model.change
    return on_each_isa(CHILD, (cases, KVS, PIECES))


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, np.ndarray]]:
    """Torch in float64, the change merged into the weights."""
    return {name: by_torch(MODELS[name]) for name, (_, quant) in CASES.items() if quant == "f32"}


@torch.no_grad()
def by_torch(model: Model) -> dict[str, np.ndarray]:
    merged = {
        name: array + model.change[name][1] @ model.change[name][0] if name in model.change else array
        for name, array in model.arrays.items()
    }
    plain, changed = (
        from_arrays(model.config, arrays, dtype=torch.float64).eval() for arrays in (model.arrays, merged)
    )
    ids = [torch.tensor([text]) for text in model.texts]
    scores = []
    for text in ids:
        logprobs = torch.log_softmax(plain(text)[0].double(), dim=-1)[:-1]
        scores.append(logprobs.gather(1, text[0, 1:, None])[:, 0].numpy())
    return {
        "logits": plain(ids[0])[0].numpy(),
        "logits with an adapter": changed(ids[1])[0].numpy(),
        "scores": np.concatenate(scores),
        "states": np.stack([plain.hidden(text)[0].mean(0).numpy() for text in ids]),
    }


@pytest.mark.parametrize("name", [name for name, (_, quant) in CASES.items() if quant == "f32"])
def test_a_step_is_that_of_float64(
    isa: str, name: str, computed: dict[str, Any], expected: dict[str, dict[str, np.ndarray]]
) -> None:
    for kind, value in expected[name].items():
        assert 1 < np.abs(value).max() < 40, "an absolute difference would mean nothing"
        found = computed[isa][name, "f32"][kind]
        np.testing.assert_allclose(found, value, atol=1e-4, rtol=0, err_msg=f"{kind}; measured: 1.2e-5")


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_scalar_kernels(
    isa: str, name: str, kv: str, computed: dict[str, Any], bf16_isas: tuple[str, ...]
) -> None:
    """Root mean square of the difference, in units of the values' own spread."""
    if isa == "scalar":
        pytest.skip("the others are held against it")
    for kind, value in computed["scalar"][name, kv].items():
        error = np.sqrt(((computed[isa][name, kv][kind] - value) ** 2).mean()) / value.std()
        quant = CASES[name][1]
        bound = BOUNDS[quant == "f32", kv]
        if isa in bf16_isas and "bf16" in (kv, quant):  # measured, of Llama 4, where another expert may be chosen
            bound = 0.25 if quant == "bf16" else 0.03  # 0.1, 0.017
        assert error <= bound, f"{kind}: {error:.1e}"


def test_products_of_bfloat16_are_the_choice_where_they_are_faster() -> None:
    """Not on Intel's processors, unless they are asked for."""
    has, intel = native.cpu_features(), "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    if not has.get("avx512_bf16"):
        pytest.skip("this processor has none")
    for limit, wanted in (("", "avx512_vnni" if intel else "avx512_bf16"), ("avx512_bf16", "avx512_bf16")):
        command = [sys.executable, "-c", "from herd import _native; print(_native.isa())"]
        told = subprocess.run(
            command, env={**os.environ, "HERD_ISA": limit}, capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == wanted
