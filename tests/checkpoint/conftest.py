"""Small models, one for every generation of Llama, as data: config and random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from herd import FileFormatError
from herd.architecture import AttentionTemperature, LlamaConfig, MoeConfig, RopeScaling, tensor_shapes
from herd.checkpoint import open_checkpoint, save
from herd.cli import main

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

_BASE = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=96, generation="llama3"
)
_SCALED = replace(_BASE, context_length=131_072, generation="llama3.1", rope_scaling=RopeScaling("llama3", 8.0))
_FOUR = replace(
    _BASE,
    n_layers=4,
    generation="llama4",
    context_length=262_144,
    moe=MoeConfig(n_experts=4, ffn_dim=48),
    nope_interval=4,
    attention_chunk=8192,
    qk_norm=True,
    attention_temperature=AttentionTemperature(),
    rope_scaling=RopeScaling("llama3", 16.0, 1.0, 1.0),
)
CONFIGS = {
    "llama1": replace(_BASE, n_kv_heads=4, norm_eps=1e-6, rope_theta=1e4, context_length=2048, generation="llama1"),
    "llama2": replace(_BASE, rope_theta=1e4, context_length=4096, generation="llama2"),
    "codellama": replace(_BASE, rope_theta=1e6, context_length=16_384, generation="codellama"),
    "llama3": _BASE,
    "llama3.1": _SCALED,
    "llama3.2": replace(_SCALED, tied_embeddings=True, generation="llama3.2", rope_scaling=RopeScaling("llama3", 32.0)),
    "llama3.3": replace(_SCALED, generation="llama3.3"),
    "llama4-scout": _FOUR,
    "llama4-maverick": replace(
        _FOUR, moe=MoeConfig(n_experts=8, ffn_dim=48, interleave=2), qk_norm=False, rope_scaling=None
    ),
    "llama4-odd": replace(
        _FOUR, moe=MoeConfig(4, 160, top_k=2), nope_interval=3, attention_chunk=16, attention_temperature=None
    ),
    "llama4-dense": replace(_FOUR, moe=None, nope_interval=0, attention_chunk=None, attention_temperature=None),
}


@pytest.fixture
def small() -> Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]:
    """small(row, dtype="bf16") → config and weights of a small model of that generation."""

    def make(row: str, dtype: str = "bf16") -> tuple[LlamaConfig, dict[str, np.ndarray]]:
        config, random = CONFIGS[row], np.random.default_rng(7)
        weights = {
            name: (random.standard_normal(shape) * 0.05 + ("norm" in name)).astype(DTYPES[dtype])
            for name, shape in tensor_shapes(config).items()
        }
        return config, weights

    return make


@pytest.fixture
def same_bits() -> Callable[[np.ndarray, np.ndarray], bool]:
    """same_bits(a, b): equal type, shape and every bit."""

    def check(a: np.ndarray, b: np.ndarray) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return check


@pytest.fixture
def refused() -> Callable[..., FileFormatError]:
    """refused(path, match, file=…, field=…, offset=…): opening and reading fails with an error about that place."""

    def check(path: Path, match: str, *, file: str, field: str | None = None, offset: bool = False) -> FileFormatError:
        with pytest.raises(FileFormatError, match=match) as caught, open_checkpoint(path) as checkpoint:
            for name in checkpoint:
                checkpoint[name]
        error = caught.value
        assert error.file is not None and Path(error.file).name == file
        if field is not None:
            assert error.field == field
        assert not offset or isinstance(error.offset, int)
        return error

    return check


@pytest.fixture
def hf(tmp_path: Path, small: Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]) -> Path:
    """A small Hugging Face directory."""
    config, weights = small("llama3")
    return save(tmp_path / "hf", config, weights)


@pytest.fixture
def herd_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """herd_command("convert", …) → exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = caught.value.code
        return code if isinstance(code, int) else 0, captured.out, captured.err

    return run
