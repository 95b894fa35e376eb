"""Fully sharded data parallelism: a rank keeps a part of every weight, gradient and optimiser state.

A block's weights are gathered before it runs; gradients are summed and split in one exchange, in fp32 (PyTorch FSDP2).
With `reshard` the weights are dropped after the forward pass and gathered again in the backward pass; the Llama 3 paper
does not (section 3.3.2: "we do not reshard after forward"). Sums, not means: the loop divides by the step's targets.

Blocks are gathered in the precision of their products, so that bf16 takes half the exchange and memory; embedding,
last norm and output in fp32, so that states between blocks and the output's gradient are summed in fp32, as in one
process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from herd.model.llama import Block, Llama


def shard_model(
    model: nn.Module, mesh: DeviceMesh, expert_mesh: DeviceMesh, precision: torch.dtype, *, reshard: bool
) -> None:
    """Shard the blocks of a Llama, or of a part of one, and then the rest; the routed experts over the ranks that hold
    the same ones."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        shard_block(block, mesh, expert_mesh, precision, reshard=reshard)
    _shard(model, mesh, torch.float32, reshard=False)
    if isinstance(model, Llama):
        register_fsdp_forward_method(model, "hidden")


def shard_block(
    block: Block, mesh: DeviceMesh, expert_mesh: DeviceMesh, precision: torch.dtype, *, reshard: bool
) -> None:
    """Shard one layer."""
    if hasattr(block, "moe"):
        shards = expert_mesh.size(expert_mesh.ndim - 1)
        by_experts = functools.partial(_of_experts, shards=shards)
        _shard(block.moe.experts, expert_mesh, precision, reshard=reshard, placement=by_experts)
    _shard(block, mesh, precision, reshard=reshard)


def reduce_now(modules: Iterable[nn.Module], now: bool) -> None:
    """Whether the next backward pass sums the gradients over ranks, or only adds to those of this rank."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now)


def let_go(modules: Iterable[nn.Module]) -> None:
    """Drop the whole weights that are gathered in these and everything below them."""
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, FSDPModule):
            part.reshard()


def _of_experts(weight: nn.Parameter, shards: int) -> Shard:
    """Along which axis a stack of experts [E, …, …] is sharded: by experts, unless there are too few for all shards."""
    held = weight.to_local() if isinstance(weight, DTensor) else weight
    by_width = held.shape[0] % shards != 0 and held.shape[1] % shards == 0
    return Shard(1 if by_width else 0)


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    precision: torch.dtype,
    *,
    reshard: bool,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
) -> None:
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, shard_placement_fn=placement)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no other
