"""Attention to some of the keys at a time: partial results that add up to the softmax over all of them.

The state of a query is (m, l, u): the largest score so far, the sum of exp(score - m) and that of exp(score - m)·v;
the output is u / l and log-sum-exp is m + log l (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Plain
tensor operations on a tile of queries at a time, for any device. Which keys a query sees is two numbers (KeyRanges).
Letters: B batch, S queries, N keys, H query heads, G key heads, R = H / G, K head width, T queries of a tile, flattened
with R so that the products need no copies of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_SCORES = 2**22
"""Scores held at a time, in fp32: 16 MiB."""


@dataclass(frozen=True)
class Keys:
    """Neighbouring keys and values [B, N, G, K]; the first of them is key `start` of the row."""

    start: int
    k_BNGK: Tensor
    v_BNGK: Tensor

    def within(self, begin: int, end: int) -> Keys | None:
        """Those of begin … end - 1, or None where there are none."""
        low, high = max(begin, self.start), min(end, self.start + self.k_BNGK.shape[1])
        if low >= high:
            return None
        part = slice(low - self.start, high - self.start)
        return Keys(low, self.k_BNGK[:, part], self.v_BNGK[:, part])


class PartialAttention:
    """Queries with the keys they have seen so far."""

    def __init__(self, q_BSHK: Tensor, n_kv_heads: int, first_BS: Tensor, last_BS: Tensor) -> None:
        batch, queries, heads, width = q_BSHK.shape
        self._repeat = heads // n_kv_heads
        self._q = _by_key_head(q_BSHK, n_kv_heads)
        self._first, self._last = first_BS, last_BS
        self._scale = width**-0.5
        rows = (batch, n_kv_heads, queries, self._repeat)
        self._highest = torch.full(rows, -torch.inf, device=q_BSHK.device)
        self._sum = torch.zeros(rows, device=q_BSHK.device)
        self._weighted = torch.zeros((*rows, width), device=q_BSHK.device)

    def see(self, keys: Keys) -> None:
        """Take some keys into account, each of which must be shown once."""
        k, v = keys.k_BNGK.transpose(1, 2), keys.v_BNGK.transpose(1, 2)
        for tile in self._tiles(k.shape[2]):
            scores = self._scores(tile, k, keys.start)
            before = self._highest[:, :, tile]
            highest = torch.maximum(before, scores.amax(-1))
            # Queries that have seen no key so far stay at -inf, and everything they hold at 0.
            anchor = highest.masked_fill(highest == -torch.inf, 0)
            weights = (scores - anchor.unsqueeze(-1)).exp_()
            faded = (before - anchor).exp_()
            self._sum[:, :, tile] = self._sum[:, :, tile] * faded + weights.sum(-1)
            values = _product(weights.to(v.dtype), v)
            self._weighted[:, :, tile] = self._weighted[:, :, tile] * faded.unsqueeze(-1) + values
            self._highest[:, :, tile] = highest

    def result(self) -> tuple[Tensor, Tensor]:
        """(output [B, S, H, K] in the queries' dtype, log-sum-exp [B, G, S, R] fp32) over the keys seen."""
        output = self._weighted / self._sum.unsqueeze(-1)
        return _by_head(output.to(self._q.dtype)), self._highest + self._sum.log()

    def gradients(
        self, keys: Keys, do_BSHK: Tensor, delta_BGSR: Tensor, lse_BGSR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq [B, S, H, K], dk, dv [B, N, G, K]) of these keys' part, fp32.

        delta: sum over K of do · output; lse: over all keys. P = exp(S - lse); dV = PᵀdO; dS = P∘(dO·Vᵀ - delta);
        dQ = scale·dS·K; dK = scale·dSᵀ·Q (Dao 2023, arXiv 2307.08691, algorithm 2).
        """
        k, v = keys.k_BNGK.transpose(1, 2), keys.v_BNGK.transpose(1, 2)
        do = _by_key_head(do_BSHK, k.shape[1])
        dq = torch.zeros(self._q.shape, device=k.device)
        dk, dv = torch.zeros(k.shape, device=k.device), torch.zeros(v.shape, device=v.device)
        for tile in self._tiles(k.shape[2]):
            p = (self._scores(tile, k, keys.start) - lse_BGSR[:, :, tile].unsqueeze(-1)).exp_()
            do_tile, q_tile = do[:, :, tile].flatten(2, 3), self._q[:, :, tile].flatten(2, 3)
            dv += p.flatten(2, 3).to(do.dtype).mT @ do_tile
            ds = (_product(do[:, :, tile], v.mT) - delta_BGSR[:, :, tile].unsqueeze(-1)) * p
            ds = (ds * self._scale).to(k.dtype)
            dq[:, :, tile] = _product(ds, k).float()
            dk += ds.flatten(2, 3).mT @ q_tile
        return _by_head(dq), dk.transpose(1, 2), dv.transpose(1, 2)

    def _scores(self, tile: slice, k_BGNK: Tensor, start: int) -> Tensor:
        """Scaled scores [B, G, T, R, N] in fp32, -inf where a query does not see a key."""
        scores: Tensor = _product(self._q[:, :, tile], k_BGNK.mT).float() * self._scale
        keys_N = torch.arange(start, start + k_BGNK.shape[2], device=k_BGNK.device)
        first, last = self._first[:, tile, None], self._last[:, tile, None]
        hidden_BTN = (keys_N < first) | (keys_N > last)
        scores.masked_fill_(hidden_BTN[:, None, :, None], -torch.inf)
        return scores

    def _tiles(self, n_keys: int) -> Iterator[slice]:
        batch, heads, queries = self._q.shape[:3]
        rows = max(1, TILE_SCORES // (batch * heads * self._repeat * n_keys))
        return (slice(start, min(start + rows, queries)) for start in range(0, queries, rows))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x [B, G, T, R, a] · y [B, G, a, b] → [B, G, T, R, b]."""
    return torch.unflatten(x.flatten(2, 3) @ y, 2, x.shape[2:4])


def _by_key_head(x_BSHK: Tensor, n_kv_heads: int) -> Tensor:
    """[B, G, S, R, K]: query heads that read one key head beside each other."""
    return torch.unflatten(x_BSHK, 2, (n_kv_heads, -1)).transpose(1, 2).contiguous()


def _by_head(x_BGSRK: Tensor) -> Tensor:
    return x_BGSRK.transpose(1, 2).flatten(2, 3)
