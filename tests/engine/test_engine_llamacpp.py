"""llama.cpp reads the files that Herd writes, Herd those that llama.cpp's quantiser writes: perplexities are equal.

The model learns Herd's own source for some seconds, so that its perplexity means something. Both sides get the same
token ids and hold their caches in float32. Measured with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from herd import LLM, checkpoint, tokenizer
from herd.architecture import LlamaConfig

pytest.importorskip("herd._native")
torch = pytest.importorskip("torch")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from herd.model import Llama, state_arrays  # noqa: E402
from herd.train import TrainConfig, build_optimizer  # noqa: E402

pytestmark = pytest.mark.peer

FORMATS = [
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs",
    "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k",
]  # fmt: skip
PERPLEXITY = 0.005
"""What perplexities may differ by, relative to llama.cpp's; measured: 0.0006.

Rotated pairs in the wrong order would change them by 0.04, a wrong base of their frequencies by 0.007.
"""
DRIFT = {"f32": 2e-5, "f16": 1e-3, "bf16": 5e-3}
BLOCK_DRIFT = 0.02
"""What a token's log-probability may differ by on average; measured: 1e-6, 2e-4, 1.4e-3, with blocks of weights 0.01.

llama.cpp rounds activations to the format of plain weights. Before blocks, Herd rounds them to 8 bits in blocks of 32,
llama.cpp in blocks of 256 where weights have such: from torch, which rounds none, Herd is 0.005 away and llama.cpp up
to 0.009. The formats themselves change 0.005 to 0.2, the loss of one block of 32 columns in one matrix 0.035.
"""
# Rows of whole blocks of 256, grouped queries, and a third layer, which q4_k_m and q5_k_m favour.
SHAPE = LlamaConfig(
    dim=256,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    ffn_dim=512,
    vocab_size=512,
    rope_theta=10_000.0,
    context_length=512,
)
WINDOWS = 4  # of unseen text, 2,044 scored tokens
TEXTS = [
    "def f(x):\n    return x",
    "  two spaces,\ttabs \n\n\n and lines \r\n ",
    "It's 12345678 things we'll NOT'VE seen: 3.14159e-10!?",
    "äöü é ß — ‘quoted’ “text” … 日本語 ไทย العربية हिन्दी",
    "👩‍💻🦙 and e\u0301, zero\u200bwidth, \ufeffmark, \u3000wide",
    "<|begin_of_text|>no control<|eot_id|> tokens<|reserved_special_token_0|>",
]
STEPS, ROWS, LENGTH = 60, 8, 128  # some 15 seconds of one core, to a perplexity of about 40


class Trained(NamedTuple):
    """A model that has learnt something, and texts it has not seen, each as long as the context."""

    path: Path
    texts: list[list[int]]


@pytest.fixture(scope="module")
def trained(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Herd's source, the last of it kept back; the model is in f32."""
    source = "".join(path.read_text() for path in sorted((repository / "src").rglob("*.py")))
    words = tokenizer.train([source], SHAPE.vocab_size)
    assert words.bos_id is not None
    piece = SHAPE.context_length - 1
    ids = np.array(words.encode(source))
    ids, kept = ids[: -WINDOWS * piece], ids[-WINDOWS * piece :].reshape(WINDOWS, piece)
    model = Llama(SHAPE)
    model.init_weights(0)
    with torch.no_grad():
        for block in model.layers:
            # Attention that looks at places from the start: in so few steps it would hardly learn to look at any.
            block.attention.wq.weight.mul_(4)
            block.attention.wk.weight.mul_(4)
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", lr=3e-3, muon_lr=7e-3))
    starts = np.random.default_rng(0).integers(0, len(ids) - LENGTH, (STEPS, ROWS, 1))
    for step, rows in enumerate(torch.from_numpy(ids[starts + np.arange(LENGTH + 1)])):
        optimizer.set_lr(1 - step / STEPS)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("llamacpp") / "trained.gguf"
    checkpoint.save(path, SHAPE, state_arrays(model), format="gguf", dtype="f32", tokenizer=words)
    return Trained(path, [[words.bos_id, *text] for text in kept.tolist()])


@contextmanager
def opened_by_llamacpp(path: Path) -> Iterator[Any]:
    """llama.cpp with logits for every token and a cache in float32."""
    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=SHAPE.context_length,
        n_batch=SHAPE.context_length,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        type_k=f32,
        type_v=f32,
        verbose=False,
    )
    try:
        yield llama
    finally:
        llama.close()


def logprobs_in_llamacpp(path: Path, texts: list[list[int]]) -> np.ndarray:
    """Of every token but the first, as `LLM.score` gives them: [texts, tokens]."""
    rows = []
    with opened_by_llamacpp(path) as llama:
        for text in texts:
            llama.reset()
            llama.eval(text)
            logits = torch.from_numpy(llama.scores[: len(text) - 1]).double()
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0].numpy())
    return np.stack(rows)


def logprobs_in_herd(path: Path, texts: list[list[int]]) -> np.ndarray:
    with LLM(path, kv="f32", threads=1, backend="native") as llm:
        return np.stack([score.logprobs for score in llm.score(texts)])


def quantised_by_llamacpp(source: Path, target: Path, dtype: str) -> Path:
    """llama.cpp's name for a format is Herd's in capitals."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = (
        llama_cpp.LLAMA_FTYPE_ALL_F32 if dtype == "f32" else getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{dtype.upper()}")
    )
    how.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), how) == 0
    return target


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("writer", ["herd", "llama.cpp"])
def test_both_read_what_either_writes(writer: str, dtype: str, trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if writer == "herd":
        checkpoint.convert(trained.path, path, to="gguf", dtype=dtype)
    else:
        quantised_by_llamacpp(trained.path, path, dtype)
    found, expected = logprobs_in_herd(path, trained.texts), logprobs_in_llamacpp(path, trained.texts)
    ours, theirs = np.exp(-found.mean()), np.exp(-expected.mean())
    assert theirs < SHAPE.vocab_size / 5, "the model has learnt nothing, and its perplexity says nothing"
    assert abs(ours / theirs - 1) <= PERPLEXITY, f"Herd {ours:.4f}, llama.cpp {theirs:.4f}"
    assert np.abs(found - expected).mean() <= DRIFT.get(dtype, BLOCK_DRIFT)


@pytest.mark.parametrize("text", TEXTS)
def test_both_read_the_same_vocabulary(text: str, trained: Trained) -> None:
    """Text is text on both sides, whatever control tokens it spells."""
    words = tokenizer.load(trained.path)
    with opened_by_llamacpp(trained.path) as llama:
        found = llama.tokenize(text.encode(), add_bos=True, special=False)
    assert found == [words.bos_id, *words.encode(text)]
