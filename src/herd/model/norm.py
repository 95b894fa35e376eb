"""Root-mean-square normalisation (arXiv 1910.07467), in float32 whatever the input's precision.

Letters: B batch, S sequence, D model width, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean(x²) + eps) over the last axis, computed in float32 and returned in x's dtype. No weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalised x, cast back to its dtype and only then multiplied by the weight: the order of Meta's reference."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as `x_BSD`."""
        return rms_normalise(x_BSD, self.eps) * self.weight
