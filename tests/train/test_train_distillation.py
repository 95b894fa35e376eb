"""Distillation: loss and gradients against plain PyTorch, and what a student and its teacher learn from each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from herd.architecture import LlamaConfig
from herd.errors import UsageError
from herd.model import Llama
from herd.train.batches import Batch
from herd.train.distillation import Distillation, distillation_loss
from herd.train.losses import next_token_loss
from herd.train.parallel.config import ParallelConfig

SHAPE = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=50, context_length=32
)


def model(seed: int, **changes: Any) -> Llama:
    made = Llama(dataclasses.replace(SHAPE, **changes))
    made.init_weights(seed)
    with torch.no_grad():
        made.embed.weight.mul_(20)
        made.output.weight.mul_(20)
    return made


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (3, 17), generator=generator)
    weights = (torch.rand(3, 16, generator=generator) > 0.3).float() * torch.rand(3, 16, generator=generator)
    documents = (torch.arange(16) // 6).expand(3, 16).int().contiguous()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, weights)


def expected(student: Llama, teachers: list[Llama], given: Batch, weight: float) -> Tensor:
    """The definition, row by row, in float64."""
    log_s = functional.log_softmax(student(given.tokens_BS, document_ids_BS=given.document_ids_BS).double(), -1)
    text = functional.nll_loss(log_s.flatten(0, 1), given.targets_BS.flatten(), reduction="none")
    taught = torch.zeros_like(text)
    for teacher in teachers:
        with torch.no_grad():
            t = teacher(given.tokens_BS, document_ids_BS=given.document_ids_BS).double().softmax(-1)
        taught = taught + functional.kl_div(log_s, t, reduction="none").sum(-1).flatten() / len(teachers)
    return (given.weights_BS.flatten() * ((1 - weight) * text + weight * taught)).sum()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seeds", [[7], [7, 8]])
def test_loss_and_gradients_are_those_of_the_definition(seeds: list[int], weight: float) -> None:
    student, teachers = model(1), [model(seed, n_layers=1 + seed % 2, dim=24, head_dim=6) for seed in seeds]
    given = batch()
    loss, total = Distillation(teachers, weight, 50)(student, given)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    wanted = expected(student, teachers, given, weight)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert total.item() == pytest.approx(given.weights_BS.sum().item(), rel=1e-6)
    assert wanted.item() / total.item() > 0.5, "there is something to learn"
    for name, parameter in student.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-4 * parameter.grad.abs().max().item()), name
    assert all(p.grad is None and not p.requires_grad for teacher in teachers for p in teacher.parameters())


@pytest.mark.parametrize("rows", [1, 5, 16, 100])
def test_chunks_change_nothing(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(16, 8, generator=generator) for _ in range(2))
    w_s, w_t = (torch.randn(30, 8, generator=generator) for _ in range(2))
    targets, weights = torch.randint(0, 30, (16,), generator=generator), torch.rand(16, generator=generator)

    def run(chunk_rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = x.clone().requires_grad_(), w_s.clone().requires_grad_()
        loss = distillation_loss(*inputs, [(t, w_t)], targets, weights, 0.4, chunk_rows=chunk_rows)
        (3 * loss).backward()
        return loss.detach(), inputs[0].grad, inputs[1].grad

    for one, other in zip(run(rows), run(1000), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_bf16_products_come_close() -> None:
    student, teacher, given = model(1), model(7), batch()
    exact = expected(student, [teacher], given, 0.5).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = Distillation([teacher], 0.5, 50)(student, given)
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(exact, rel=0.02)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = model(3)
    loss, _ = Distillation([model(3)], 1.0, 50)(student, batch())
    loss.backward()
    assert abs(loss.item()) < 1e-5 and max(p.grad.abs().max().item() for p in student.parameters()) < 1e-5


def test_a_student_comes_closer_to_its_teacher_step_by_step() -> None:
    student, teacher = model(1), model(7)
    loss_of, optimiser = Distillation([teacher], 1.0, 50), torch.optim.AdamW(student.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss, total = loss_of(student, batch(step % 3))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item() / total.item())
    assert losses[-1] < losses[0] / 2


def test_held_out_figures_are_of_the_text_alone() -> None:
    student, given = model(1).eval(), batch()
    with torch.no_grad():
        assert Distillation([model(7)], 0.5, 50)(student, given)[0] == next_token_loss(student, given)[0]


def test_teachers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="another vocabulary than the student; got 40 tokens; allowed: 50"):
        Distillation([model(1), model(2, vocab_size=40)], 0.5, 50)
    with pytest.raises(UsageError, match="whole rows and layers; got tp 2"):
        Distillation([model(1)], 0.5, 50, ParallelConfig(tp=2))
    Distillation([model(1)], 0.5, 50, ParallelConfig(shard=True))
