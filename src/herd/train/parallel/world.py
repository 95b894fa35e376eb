"""The ranks of a run on a mesh, behind the one interface the loop knows (`herd.train.world.World`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herd.errors import UsageError
from herd.model.llama import Attention, Llama
from herd.model.moe import Experts
from herd.train.parallel.checkpoint import read_parts, write_parts
from herd.train.parallel.config import ParallelConfig
from herd.train.parallel.context import ContextAttention, GatherExchange, SequenceShard
from herd.train.parallel.expert import exchange_tokens, split_experts
from herd.train.parallel.gradients import global_norm
from herd.train.parallel.mesh import Mesh
from herd.train.parallel.pipeline import Pipeline
from herd.train.parallel.ring import RingExchange
from herd.train.parallel.shard import let_go, reduce_now, shard_model
from herd.train.parallel.tensor import split_model
from herd.train.parallel.whole import whole_weights
from herd.train.world import ProcessGroup, autocast, is_shapes


class MeshWorld(ProcessGroup):
    """Ranks that split a model and its batches along the axes of a mesh."""

    splits = True

    def __init__(self, config: ParallelConfig, device_type: str) -> None:
        super().__init__()
        self.config = config
        self.mesh = Mesh.build(config, config.layout(self.size), device_type)
        self.sequence = SequenceShard(self.mesh.cp) if config.cp > 1 else None
        self.pipeline: Pipeline | None = None
        self._sharded: list[nn.Module] = []
        self._tied = False
        self._device = torch.device(device_type)

    @property
    def data_rank(self) -> int:
        return self.mesh.data_rank

    @property
    def data_size(self) -> int:
        return self.mesh.layout.dp

    def place(self, model: nn.Module, device: torch.device, precision: torch.dtype) -> nn.Module:
        """Keep this rank's part of a model that all ranks hold alike, or make room for it."""
        if not isinstance(model, Llama):
            raise UsageError("only a Llama can be split over a mesh", value=type(model).__name__)
        config, mesh, self._device = self.config, self.mesh, device
        if config.pp > 1:
            self.pipeline = Pipeline(model, config, mesh.pp)
            self._tied = model.config.tied_embeddings
        only_shapes = is_shapes(model)
        if not only_shapes:
            model = model.to(device)
        if config.tp > 1:
            split_model(model, mesh.tp, mesh.expert_tp)
        for module in list(model.modules()):
            if isinstance(module, Experts) and config.ep > 1:
                if config.tp == 1:
                    split_experts(module, mesh.expert)
                exchange_tokens(module, mesh.expert)
            if isinstance(module, Attention) and config.cp > 1:
                module.attend = ContextAttention(self._exchange())
        model.sequence = self.sequence
        self._sharded = [model]
        if self.pipeline is not None:
            region = functools.partial(autocast, device, precision, splits=True)
            self._sharded = list(self.pipeline.build(region))
        for part in self._sharded:
            shard_model(part, mesh.shard, mesh.expert_shard, precision, reshard=config.reshard)
        return model.to_empty(device=device) if only_shapes else model

    def place_asked(self, model: Llama, device: torch.device, precision: torch.dtype) -> Llama:
        if self.config.shard:
            shard_model(model, self.mesh.shard, self.mesh.expert_shard, precision, reshard=True)
        return model.to_empty(device=device)

    def let_go(self) -> None:
        let_go(self._sharded)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=self.mesh.data.get_group())

    def sum_shared_(self, tensor: Tensor) -> None:
        total = tensor.to(self._device)
        dist.all_reduce(total, group=self.mesh.rows.get_group())
        tensor.copy_(total)

    def local(self, batch: Any) -> Any:
        """What a rank needs of a micro-batch: its own targets, and all tokens and documents of the rows."""
        if self.sequence is None:
            return batch
        mine = self.sequence.mine
        return batch._replace(targets_BS=mine(batch.targets_BS), weights_BS=mine(batch.weights_BS))

    def last_micro_batch(self, last: bool) -> None:
        if not self.config.reduce_each:
            reduce_now(self._sharded, last)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        # FSDP has summed them; what is left are copies in two chunks of a pipeline.
        if self.pipeline is not None:
            self.pipeline.add_tied()

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return global_norm(parameters, self.pipeline.tied if self.pipeline is not None else frozenset())

    def write_tensors(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        copied = "output.weight" if self._tied else None  # a pipeline's copy of the embedding
        write_parts(directory, {name: x for name, x in tensors.items() if copied not in name.split("/")}, self.group)

    def read_tensors(self, directory: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        if not self._tied or "output.weight" not in parameters:
            return read_parts(directory, parameters)
        found = read_parts(directory, {**parameters, "embed.weight": parameters["output.weight"]})
        shared = {name: x for name, x in found.items() if "embed.weight" in name.split("/")}
        if "embed.weight" not in parameters:
            found = {name: x for name, x in found.items() if name not in shared}
        return found | {name.replace("embed.weight", "output.weight"): x.clone() for name, x in shared.items()}

    def whole_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return whole_weights(model, frozenset({"output.weight"} if self._tied else ()))

    def _exchange(self) -> GatherExchange | RingExchange:
        if self.config.context == "ring":
            return RingExchange(self.mesh.cp, self.config.inner_ring)
        return GatherExchange(self.mesh.cp)
