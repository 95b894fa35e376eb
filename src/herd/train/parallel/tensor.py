"""Tensor and sequence parallelism: every matrix of a block split over the ranks of an axis, and so is the sequence.

Between the blocks a rank holds its part of the sequence only. A layer gathers the sequence, multiplies by its own
columns (wq, wk, wv, w1, w3) and then its own rows (wo, w2) of the matrices, and what comes out is a rank's share of a
sum: it is summed and split by sequence in one exchange (Korthikanti et al. 2022, arXiv 2205.05198). Embedding and
output are split by vocabulary; the loss works on the parts (`herd.train.vocabulary`).

Weights are DTensors, so that FSDP, checkpoints and the gradient norm know how they are split; activations are plain
tensors with the exchanges written out. Letters: B batch, S sequence, P a rank's part of it, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional

from herd.architecture import LlamaConfig
from herd.model.llama import Attention, Block, Llama
from herd.model.moe import Experts
from herd.model.norm import RMSNorm, rms_normalise

COLUMNS, ROWS, WHOLE = Shard(0), Shard(1), Replicate()
"""How a Linear's weight [out, in] is split. "Columns" and "rows" are those of the product x · weight.T."""


def split_model(model: Llama, mesh: DeviceMesh, expert_mesh: DeviceMesh) -> None:
    """Split all weights of `model` over `mesh`, in place. Experts are split over the two axes of `expert_mesh`.

    Where parts of the model are elsewhere (a pipeline's chunk), what is here is split.
    """
    if isinstance(model.embed, nn.Embedding):
        _split(model.embed, "weight", mesh, COLUMNS)
        _wrap(model.embed, lambda forward: _embed(model.embed, mesh))
    for block in model.layers:
        if isinstance(block, Block):
            split_block(block, model.config, mesh, expert_mesh)
    if isinstance(model.norm, RMSNorm):
        _split_norm(model.norm, mesh)
        _wrap(model.norm, lambda forward: lambda x: gather_sequence(forward(x), mesh))
    if isinstance(getattr(model, "output", None), nn.Linear):
        _split(model.output, "weight", mesh, COLUMNS)


def split_block(block: Block, config: LlamaConfig, mesh: DeviceMesh, expert_mesh: DeviceMesh) -> None:
    """Split one layer."""
    _split_norm(block.attention_norm, mesh)
    _split_norm(block.ffn_norm, mesh)
    attention = block.attention
    assert isinstance(attention, Attention)
    _split_linear(attention.wq, mesh, COLUMNS)
    for linear in (attention.wk, attention.wv):
        if config.n_kv_heads % mesh.size() == 0:
            _split_linear(linear, mesh, COLUMNS)
        else:
            _share_heads(linear, mesh, config)
    _split_linear(attention.wo, mesh, ROWS)
    feed_forwards = [block.moe.shared] if hasattr(block, "moe") else [block.ffn]
    for ffn in feed_forwards:
        _split_linear(ffn.w1, mesh, COLUMNS)
        _split_linear(ffn.w3, mesh, COLUMNS)
        _split_linear(ffn.w2, mesh, ROWS)
    if hasattr(block, "moe"):
        # All ranks route alike; what the scores did to a rank's part of the experts is a part of the router's gradient.
        _split_linear(block.moe.router, mesh, WHOLE)
        _split_experts(block.moe.experts, expert_mesh)
    for layer in (attention, block.moe if hasattr(block, "moe") else block.ffn):
        _wrap(layer, lambda forward: lambda x, *rest: scatter_sum(forward(gather_sequence(x, mesh), *rest), mesh))


def gather_sequence(x_BPD: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, S, D] from every rank's part; gradients of all ranks' copies are summed and split again."""
    if mesh.size() == 1:
        return x_BPD
    x_BSD: Tensor = funcol.all_gather_single_autograd(x_BPD.contiguous(), gather_dim=1, group=mesh)
    return x_BSD


def scatter_sum(x_BSD: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part [B, P, D] of the sum of all ranks' tensors."""
    if mesh.size() == 1:
        return x_BSD
    x_BPD: Tensor = funcol.reduce_scatter_single_autograd(x_BSD.contiguous(), "sum", scatter_dim=1, group=mesh)
    return x_BPD


def local(weight: Tensor) -> Tensor:
    """A rank's part of a weight. Where it is whole, the gradient of each rank is a part of a sum."""
    if not isinstance(weight, DTensor):
        return weight
    part: Tensor = weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])
    return part


def _embed(embed: nn.Embedding, mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    def forward(tokens_BS: Tensor) -> Tensor:
        rows_VD = local(embed.weight)
        index_BS = tokens_BS - mesh.get_local_rank() * rows_VD.shape[0]
        elsewhere_BS = (index_BS < 0) | (index_BS >= rows_VD.shape[0])
        x_BSD = functional.embedding(index_BS.masked_fill(elsewhere_BS, 0), rows_VD)
        return scatter_sum(x_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0), mesh)

    return forward


def _split_norm(norm: nn.Module, mesh: DeviceMesh) -> None:
    assert isinstance(norm, RMSNorm)
    _split(norm, "weight", mesh, WHOLE)
    _wrap(norm, lambda forward: lambda x: rms_normalise(x, norm.eps) * local(norm.weight))


def _split_linear(linear: nn.Linear, mesh: DeviceMesh, placement: Placement) -> None:
    _split(linear, "weight", mesh, placement)
    _wrap(linear, lambda forward: lambda x: functional.linear(x, local(linear.weight)))


def _share_heads(linear: nn.Linear, mesh: DeviceMesh, config: LlamaConfig) -> None:
    """More ranks than key heads: neighbours compute the same head. The weight is whole on every rank."""
    head = mesh.get_local_rank() * config.n_kv_heads // mesh.size()
    rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
    _split(linear, "weight", mesh, WHOLE)
    _wrap(linear, lambda forward: lambda x: functional.linear(x, local(linear.weight)[rows]))


def _split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """w1 and w3 [E, F, D] by their inner width, w2 [E, D, F] as well, all of them by experts."""
    for name, inner in (("w1", Shard(1)), ("w3", Shard(1)), ("w2", Shard(2))):
        weight = getattr(experts, name)
        placements = [Shard(0), inner]
        setattr(experts, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)))


def _split(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Keep this rank's part of a weight, which all ranks hold alike."""
    weight = getattr(module, name)
    part = distribute_tensor(weight.detach(), mesh, [placement], src_data_rank=None)
    setattr(module, name, nn.Parameter(part, requires_grad=weight.requires_grad))


def _wrap(module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace what a call of the module computes; hooks and names stay."""
    module.forward = around(module.forward)
