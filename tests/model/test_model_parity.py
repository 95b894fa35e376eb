"""The torch model equals transformers on every architecture, and itself however it is run.

The architectures and the comparison are those of benchmarks/parity_table.py, so that the table shows what is tested.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from herd.model import KVCache, from_arrays  # noqa: E402


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "parity_table.py"
    spec = importlib.util.spec_from_file_location("herd_parity_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = _load()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", table.CASES)
def test_logits_and_greedy_tokens_equal_transformers(name):
    config = table.CASES[name]
    row = table.compare(config)
    assert row["spread"] > 1, "logits too small for an absolute difference to mean anything"
    assert row["difference"] <= 1e-4
    assert row["greedy_cached"] == table.STEPS
    # "dynamic" frequencies follow the current length: what the cache holds was turned by earlier ones, in both.
    if config.rope_scaling is None or config.rope_scaling.kind != "dynamic":
        assert row["greedy_full"] == table.STEPS


WHOLE = ("Llama 3.1, llama3 scaling", "Llama 4 Scout, all of it", "Llama 4 Maverick, all of it")


def _model(name):
    config = table.CASES[name]
    return from_arrays(config, table.random_arrays(config, seed=3)).eval()


def _tokens(config, *shape):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_packed_documents_equal_separate_ones(name):
    model = _model(name)
    lengths = [[70, 5, 1, 44], [33, 87]]  # the chunk is 24: documents inside, across and beyond it
    tokens = _tokens(model.config, 2, 120)
    ids = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    packed = model(tokens, document_ids_BS=ids)
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            alone = model(tokens[b : b + 1, start : start + n])
            torch.testing.assert_close(packed[b : b + 1, start : start + n], alone, atol=1e-4, rtol=0)
            start += n


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_ragged_cached_decoding_equals_the_full_forward(name):
    model = _model(name)
    tokens = _tokens(model.config, 3, 60)
    full = model(tokens)
    cache = KVCache(model.config, 3, 60)
    prompts = [30, 7, 19]  # two of three stop inside a chunk that a later step leaves
    logits = model(tokens[:, :30], cache=cache, lengths=prompts)
    for b, n in enumerate(prompts):
        torch.testing.assert_close(logits[b, :n], full[b, :n], atol=1e-4, rtol=0)
    for step in range(30):
        at = [n + step for n in prompts]
        assert cache.lengths == at
        new = torch.stack([tokens[b, n : n + 1] for b, n in enumerate(at)])
        logits = model(new, cache=cache)
        for b, n in enumerate(at):
            torch.testing.assert_close(logits[b, 0], full[b, n], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_full_forward(name):
    model = _model(name)
    tokens = _tokens(model.config, 1, 60)
    cache = KVCache(model.config, 1, 60)
    pieces = [model(piece, cache=cache) for piece in tokens.split([26, 1, 20, 13], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-4, rtol=0)
