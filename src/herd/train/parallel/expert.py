"""Expert parallelism: every rank of a group holds some of a layer's routed experts, and tokens travel to them.

Tokens sorted by expert are sorted by rank as well, since a rank's experts are consecutive: one all-to-all takes each to
where its expert is, another one brings the result back. Letters: T tokens of this rank, U tokens that arrive, D model
width, E experts, N ranks, M = E / N experts of a rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from herd.model.moe import Experts


def split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this rank's experts, which all ranks hold alike. With tensor parallelism `split_model` does it."""
    for name in ("w1", "w3", "w2"):
        part = distribute_tensor(getattr(experts, name).detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(part))


def exchange_tokens(experts: Experts, mesh: DeviceMesh) -> None:
    """Let `experts`, whose weights are this rank's part already, compute all ranks' tokens for its own experts."""
    compute, size = experts.forward, mesh.size()

    def forward(x_TD: Tensor, counts_E: Tensor) -> Tensor:
        sent_NM = counts_E.view(size, -1)
        arriving_NM = torch.empty_like(sent_NM)
        dist.all_to_all_single(arriving_NM, sent_NM.contiguous(), group=mesh.get_group())
        sent, arriving = sent_NM.sum(1).tolist(), arriving_NM.sum(1).tolist()
        x_UD = funcol.all_to_all_single_autograd(x_TD.contiguous(), arriving, sent, mesh)
        order_U = _by_expert(arriving_NM)
        y_UD = compute(x_UD[order_U], arriving_NM.sum(0))
        back_UD = torch.empty_like(y_UD).index_copy(0, order_U, y_UD)
        y_TD: Tensor = funcol.all_to_all_single_autograd(back_UD, sent, arriving, mesh)
        return y_TD

    experts.forward = forward  # type: ignore[method-assign]


def _by_expert(counts_NM: Tensor) -> Tensor:
    """Tokens arrive by rank and for each rank by expert; the order of theirs by expert alone, [U]."""
    n_ranks, n_experts = counts_NM.shape
    experts_NM = torch.arange(n_experts, device=counts_NM.device).expand(n_ranks, -1)
    expert_U = torch.repeat_interleave(experts_NM.flatten(), counts_NM.flatten())
    return expert_U.argsort(stable=True)
