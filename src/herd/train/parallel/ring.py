"""Ring attention: keys and values go from rank to rank, and each rank takes into account what passes.

A rank holds two ranks' keys at a time instead of all of them, and computes while the next ones arrive (Liu et al. 2023,
arXiv 2310.01889). Where ranks are on several nodes, there are two rings: an inner one within a node, and an outer one
in which every rank hands what it started the inner ring with to its neighbour on the next node, while the inner ring
turns. So all but one in `inner` exchanges use a node's fast links, and the slow ones have `inner` times as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from herd.train.parallel.context import Gradients
from herd.train.parallel.partial_attention import Keys


class RingExchange:
    """The ring over a mesh axis; `inner` consecutive ranks are on one node."""

    def __init__(self, mesh: DeviceMesh, inner: int = 1) -> None:
        self._group, self._rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self._size, self._inner, self._nodes = size, inner, size // inner

    def forward(self, kv_2BPGK: Tensor) -> Iterator[Keys]:
        for origin, kv in self._turn(kv_2BPGK):
            yield from self._keys(origin, kv)

    def backward(self, kv_2BPGK: Tensor, gradients: Gradients) -> Tensor:
        # The gradient of what a rank is shown travels with it: around the inner ring and home to where it entered the
        # node, then to the next node, and after the last one to the rank it belongs to.
        travelling = torch.zeros(kv_2BPGK.shape, device=kv_2BPGK.device)
        half = kv_2BPGK.shape[2] // 2
        for turn, (origin, kv) in enumerate(self._turn(kv_2BPGK), start=1):
            for part, keys in enumerate(self._keys(origin, kv)):
                if (found := gradients(keys)) is not None:
                    travelling[:, :, part * half : (part + 1) * half] += torch.stack(found)
            travelling = self._pass(travelling, *self._in_node()).wait()
            if turn % self._inner == 0:
                travelling = self._pass(travelling, *self._across()).wait()
        return travelling

    def _turn(self, kv_2BPGK: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank it comes from, its keys and values), of all ranks."""
        node, place = divmod(self._rank, self._inner)
        entered = kv_2BPGK.contiguous()
        for hop in range(self._nodes):
            last_hop = hop + 1 == self._nodes
            entering = None if last_hop else self._pass(entered, *self._across())
            passing = entered
            for step in range(self._inner):
                last_step = step + 1 == self._inner
                coming = None if last_step else self._pass(passing, *self._in_node())
                origin = (node - hop) % self._nodes * self._inner + (place - step) % self._inner
                yield origin, passing
                if coming is not None:
                    passing = coming.wait()
            if entering is not None:
                entered = entering.wait()

    def _keys(self, origin: int, kv_2BPGK: Tensor) -> Iterator[Keys]:
        """The two chunks of a rank, with their places in the row."""
        half = kv_2BPGK.shape[2] // 2
        for chunk, part in zip((origin, 2 * self._size - 1 - origin), kv_2BPGK.chunk(2, dim=2), strict=True):
            yield Keys(chunk * half, part[0], part[1])

    def _in_node(self) -> tuple[int, int]:
        """(rank to send to, rank to receive from) of the inner ring."""
        node, place = divmod(self._rank, self._inner)
        first = node * self._inner
        return first + (place + 1) % self._inner, first + (place - 1) % self._inner

    def _across(self) -> tuple[int, int]:
        """The same of the outer ring."""
        return (self._rank + self._inner) % self._size, (self._rank - self._inner) % self._size

    def _pass(self, x: Tensor, to: int, source: int) -> _Arrival:
        if to == self._rank:
            return _Arrival(x, [])
        arriving = torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self._group, group_peer=to),
                dist.P2POp(dist.irecv, arriving, group=self._group, group_peer=source),
            ]
        )
        return _Arrival(arriving, works)


class _Arrival:
    """A tensor on its way."""

    def __init__(self, tensor: Tensor, works: list[dist.Work]) -> None:
        self._tensor, self._works = tensor, works

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._tensor
