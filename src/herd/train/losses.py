"""Losses as pure functions of (model, batch): the sum over supervised targets, and how much they weigh together.

Sums, not means: the loop divides by the weight of the whole step, over all micro-batches and ranks. A mean of means
would weigh short answers more than long ones.

B rows, S tokens of a row, D model width, V vocabulary, T targets with a weight, C targets of a chunk,
X targets of a tile.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from herd.train.batches import Batch

CHUNK_LOGITS = 2**22
"""Logits held at a time, 8 MiB in bf16, for vocabularies of up to 4,096. Fewer made the products slower, more brought
nothing."""
TILE_ROWS = 128
"""Rows whose softmax is taken at a time, in fp32."""
GPU_CHUNK_LOGITS = 2**28
MIN_CHUNK_ROWS = 1024
"""For larger ones: 263 MB in bf16 at 128,256 tokens. Every chunk adds its gradient to that of the whole output matrix;
at 32,000 tokens a step of the 60M shape took 1,130 ms with 128 rows at a time, 1,000 ms with 1,024."""


class LanguageModel(Protocol):
    """What the loss needs of a model; `herd.model.Llama` has it."""

    @property
    def output_weight(self) -> Tensor: ...

    def hidden(self, tokens_BS: Tensor, *, document_ids_BS: Tensor | None = None) -> Tensor: ...


def next_token_loss(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of the targets of a batch: (sum of weight · -log p, sum of weights), in nats.

    Only positions with a weight are projected to the vocabulary: with a prompt of three quarters of the tokens the
    head costs a quarter.
    """
    x_BSD = model.hidden(batch.tokens_BS, document_ids_BS=batch.document_ids_BS)
    x_TD, targets_T, weights_T = x_BSD.flatten(0, 1), batch.targets_BS.flatten(), batch.weights_BS.flatten()
    supervised_T = weights_T != 0
    if not supervised_T.all():
        rows_T = supervised_T.nonzero().squeeze(1)
        x_TD, targets_T, weights_T = x_TD[rows_T], targets_T[rows_T], weights_T[rows_T]
    loss = chunked_cross_entropy(x_TD, model.output_weight, targets_T, weights_T)
    return loss, weights_T.sum()


def chunked_cross_entropy(
    x_TD: Tensor, output_VD: Tensor, targets_T: Tensor, weights_T: Tensor, *, chunk_rows: int | None = None
) -> Tensor:
    """Sum over rows of weight · -log softmax(x @ output.T)[target], without ever holding all logits.

    The gradient of a chunk's logits is softmax - onehot, so it is known as soon as the chunk's logits are: both
    products of the backward pass are done at once and the logits are dropped. Memory is one chunk instead of [T, V],
    the arithmetic is the same, and chunks stay in cache. Products run in the autocast type (in the type of `x_TD`
    without autocast), the softmax and the sums in fp32. Not differentiable twice.
    An output matrix that is split by vocabulary over ranks (a DTensor) stays so: all ranks get the loss, and the
    gradient of `x_TD` is then each rank's part of a sum.
    """
    losses_: Any = _losses_
    if hasattr(output_VD, "device_mesh"):
        from herd.train.vocabulary import VocabularyPart  # takes a second to import, which one process need not wait

        split: Any = output_VD
        losses_, output_VD = VocabularyPart(split).losses_, split.to_local()
    rows = chunk_rows or _chunk_rows(output_VD.shape[0], x_TD.is_cuda)
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (x_TD.requires_grad or output_VD.requires_grad):
            loss: Tensor = _ChunkedCrossEntropy.apply(x_TD, output_VD, targets_T, weights_T, rows, dtype, losses_)  # type: ignore[no-untyped-call]
            return loss
        output = output_VD.to(dtype)
        total = torch.zeros((), device=x_TD.device)
        for x_CD, targets_C1, weights_C in _chunks(x_TD.to(dtype), targets_T, weights_T, rows):
            total += torch.dot(losses_(x_CD @ output.T, targets_C1), weights_C)
        return total


def _chunk_rows(vocabulary: int, cuda: bool) -> int:
    logits = GPU_CHUNK_LOGITS if cuda else CHUNK_LOGITS
    return max(MIN_CHUNK_ROWS, logits // vocabulary)


def _chunks(x_TD: Tensor, targets_T: Tensor, weights_T: Tensor, rows: int) -> Any:
    return zip(*(torch.split(rows_T, rows) for rows_T in (x_TD, targets_T.unsqueeze(1), weights_T)), strict=True)


def _losses_(logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """-log p of each target [C], fp32; the logits are replaced by their gradient softmax - onehot.

    A tile of rows is worked on at a time, so that the fp32 numbers stay in the cache. The softmax is needed anyway, and
    its largest entry gives the normaliser without another pass of exponentials: log sum exp(z) = max z - log max p.
    """
    tile = logits_CV.shape[0] if logits_CV.is_cuda else TILE_ROWS
    losses = []
    for tile_XV, targets_X1 in zip(torch.split(logits_CV, tile), torch.split(targets_C1, tile), strict=True):
        z_XV = tile_XV.float()  # the tile itself if it is fp32
        highest_X1, own_X1 = z_XV.amax(1, keepdim=True), z_XV.gather(1, targets_X1)
        torch.softmax(z_XV, 1, out=z_XV)
        losses.append(highest_X1 - z_XV.amax(1, keepdim=True).log() - own_X1)
        z_XV.scatter_add_(1, targets_X1, torch.full_like(own_X1, -1.0))
        tile_XV.copy_(z_XV)
    return torch.cat(losses).squeeze(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and, in the same pass over the chunks, its gradients for x and the output matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        output_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        rows: int,
        dtype: torch.dtype,
        losses_: Any,
    ) -> Tensor:
        output = output_VD.to(dtype)
        dx_TD = torch.empty_like(x_TD)
        doutput_VD: Tensor | None = None
        total = torch.zeros((), device=x_TD.device)
        chunks = _chunks(x_TD.to(dtype), targets_T, weights_T, rows)
        for (x_CD, targets_C1, weights_C), dx_CD in zip(chunks, torch.split(dx_TD, rows), strict=True):
            dlogits_CV = x_CD @ output.T
            total += torch.dot(losses_(dlogits_CV, targets_C1), weights_C)
            # Weights scale the D columns of both products instead of the V columns of the logits.
            dx_CD.copy_(dlogits_CV @ output).mul_(weights_C.unsqueeze(1))
            gradient_VD = dlogits_CV.T @ (x_CD * weights_C.unsqueeze(1)).to(dtype)
            doutput_VD = gradient_VD.to(output_VD.dtype) if doutput_VD is None else doutput_VD.add_(gradient_VD)
        ctx.save_for_backward(dx_TD, doutput_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, doutput_VD = ctx.saved_tensors
        if not dloss.is_cuda and dloss.item() == 1:  # the usual case: spare a pass over the largest gradient
            return dx_TD, doutput_VD, None, None, None, None, None
        return dx_TD * dloss, doutput_VD * dloss, None, None, None, None, None
