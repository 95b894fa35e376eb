"""A small random model with its tokenizer, saved as a checkpoint that `herd.LLM` opens."""

from __future__ import annotations

from pathlib import Path

import pytest

TEXTS = ["def double(x):\n    return x * 2\n", "grün und schön ✓ " * 8, "import os\nprint(os.sep)\n" * 20, "a"]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one shape and different random weights."""
    from herd import checkpoint, model, tokenizer
    from herd.architecture import LlamaConfig

    vocabulary = tokenizer.train([*TEXTS, "What is the value of this expression? Question: Answer:"], 320)
    shape = LlamaConfig(
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        ffn_dim=64,
        vocab_size=320,
        context_length=512,
        rope_theta=10_000.0,
    )
    paths = {}
    for seed, name in enumerate(("one", "other")):
        llama = model.Llama(shape)
        llama.init_weights(seed)
        for parameter in llama.parameters():
            parameter.data *= 4.0  # far from uniform, so that a wrong context shows
        paths[name] = tmp_path_factory.mktemp("models") / name
        checkpoint.save(paths[name], shape, model.state_arrays(llama), format="hf", tokenizer=vocabulary)
    return paths
