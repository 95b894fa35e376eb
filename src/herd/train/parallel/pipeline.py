"""Pipeline parallelism: ranks hold some of the layers each, and micro-batches go from one to the next.

The model's layers, embedding and output are cut into pp · virtual chunks (`herd.train.plan.layout.stages`); the first
and the last chunk have one layer less, since the embedding and the output count as one (Llama 3 paper, section 3.3.2).
PyTorch runs the schedule. Tied embeddings: the last chunk has a copy of the embedding, and after every step's backward
passes the two gradients are added on both sides, so that the copies stay equal bit by bit.
Letters: B rows of a micro-batch, S a row's tokens, P a rank's part of them, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from herd.model.llama import Llama
from herd.train.batches import Batch
from herd.train.losses import chunked_cross_entropy
from herd.train.parallel.config import ParallelConfig
from herd.train.parallel.gradients import local_gradient
from herd.train.parallel.schedules import build_schedule, chunks_of_rank
from herd.train.plan.layout import stages


class Elsewhere(nn.Module):
    """Stands for a part of the model that another rank has."""


class Chunk(nn.Module):
    """Consecutive layers of a model, with the embedding if they are the first and the output if they are the last.

    The modules are those of the model, under the same names.
    """

    def __init__(self, model: Llama, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config = model.config
        self.sequence, self.places_of = model.sequence, model.places
        self.embed = model.embed if first else Elsewhere()
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.norm = model.norm if last else Elsewhere()
        self.output = model.output if last else Elsewhere()
        self.first, self.last = first, last

    def forward(self, x: Tensor, document_ids_BS: Tensor, targets_BP: Tensor, weights_BP: Tensor) -> Tensor:
        """States [B, P, D] for the next chunk, from tokens [B, S] or from states; of the last one, the loss summed."""
        places = self.places_of(document_ids_BS, document_ids_BS)
        if self.sequence is not None:
            places = self.sequence.places(places)
            x = self.sequence.mine(x) if self.first else x
        if self.first:
            x = self.embed(x)
        for block in self.layers.values():
            x = block(x, places)
        if not self.last:
            return x
        x_TD, targets_T, weights_T = self.norm(x).flatten(0, 1), targets_BP.flatten(), weights_BP.flatten()
        return chunked_cross_entropy(x_TD, cast(Tensor, self.output.weight), targets_T, weights_T)


class Pipeline:
    """This rank's chunks of a model, and the schedule they run in."""

    def __init__(self, model: Llama, config: ParallelConfig, mesh: DeviceMesh) -> None:
        self._config, self._mesh = config, mesh
        self._rank, self._size = mesh.get_local_rank(), mesh.size()
        self._split_output(model)
        self.model = model
        parts = [
            stages(model.config.n_layers, self._size, config.virtual)[i % self._size][i // self._size]
            for i in range(self._size * config.virtual)
        ]
        self.count = len(parts)
        of_rank = chunks_of_rank(config, self._size)
        self._ranks = {chunk: rank for rank, chunks in enumerate(of_rank) for chunk in chunks}
        self._layers = {i: parts[i] for i in of_rank[self._rank]}
        here = {layer for layers in self._layers.values() for layer in layers}
        for i in range(len(model.layers)):
            if i not in here:
                model.layers[i] = Elsewhere()
        self.has_first, self.has_last = 0 in self._layers, self.count - 1 in self._layers
        if not self.has_first:
            model.embed = cast(Any, Elsewhere())
        if not self.has_last:
            model.norm, model.output = cast(Any, Elsewhere()), cast(Any, Elsewhere())
        self.chunks: dict[int, Chunk] = {}
        self._schedules: dict[tuple[int, tuple[int, ...]], Any] = {}
        self._autocast: Callable[[], Any]

    def build(self, autocast: Callable[[], Any]) -> list[Chunk]:
        """Make the chunks, once the layers are as they are to be (split by tensor parallelism, say)."""
        self._autocast = autocast
        self.chunks = {
            i: Chunk(self.model, layers, first=i == 0, last=i == self.count - 1) for i, layers in self._layers.items()
        }
        return list(self.chunks.values())

    @property
    def tied(self) -> frozenset[nn.Parameter]:
        """Parameters that another chunk has a copy of."""
        if not self.model.config.tied_embeddings:
            return frozenset()
        return frozenset(copy for copy in self._copies() if copy is not None)

    def train(self, batches: Sequence[Batch]) -> Tensor:
        """(sum of losses, sum of weights, tokens) of all micro-batches, fp64, 0 on ranks without the last chunk;
        gradients are added to."""
        whole = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        schedule = self._schedule(len(batches), batches[0])
        losses: list[Tensor] = []
        arguments = [whole.tokens_BS] if self.has_first else []
        with self._autocast():
            schedule.step(
                *arguments,
                document_ids_BS=whole.document_ids_BS,
                targets_BP=whole.targets_BS,
                weights_BP=whole.weights_BS,
                target=whole.targets_BS if self.has_last else None,
                losses=losses if self.has_last else None,
                return_outputs=False,
            )
        return self._sums(torch.stack(losses).detach().sum() if losses else None, whole)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The same of one batch, without gradients: it goes through one chunk after the other."""
        group, loss, handed_over = self._mesh.get_group(), None, None
        with self._autocast():
            for index, chunk in sorted(self.chunks.items()):
                if index == 0:
                    x = batch.tokens_BS
                elif handed_over is not None:  # the chunk before is on this rank, too
                    x = handed_over
                else:
                    x = self._states(batch)
                    dist.recv(x, group=group, group_src=self._ranks[index - 1])
                x = chunk(x, batch.document_ids_BS, batch.targets_BS, batch.weights_BS)
                handed_over = None
                if chunk.last:
                    loss = x
                elif self._ranks[index + 1] == self._rank:
                    handed_over = x
                else:
                    dist.send(x.contiguous(), group=group, group_dst=self._ranks[index + 1])
        return self._sums(loss, batch)

    def _sums(self, loss: Tensor | None, batch: Batch) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64, device=batch.tokens_BS.device)
        if loss is not None:
            sums[0], sums[1], sums[2] = loss.double(), batch.weights_BS.double().sum(), batch.n_tokens
        return sums

    def _states(self, batch: Batch) -> Tensor:
        """What travels between chunks for a micro-batch, without its numbers."""
        rows, width = batch.targets_BS.shape
        width //= self._config.tp
        return torch.empty(rows, width, self.model.config.dim, device=batch.tokens_BS.device)

    def add_tied(self) -> None:
        """Add up the gradients of the embedding and its copy."""
        if not self.tied or not (self.has_first or self.has_last):
            return
        embed, output = (None if copy is None else local_gradient(copy) for copy in self._copies())
        if embed is not None and output is not None:
            embed.add_(output)
            output.copy_(embed)
            return
        mine = embed if embed is not None else output
        assert mine is not None
        other, theirs = self._size - 1 if self.has_first else 0, torch.empty_like(mine)
        group = self._mesh.get_group()
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine.contiguous(), group=group, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
            ]
        ):
            work.wait()
        mine.add_(theirs)

    def _copies(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The embedding and the output, where this rank has them."""
        weights = (
            cast(nn.Parameter, self.model.embed.weight) if self.has_first else None,
            cast(nn.Parameter, self.model.output.weight) if self.has_last else None,
        )
        return weights

    def _schedule(self, micro_batches: int, batch: Batch) -> Any:
        key = (micro_batches, tuple(batch.tokens_BS.shape))
        if key not in self._schedules:
            device = batch.tokens_BS.device
            states = self._states(batch).requires_grad_()
            scalar = torch.empty((), device=device, requires_grad=True)
            parts = [
                PipelineStage(
                    chunk,
                    index,
                    self.count,
                    device,
                    input_args=batch.tokens_BS if chunk.first else states,
                    output_args=scalar if chunk.last else states,
                    group=self._mesh.get_group(),
                )
                for index, chunk in self.chunks.items()
            ]
            self._schedules[key] = build_schedule(self._config, parts, micro_batches)
        return self._schedules[key]

    @staticmethod
    def _split_output(model: Llama) -> None:
        """Give a tied model an output of its own, with the embedding's numbers."""
        if model.config.tied_embeddings:
            vocabulary, width = model.embed.weight.shape
            model.output = nn.Linear(width, vocabulary, bias=False, device="meta")
            model.output.weight = nn.Parameter(model.embed.weight.detach().clone())
