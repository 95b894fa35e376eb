"""Distillation from logits: the loss on the text and the divergence from teachers' next-token distributions, mixed.

    loss = (1 - w) · -log s(target) + w · mean over teachers t of KL(t ‖ s),   KL(t ‖ s) = Σ_v t_v (log t_v - log s_v)

at temperature 1, s being the student's softmax. Llama 3.2's card says that logits of 3.1 8B and 70B were used "as
token-level targets"; how they and the two losses were weighed is not published, so w = 1/2 and the plain mean are
choices of this project.

T targets with a weight, C targets of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from herd.checkpoint import open_checkpoint
from herd.config import Config
from herd.errors import UsageError
from herd.model import Llama
from herd.train.batches import Batch
from herd.train.filling import fill, stored
from herd.train.losses import CHUNK_LOGITS, GPU_CHUNK_LOGITS, MIN_CHUNK_ROWS, LanguageModel, next_token_loss
from herd.train.parallel.config import ParallelConfig
from herd.train.world import World

_Rows = tuple[Tensor, Tensor]
"""States [T, D] and the output matrix [V, D] that turns them into logits."""


class DistilConfig(Config):
    """Teachers, and how much of the loss is theirs."""

    teachers: tuple[str, ...] = Field(
        min_length=1,
        max_length=8,
        description="checkpoints or runs with the same vocabulary; their divergences are averaged",
    )
    weight: float = Field(
        default=0.5, ge=0, le=1, description="share of the divergence in the loss; the rest is the loss on the text"
    )


def load_teacher(path: Path, world: World, device: torch.device, precision: torch.dtype) -> Llama:
    """A checkpoint's model in the precision it is stored in; of sharded weights a rank holds its part.

    Raises HerdError for a checkpoint that is no whole Llama.
    """
    with open_checkpoint(path) as opened:
        weights = stored(opened)
        with torch.device("meta"):
            shapes = Llama(opened.config).to(weights("embed.weight").dtype)
        teacher = world.place_asked(shapes, device, precision)
        fill(teacher, weights)
    return teacher


class Distillation:
    """The loss as a function of (model, batch), for `herd.train.Trainer`: sum over targets, and their weight, in nats.

    A model that is being evaluated gets the loss on the text alone, so that held-out figures mean what they always
    mean. Teachers see the same whole rows; raises UsageError for one with another vocabulary and for a layout that
    splits rows or layers.
    """

    def __init__(
        self, teachers: Sequence[Llama], weight: float, vocab_size: int, parallel: ParallelConfig | None = None
    ) -> None:
        for teacher in teachers:
            if teacher.config.vocab_size != vocab_size:
                raise UsageError(
                    "a teacher has another vocabulary than the student",
                    value=f"{teacher.config.vocab_size:,} tokens",
                    allowed=f"{vocab_size:,}",
                )
            teacher.eval().requires_grad_(False)
        if parallel is not None and max(parallel.tp, parallel.cp, parallel.pp) > 1:
            raise UsageError(
                "teachers need whole rows and layers",
                value=f"tp {parallel.tp} · cp {parallel.cp} · pp {parallel.pp}",
                allowed="tp, cp and pp of 1; shard splits weights, the teachers' too",
            )
        self._teachers, self._weight = list(teachers), weight

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        if not model.training:
            return next_token_loss(model, batch)
        weights_T = batch.weights_BS.flatten()
        rows_T = (weights_T != 0).nonzero().squeeze(1)
        targets_T, weights_T = batch.targets_BS.flatten()[rows_T], weights_T[rows_T]

        def states(of: LanguageModel) -> _Rows:
            x_BSD = of.hidden(batch.tokens_BS, document_ids_BS=batch.document_ids_BS)
            return x_BSD.flatten(0, 1)[rows_T], of.output_weight

        with torch.no_grad():
            taught = [states(teacher) for teacher in self._teachers]
        x_TD, output_VD = states(model)
        loss = distillation_loss(x_TD, output_VD, taught, targets_T, weights_T, self._weight)
        for teacher in self._teachers:
            _let_go(teacher)
        return loss, weights_T.sum()


def _let_go(teacher: Llama) -> None:
    """Keep a rank's part of the embedding and the output alone: what was gathered of them, no backward pass lets go."""
    reshard = getattr(teacher, "reshard", None)  # of FSDP
    if reshard is not None:
        reshard()


def distillation_loss(
    x_TD: Tensor,
    output_VD: Tensor,
    teachers: Sequence[_Rows],
    targets_T: Tensor,
    weights_T: Tensor,
    weight: float,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over rows of weight of the row · the loss above; logits are held for one chunk of rows at a time.

    Products run in the autocast type, softmaxes and sums in fp32. Not differentiable twice.
    """
    device = x_TD.device.type
    limit = GPU_CHUNK_LOGITS if x_TD.is_cuda else CHUNK_LOGITS
    rows = chunk_rows or max(MIN_CHUNK_ROWS, limit // output_VD.shape[0])
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    with torch.autocast(device, enabled=False):
        flat = [tensor for pair in teachers for tensor in pair]
        loss: Tensor = _Distillation.apply(x_TD, output_VD, targets_T, weights_T, weight, rows, dtype, *flat)  # type: ignore[no-untyped-call]
        return loss


class _Distillation(torch.autograd.Function):
    """Loss and, in the same pass over the chunks, its gradients for x and the output matrix.

    For the student's logits the gradient is s - q, where q = (1 - w) · onehot + w · (mean of the teachers).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        output_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        weight: float,
        rows: int,
        dtype: torch.dtype,
        *flat: Tensor,
    ) -> Tensor:
        output = output_VD.to(dtype)
        teachers = [(x.to(dtype), matrix.to(dtype)) for x, matrix in zip(flat[::2], flat[1::2], strict=True)]
        dx_TD, doutput_VD = torch.empty_like(x_TD), torch.zeros_like(output_VD)
        total = torch.zeros((), device=x_TD.device)
        for start in range(0, len(targets_T), rows):
            chunk = slice(start, start + rows)
            x_CD, weights_C1 = x_TD[chunk].to(dtype), weights_T[chunk].unsqueeze(1)
            q_CV = torch.zeros(len(x_CD), len(output), device=x_TD.device)
            entropy_C = torch.zeros(len(x_CD), device=x_TD.device)  # mean of Σ t log t
            for states, matrix in teachers:
                log_t_CV = torch.log_softmax((states[chunk] @ matrix.T).float(), 1)
                t_CV = log_t_CV.exp()
                entropy_C += (t_CV * log_t_CV).sum(1) / len(teachers)
                q_CV += t_CV * (weight / len(teachers))
            q_CV.scatter_add_(1, targets_T[chunk].unsqueeze(1), torch.full_like(weights_C1, 1 - weight))
            log_s_CV = torch.log_softmax((x_CD @ output.T).float(), 1)
            losses_C = weight * entropy_C - (q_CV * log_s_CV).sum(1)
            total += torch.dot(losses_C, weights_C1.squeeze(1))
            dlogits_CV = ((log_s_CV.exp() - q_CV) * weights_C1).to(dtype)
            dx_TD[chunk] = (dlogits_CV @ output).to(dx_TD.dtype)
            doutput_VD += (dlogits_CV.T @ x_CD).to(doutput_VD.dtype)
        ctx.save_for_backward(dx_TD, doutput_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, doutput_VD = ctx.saved_tensors
        return dx_TD * dloss, doutput_VD * dloss, *[None] * len(ctx.needs_input_grad[2:])
