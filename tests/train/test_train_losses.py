"""The chunked cross entropy against torch's own, and what it is for: few rows, little memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from herd.architecture import LlamaConfig
from herd.model import Llama
from herd.train import Batch, chunked_cross_entropy, losses, next_token_loss

T, D, V = 300, 24, 131


def _tensors(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(T, D, generator=g) * scale).requires_grad_()
    w = (torch.randn(V, D, generator=g) * 0.3).requires_grad_()
    return x, w, torch.randint(V, (T,), generator=g), torch.rand(T, generator=g) * 2


def _plain(x: Tensor, w: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (functional.cross_entropy(x @ w.T, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("rows", [1, 7, 128, 300, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(rows: int) -> None:
    x, w, targets, weights = _tensors()
    expected = _plain(x, w, targets, weights)
    (expected * 3).backward()
    dx, dw = x.grad, w.grad
    x.grad = w.grad = None
    loss = chunked_cross_entropy(x, w, targets, weights, chunk_rows=rows)
    (loss * 3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, dx, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w.grad, dw, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(x, w, targets, weights, chunk_rows=rows), expected)


def test_extreme_logits_stay_finite_and_exact() -> None:
    x, w, targets, weights = _tensors(scale=400.0)
    loss = chunked_cross_entropy(x, w, targets, weights)
    loss.backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    expected = _plain(x.double(), w.double(), targets, weights.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("vocabulary", "megabytes"), [(4096, 9), (32_000, 66), (128_256, 263)])
def test_a_chunk_of_logits_has_a_bound_and_enough_rows(vocabulary: int, megabytes: int) -> None:
    rows = losses._chunk_rows(vocabulary, cuda=False)
    assert rows >= 1024 and rows * vocabulary * 2 <= megabytes * 10**6


def test_bf16_products_stay_near_fp32() -> None:
    x, w, targets, weights = _tensors()
    _plain(x, w, targets, weights).backward()
    dx, dw = x.grad, w.grad
    assert dx is not None and dw is not None
    x.grad = w.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(x, w, targets, weights, chunk_rows=64)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32 and (x.grad - dx).norm() < 0.01 * dx.norm()
    assert w.grad is not None and w.grad.dtype == torch.float32 and (w.grad - dw).norm() < 0.01 * dw.norm()
    torch.testing.assert_close(loss, _plain(x, w, targets, weights), rtol=2e-3, atol=0)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor and the rows of the products made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.rows = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
            if "mm" in str(func) and out.ndim == 2 and out.shape[1] == V:
                self.rows += out.shape[0]
        return out


def test_logits_are_never_held_whole() -> None:
    x, w, targets, weights = _tensors()
    with _Largest() as seen:
        chunked_cross_entropy(x, w, targets, weights, chunk_rows=50).backward()
    assert seen.numel == max(50 * V, T * D, V * D)
    with _Largest() as whole:
        _plain(x, w, targets, weights).backward()
    assert whole.numel == T * V


def _batch(share: float, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (3, 21), generator=g)
    weights = (torch.rand(3, 20, generator=g) < share).float()
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(3, 20, dtype=torch.int32), weights)


def _llama(tied: bool = False) -> Llama:
    config = LlamaConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=V, tied_embeddings=tied
    )
    model = Llama(config)
    model.init_weights(1)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_next_token_loss_equals_full_logits(tied: bool) -> None:
    model, batch = _llama(tied), _batch(0.4)
    loss, weight = next_token_loss(model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(batch.tokens_BS, document_ids_BS=batch.document_ids_BS).flatten(0, 1)
    losses = functional.cross_entropy(logits, batch.targets_BS.flatten(), reduction="none")
    expected = (losses * batch.weights_BS.flatten()).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert weight.item() == batch.weights_BS.sum().item()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_only_supervised_rows_are_projected() -> None:
    model, batch = _llama(), _batch(0.25)
    with _Largest() as seen:
        next_token_loss(model, batch)
    assert seen.rows == int(batch.weights_BS.sum())


def test_nothing_supervised_is_no_loss() -> None:
    loss, weight = next_token_loss(_llama(), _batch(0.0))
    loss.backward()
    assert loss.item() == 0 and weight.item() == 0
