"""The experts' products in one call (`torch.nn.functional.grouped_mm`) beside the loop over experts."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from herd.architecture import MoeConfig  # noqa: E402
from herd.model import moe  # noqa: E402

COUNTS = [[3, 0, 7, 0, 6, 0], [0, 0, 16, 0, 0, 0], [1, 2, 3, 4, 5, 1], [0, 0, 0, 0, 0, 0]]
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="needs grouped_mm")
    ),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)),
            reason="needs a CUDA GPU of compute capability 8",
        ),
    ),
]  # fmt: skip


def run(experts: Any, counts: list[int], device: str) -> list[Any]:
    """Output of SwiGLU experts, and the gradients of the tokens and of all weights."""
    generator = torch.Generator().manual_seed(0)
    x_TD, grad_TD = (torch.randn(sum(counts), 16, generator=generator).bfloat16().to(device) for _ in range(2))
    x_TD.requires_grad_()
    y_TD = experts(x_TD, torch.tensor(counts, device=device))
    return [y_TD, *torch.autograd.grad(y_TD, [x_TD, *experts.parameters()], grad_TD)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_one_call_gives_what_the_loop_gives(counts: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    experts = moe.Experts(16, MoeConfig(n_experts=len(counts), ffn_dim=24))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    experts = experts.to(device, torch.bfloat16)
    taken, takes = [], moe.in_one_call if device == "cuda" else moe.fits_one_call
    monkeypatch.setattr(moe, "in_one_call", lambda *tensors: taken.append(takes(*tensors)) or taken[-1])
    found = run(experts, counts, device)
    assert taken and all(taken) == bool(sum(counts))
    monkeypatch.setattr(moe, "in_one_call", lambda *tensors: False)
    for ours, wanted in zip(found, run(experts, counts, device), strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-2, rtol=2e-2)
    for gradient in found[2:]:
        for expert, count in enumerate(counts):
            assert bool(gradient[expert].any()) == bool(count), expert


def test_what_one_call_takes() -> None:
    def takes(dtype: Any, tokens: int, inner: int, outer: int) -> bool:
        return bool(
            moe.fits_one_call(torch.zeros(tokens, inner, dtype=dtype), torch.zeros(2, outer, inner, dtype=dtype))
        )

    assert takes(torch.bfloat16, 4, 16, 8) == hasattr(torch.nn.functional, "grouped_mm")
    assert not takes(torch.float32, 4, 16, 8) and not takes(torch.bfloat16, 0, 16, 8)
    assert not takes(torch.bfloat16, 4, 12, 8) and not takes(torch.bfloat16, 4, 16, 12)
    assert not moe.in_one_call(*(torch.zeros(8, 8, dtype=torch.bfloat16) for _ in range(2))), "a CPU's loop is faster"


def test_one_call_is_an_operator_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "in_one_call", moe.fits_one_call)
    counts = torch.tensor([3, 0, 2])
    x_TI = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    weight_EOI = torch.randn(3, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(moe.grouped_linear, (x_TI, weight_EOI, counts))
