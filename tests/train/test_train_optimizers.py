"""AdamW's groups and numbers, Muon against torch's own and against a plain singular value decomposition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from herd.architecture import LlamaConfig, MoeConfig
from herd.model import Llama
from herd.train import Muon, TrainConfig, build_optimizer
from herd.train.optimizers import matrix_dtype, newton_schulz, processor_maker


def _llama(**more: object) -> Llama:
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=64)
    model = Llama(LlamaConfig(**(shape | more)))  # type: ignore[arg-type]
    model.init_weights(0)
    return model


def _with_gradients(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def test_adamw_equals_the_formula_and_decays_matrices_only() -> None:
    model = _llama()
    config = TrainConfig(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    first = {name: np.zeros_like(p) for name, p in before.items()}
    second = {name: np.zeros_like(p) for name, p in before.items()}
    for step in range(1, 4):
        _with_gradients(model)
        optimizer.set_lr(0.5)
        optimizer.step()
        for name, p in model.named_parameters():
            assert p.grad is not None
            g = p.grad.double().numpy()
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            decay = 0.1 if p.ndim >= 2 else 0.0
            update = (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8)
            before[name] = before[name] * (1 - 0.005 * decay) - 0.005 * update
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), before[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = _llama()
    muon, adamw = build_optimizer(model, TrainConfig(optimizer="muon")).parts
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    theirs = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert ours == {name for name in names.values() if name.startswith("layers.") and "norm" not in name}
    assert theirs == set(names.values()) - ours


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_newton_schulz_makes_singular_values_near_one_and_keeps_the_vectors(shape: tuple[int, int]) -> None:
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    # Five rounds lift what is not too small: a thirtieth of the largest singular value here.
    made = newton_schulz(u @ torch.diag(torch.linspace(0.2, 6.0, min(shape))) @ vh)
    inner = u.mT @ made @ vh.mT  # diagonal, if the singular vectors are the same
    values = torch.diagonal(inner, dim1=1, dim2=2)
    assert values.min() > 0.5 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_muon_equals_torchs() -> None:
    g = torch.Generator().manual_seed(3)
    ours = [nn.Parameter(torch.randn(shape, generator=g)) for shape in [(32, 16), (16, 32), (32, 16)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    own = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    peer = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        own.step()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        # Both iterate in bf16 where the machine has it, in another order of operations.
        assert (a - b).abs().max() < 0.02 * 0.2 * 32**0.5 * 0.1


def test_muon_treats_a_stack_of_experts_as_matrices() -> None:
    g = torch.Generator().manual_seed(5)
    stack = nn.Parameter(torch.randn(4, 16, 24, generator=g))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    gradient = torch.randn(4, 16, 24, generator=g)
    stack.grad = gradient
    for p, part in zip(apart, gradient, strict=True):
        p.grad = part.clone()
    Muon([stack], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart]))


def test_experts_of_a_mixture_go_to_muon() -> None:
    model = _llama(moe=MoeConfig(n_experts=2, ffn_dim=32), generation="llama4")
    muon, _ = build_optimizer(model, TrainConfig(optimizer="muon")).parts
    _with_gradients(model)
    muon.step()
    assert sum(p.ndim == 3 for group in muon.param_groups for p in group["params"]) == 6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_travels_by_name(name: str) -> None:
    config = TrainConfig.model_validate({"optimizer": name})
    one, two = _llama(), _llama()
    first, second = build_optimizer(one, config), build_optimizer(two, config)
    for _ in range(2):
        _with_gradients(one)
        first.step()
    two.load_state_dict(one.state_dict())
    state = first.state(one)
    copied = {
        key: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entry.items()}
        for key, entry in state.items()
    }
    second.load_state(two, copied)
    for model, optimizer in ((one, first), (two, second)):
        _with_gradients(model)
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "maker, pairs, tiles, wanted",
    [
        ("AuthenticAMD", True, False, torch.bfloat16),
        ("GenuineIntel", True, False, torch.float32),
        ("GenuineIntel", True, True, torch.bfloat16),
        ("AuthenticAMD", False, False, torch.float32),
        ("", True, False, torch.bfloat16),
    ],
)
def test_products_are_in_the_faster_numbers(
    maker: str, pairs: bool, tiles: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herd.train.optimizers.processor_maker", lambda: maker)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert matrix_dtype(torch.device("cpu")) is wanted


def test_the_processor_says_who_made_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n\nvendor_id\t: other\n")
    assert processor_maker(file) == "AuthenticAMD"
    assert processor_maker(tmp_path / "none") == ""
