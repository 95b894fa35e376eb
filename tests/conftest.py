"""Fixtures for every room: where the real vocabularies and texts lie, tiny models, and a quiet torch."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Time limits of single examples measure what else the machine does; the whole suite has its own.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts us in the background has Ctrl-C ignored, and so would every child whose Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path(dataclasses.__file__).read_text() + "äöü é ß — ‘quoted’ “text” … 日本語 emoji 🦙 and 👩‍💻 " * 40
MakeModel = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow or peer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    for item in items:
        for marker in ("slow", "peer"):
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"marked {marker}: run with `make test-all`"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real vocabularies and texts beside the project; they are not ours to distribute."""
    folder = Path(os.environ.get("HERD_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data is not at {folder} (set HERD_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Save a Llama of some 60,000 parameters with weights wide enough that its choices vary with the context.

    `talkative`: under greedy decoding it never ends by itself, since the rows of its stop tokens are zero.
    """
    from herd import checkpoint, tokenizer
    from herd.architecture import LlamaConfig, tensor_shapes

    byte_level = tokenizer.train([TEXT], 600)

    def make(
        *, seed: int = 0, talkative: bool = False, small: tokenizer.Tokenizer = byte_level, **changes: object
    ) -> Path:
        shape = LlamaConfig(
            dim=48,
            n_layers=2,
            n_heads=6,
            n_kv_heads=2,
            head_dim=8,
            ffn_dim=96,
            vocab_size=small.vocab_size,
            rope_theta=10_000.0,
            context_length=192,
        )
        config = dataclasses.replace(shape, **changes)
        rng = np.random.default_rng(seed)
        tensors = {}
        for name, dims in tensor_shapes(config).items():
            wide = len(dims) > 1
            values = rng.normal(0.0, 1.5 / math.sqrt(dims[-1]), dims) if wide else np.ones(dims)
            tensors[name] = values.astype(np.float32)
        if talkative:
            tensors["output.weight"][sorted(small.stop_ids)] = 0.0
        path = tmp_path_factory.mktemp("models") / "model"
        checkpoint.save(path, config, tensors, format="hf", dtype="f32", tokenizer=small)
        return path

    return make
