"""The mesh of a run: which ranks work together along which axis.

rank = tp + TP·(cp + CP·(pp + PP·dp)), the order of the Llama 3 paper (section 3.3.2): the axes that exchange most are
innermost, where links are fastest. DP is replicas × shards; a weight is sharded over the shards and the CP ranks
together, since CP ranks hold the same weights and see different tokens. EP ranks are consecutive ones of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from herd.train.parallel.config import ParallelConfig
from herd.train.plan.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """The axes as device meshes of this rank's neighbours. Axes of one rank are there too, and cost nothing."""

    layout: Layout
    tp: DeviceMesh
    cp: DeviceMesh
    pp: DeviceMesh
    shard: DeviceMesh
    """[replicas, shards·cp] or [shards·cp]: over which FSDP gathers weights and reduces gradients."""
    expert: DeviceMesh
    """Ranks that share the routed experts."""
    expert_shard: DeviceMesh
    """As `shard`, of the ranks that hold the same experts."""
    expert_tp: DeviceMesh
    """[ep, tp]: how a stack of experts is split before FSDP."""
    data: DeviceMesh
    """All ranks of one TP coordinate: those whose losses add up."""
    rows: DeviceMesh
    """Those of them that share their rows: CP and PP ranks."""
    data_rank: int
    """Which share of a step's rows is this rank's, out of `layout.dp`."""

    @classmethod
    def build(cls, config: ParallelConfig, layout: Layout, device_type: str) -> Mesh:
        """The mesh over the default process group, which has `layout.gpus` ranks. Every rank must call it."""
        copies = config.copies(layout.dp)
        shards = layout.dp // copies
        whole = init_device_mesh(
            device_type,
            (copies, shards, layout.pp, layout.cp, layout.tp),
            mesh_dim_names=("replicate", "dp_shard", "pp", "cp", "tp"),
        )
        shard = whole["dp_shard", "cp"]._flatten("shard")
        experts = shard._unflatten(0, (shards * layout.cp // layout.ep, layout.ep), ("expert_shard", "ep"))
        expert_shard = experts["expert_shard"]
        if copies > 1:
            replicate = whole["replicate"]
            shard = DeviceMesh._concatenate([replicate, shard])
            expert_shard = DeviceMesh._concatenate([replicate, expert_shard])
        return cls(
            layout=layout,
            tp=whole["tp"],
            cp=whole["cp"],
            pp=whole["pp"],
            shard=shard,
            expert=experts["ep"],
            expert_shard=expert_shard,
            expert_tp=DeviceMesh._concatenate([experts["ep"], whole["tp"]]),
            data=whole["replicate", "dp_shard", "pp", "cp"]._flatten("data"),
            rows=whole["pp", "cp"]._flatten("rows"),
            data_rank=torch.distributed.get_rank() // (layout.tp * layout.cp * layout.pp),
        )
