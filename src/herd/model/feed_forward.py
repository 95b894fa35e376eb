"""The SwiGLU feed-forward network (arXiv 2002.05202). Letters: B batch, S sequence, D model width, F inner width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class FeedForward(nn.Module):
    """w2(silu(w1·x) * w3·x), without biases: w1 is the gate, w3 the up projection, w2 the way back."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as `x_BSD`."""
        y: Tensor = self.w2(functional.silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return y
