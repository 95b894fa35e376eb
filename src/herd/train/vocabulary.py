"""The softmax over a vocabulary whose parts are on several ranks.

Every rank has all rows and the logits of its own tokens. Two small exchanges a chunk, [C] numbers each, make of them
the loss of whole rows and the gradient of the rank's own logits; no rank ever has a whole row of logits.
Letters: C rows, V a rank's tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class VocabularyPart:
    """A rank's rows of an output matrix [V, D] that is split by vocabulary."""

    def __init__(self, output: DTensor) -> None:
        assert output.device_mesh.ndim == 1 and output.placements[0].is_shard(0)
        self._group = output.device_mesh.get_group()
        self._first = output.device_mesh.get_local_rank() * (output.shape[0] // output.device_mesh.size())

    def losses_(self, logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
        """-log p of each target [C], fp32; the logits are replaced by their gradient softmax - onehot."""
        z_CV = logits_CV.float()
        highest_C1 = z_CV.amax(1, keepdim=True)
        dist.all_reduce(highest_C1, dist.ReduceOp.MAX, group=self._group)
        index_C1 = targets_C1 - self._first
        here_C1 = (index_C1 >= 0) & (index_C1 < z_CV.shape[1])
        index_C1 = index_C1.masked_fill(~here_C1, 0)
        own_C1 = (z_CV.gather(1, index_C1) - highest_C1).masked_fill(~here_C1, 0)
        p_CV = z_CV.sub_(highest_C1).exp_()
        sums_2C1 = torch.stack([p_CV.sum(1, keepdim=True), own_C1])
        dist.all_reduce(sums_2C1, group=self._group)
        total_C1, own_C1 = sums_2C1
        p_CV.div_(total_C1).scatter_add_(1, index_C1, -here_C1.float())
        logits_CV.copy_(p_CV)
        losses_C: Tensor = (total_C1.log() - own_C1).squeeze(1)
        return losses_C
