"""Context parallelism: a rank computes some tokens of every row and sees the keys of all of them.

A row is cut into 2·CP chunks and rank r has chunks r and 2·CP - 1 - r: with a causal mask every rank has the same work.
Documents and Llama 4's chunks stay exact, since each query brings its own range of keys in the whole row (Llama 3
paper, section 3.3.2). Keys and values come from the other ranks by one of two `Exchange`s, all at once (here) or in
turn (ring.py); in the backward pass they are fetched again, so that a rank keeps only its own between the passes.
Letters: B batch, S a row's tokens, P a rank's tokens, C tokens of a chunk, H query heads, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from herd.model.attention_mask import KeyRanges
from herd.model.llama import Places
from herd.model.rope import Rotation
from herd.train.parallel.partial_attention import Keys, PartialAttention


class Gradients(Protocol):
    """Takes the gradients of the keys and values that an exchange has shown."""

    def __call__(self, keys: Keys) -> tuple[Tensor, Tensor] | None: ...


class Exchange(Protocol):
    """Shows every rank all keys and values, each of them once, in some order and in parts."""

    def forward(self, kv_2BPGK: Tensor) -> Iterator[Keys]:
        """Parts of all ranks' keys and values, given this rank's."""

    def backward(self, kv_2BPGK: Tensor, gradients: Gradients) -> Tensor:
        """Show all of them again; the sum over ranks of `gradients(part)` for this rank's own, [2, B, P, G, K]."""


@dataclass(frozen=True)
class ShardRanges:
    """The mask of a rank's queries: first and last visible key in the row, and for each of its two chunks the span
    that they lie in."""

    first_BP: Tensor
    last_BP: Tensor
    spans: tuple[tuple[int, int], tuple[int, int]]


class SequenceShard:
    """Which tokens of a row are this rank's."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def mine(self, x: Tensor) -> Tensor:
        """This rank's part of a tensor over the whole row, along axis 1."""
        if self.size == 1:
            return x
        chunks = x.chunk(2 * self.size, dim=1)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim=1)

    def places(self, places: Places) -> Places:
        """What a rank needs of the places of all tokens."""
        local = self._ranges(places.local)
        return Places(
            turn=Rotation(*(self.mine(x) for x in places.turn)),
            local=local,
            everywhere=local if places.everywhere is places.local else self._ranges(places.everywhere),
            temperature_BS=None if places.temperature_BS is None else self.mine(places.temperature_BS),
        )

    def _ranges(self, ranges: KeyRanges) -> Any:
        first_BP, last_BP = self.mine(ranges.first_BS), self.mine(ranges.last_BS)
        early, late = (
            (int(first.min()), int(last.max()) + 1)
            for first, last in zip(first_BP.chunk(2, 1), last_BP.chunk(2, 1), strict=True)
        )
        return ShardRanges(first_BP, last_BP, (early, late))


class ContextAttention:
    """`herd.model.attend` for a rank's queries."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __call__(self, q_BPHK: Tensor, k_BPGK: Tensor, v_BPGK: Tensor, ranges: Any) -> Tensor:
        """Attention output [B, P, H, K]."""
        kv_2BPGK = torch.stack([k_BPGK, v_BPGK])
        o_BPHK: Tensor = _Attention.apply(q_BPHK, kv_2BPGK, ranges, self._exchange)  # type: ignore[no-untyped-call]
        return o_BPHK


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BPHK: Tensor, kv_2BPGK: Tensor, ranges: ShardRanges, exchange: Exchange) -> Tensor:
        halves = _halves(q_BPHK, kv_2BPGK, ranges)
        for keys in exchange.forward(kv_2BPGK):
            for half, span in zip(halves, ranges.spans, strict=True):
                if (visible := keys.within(*span)) is not None:
                    half.see(visible)
        outputs, lses = zip(*(half.result() for half in halves), strict=True)
        o_BPHK = torch.cat(outputs, 1)
        ctx.save_for_backward(q_BPHK, kv_2BPGK, o_BPHK, *lses)
        ctx.ranges, ctx.exchange = ranges, exchange
        return o_BPHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BPHK: Tensor) -> tuple[Tensor | None, ...]:
        q_BPHK, kv_2BPGK, o_BPHK, *lses = ctx.saved_tensors
        halves = _halves(q_BPHK, kv_2BPGK, ctx.ranges)
        do_halves = do_BPHK.to(q_BPHK.dtype).chunk(2, 1)
        delta_BPH = (do_BPHK.float() * o_BPHK.float()).sum(-1)
        deltas = [torch.unflatten(delta, 2, (kv_2BPGK.shape[3], -1)).transpose(1, 2) for delta in delta_BPH.chunk(2, 1)]
        dq_BPHK = torch.zeros(q_BPHK.shape, device=q_BPHK.device)
        dq_halves = dq_BPHK.chunk(2, 1)

        def gradients(keys: Keys) -> tuple[Tensor, Tensor] | None:
            """Adds to dq, and gives dk and dv of these keys."""
            dk = dv = None
            for half, span, dq, do, delta, lse in zip(
                halves, ctx.ranges.spans, dq_halves, do_halves, deltas, lses, strict=True
            ):
                if (visible := keys.within(*span)) is None:
                    continue
                dq_part, dk_part, dv_part = half.gradients(visible, do, delta, lse)
                dq += dq_part
                if dk is None or dv is None:
                    dk, dv = (torch.zeros(keys.k_BNGK.shape, device=dq.device) for _ in range(2))
                at = visible.start - keys.start
                dk[:, at : at + dk_part.shape[1]] += dk_part
                dv[:, at : at + dv_part.shape[1]] += dv_part
            return None if dk is None or dv is None else (dk, dv)

        dkv_2BPGK = ctx.exchange.backward(kv_2BPGK, gradients)
        return dq_BPHK.to(q_BPHK.dtype), dkv_2BPGK.to(kv_2BPGK.dtype), None, None


def _halves(q_BPHK: Tensor, kv_2BPGK: Tensor, ranges: ShardRanges) -> list[PartialAttention]:
    parts = zip(q_BPHK.chunk(2, 1), ranges.first_BP.chunk(2, 1), ranges.last_BP.chunk(2, 1), strict=True)
    return [PartialAttention(q, kv_2BPGK.shape[3], first, last) for q, first, last in parts]


class GatherExchange:
    """All keys and values at once, by one all-gather; gradients by one reduce-scatter in fp32."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group, self._size = mesh.get_group(), mesh.size()

    def forward(self, kv_2BPGK: Tensor) -> Iterator[Keys]:
        ranks = kv_2BPGK.new_empty(2 * self._size, *kv_2BPGK.shape[1:])
        dist.all_gather_single(ranks, kv_2BPGK.contiguous(), group=self._group)
        early, late = torch.unflatten(ranks, 0, (self._size, 2)).chunk(
            2, dim=3
        )  # chunks 0 … CP-1 in order, and CP … 2·CP-1 from the last rank to the first
        in_order = torch.cat([early, late.flip(0)])
        k, v = (in_order[:, i].movedim(0, 1).flatten(1, 2) for i in range(2))
        yield Keys(0, k, v)

    def backward(self, kv_2BPGK: Tensor, gradients: Gradients) -> Tensor:
        (keys,) = self.forward(kv_2BPGK)
        found = gradients(keys)
        assert found is not None  # every query sees itself
        chunks = torch.stack(found).chunk(2 * self._size, dim=2)
        of_rank = [torch.cat([chunks[r], chunks[-1 - r]], dim=2) for r in range(self._size)]
        mine = torch.empty_like(of_rank[0])
        dist.reduce_scatter_single(mine, torch.cat(of_rank), group=self._group)
        return mine
