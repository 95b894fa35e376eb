"""Which keys each query sees, as data: causal × document × chunk, with or without a cache.

All masks of the Llama text decoders have one property that every lowering uses: the visible keys of a query are one
run of neighbours, first..last. So a mask is two integers per query, whatever it is made of.
Letters: B batch, S queries, N keys, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from herd.errors import UsageError
from herd.model import varlen_attention


@dataclass(frozen=True)
class KeyRanges:
    """The mask, lowered: query i of row b sees keys first_BS[b, i] … last_BS[b, i], both included.

    A first axis of 1 stands for "the same in every row". `plain_causal` says that query i sees keys 0 … i and nothing
    else, which kernels know without looking at the numbers; `causal` that no query sees a key after its own place;
    `self_attention` that queries and keys are the same tokens (no cache), so that a causal query's last key is itself.
    `runs_R`, on devices that need it: where every run of queries that begin at the same key starts, in the places of
    `first_BS` laid end to end.
    """

    first_BS: Tensor
    last_BS: Tensor
    causal: bool
    plain_causal: bool
    self_attention: bool
    runs_R: Tensor | None = None

    def dense(self, n_keys: int) -> Tensor:
        """True where a query sees a key, [B, S, N]."""
        keys_N = torch.arange(n_keys, device=self.first_BS.device)
        return (keys_N >= self.first_BS.unsqueeze(-1)) & (keys_N <= self.last_BS.unsqueeze(-1))

    def in_runs(self) -> KeyRanges:
        """The same with `runs_R`, or known to be plain causal if every row is one run. Waits for the device once.

        Masks that do not consist of causal runs stay as they are.
        """
        if self.plain_causal or not (self.causal and self.self_attention):
            return self
        rows, n_queries = self.first_BS.shape
        # A query that sees nothing before itself begins a run.
        begins_BS = self.first_BS == torch.arange(n_queries, device=self.first_BS.device)
        starts_R = begins_BS.flatten().nonzero().squeeze(1)
        if len(starts_R) == rows:
            return replace(self, plain_causal=True)
        # Graphs are compiled for fixed sizes, but the number of documents differs from batch to batch.
        torch._dynamo.maybe_mark_dynamic(starts_R, 0)
        return replace(self, runs_R=starts_R)


@dataclass(frozen=True)
class AttentionMask:
    """The mask, described.

    causal: no query sees a later key. · document_ids_BS: packed rows; neighbours with the same id are one document, and
    no query sees another document. · chunk: a query sees keys of its own chunk of positions only (Llama 4's local
    layers); positions count from the start of the document. · positions_BS: position of each query in its document
    (default: counted from the document's start, or from the cache's length); they must grow by one inside a document. ·
    cached: keys of each row that come before its first query (a row of a cache is one document).
    """

    causal: bool = True
    document_ids_BS: Tensor | None = None
    chunk: int | None = None
    positions_BS: Tensor | None = None
    cached: Sequence[int] | None = None

    def key_ranges(self, n_queries: int, n_keys: int | None = None, device: torch.device | None = None) -> KeyRanges:
        """Lower the mask for a call with S = `n_queries` and N = `n_keys` (default S).

        Raises UsageError where the parts contradict each other: documents with a cache, a cache that is not causal.
        """
        n_keys = n_queries if n_keys is None else n_keys
        if self.cached is not None:
            if self.document_ids_BS is not None or not self.causal:
                raise UsageError("a row of a cache is one causal document", allowed="no document_ids, causal=True")
            own_BS = torch.tensor(self.cached, device=device).unsqueeze(1) + torch.arange(n_queries, device=device)
            starts_BS = torch.zeros_like(own_BS)
        else:
            own_BS = torch.arange(n_queries, device=device).unsqueeze(0)
            starts_BS = torch.zeros_like(own_BS)
            if self.document_ids_BS is not None:
                starts_BS = document_starts(self.document_ids_BS)
        first_BS, last_BS = starts_BS, own_BS
        if not self.causal:
            last_BS = torch.full_like(own_BS, n_keys - 1)
            if self.document_ids_BS is not None:
                backwards = document_starts(self.document_ids_BS.flip(1)).flip(1)
                last_BS = n_keys - 1 - backwards
        if self.chunk is not None:
            positions_BS = own_BS - starts_BS if self.positions_BS is None else self.positions_BS
            place_BS = positions_BS % self.chunk
            first_BS = torch.maximum(first_BS, own_BS - place_BS)
            last_BS = torch.minimum(last_BS, own_BS - place_BS + self.chunk - 1)
        unbroken = self.document_ids_BS is None and self.cached is None
        whole = self.chunk is None or (self.positions_BS is None and n_queries <= self.chunk)
        ranges = KeyRanges(
            first_BS=first_BS.to(torch.int32),
            last_BS=last_BS.clamp(max=n_keys - 1).expand_as(first_BS).to(torch.int32),
            causal=self.causal,
            plain_causal=self.causal and unbroken and whole and n_keys == n_queries,
            self_attention=self.cached is None and n_keys == n_queries,
        )
        return ranges.in_runs() if varlen_attention.available(first_BS.device) else ranges


def document_starts(document_ids_BS: Tensor) -> Tensor:
    """Index at which each token's document begins in its row, [B, S] int64."""
    index_S = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    begins_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    return torch.where(begins_BS, index_S, 0).cummax(1).values
