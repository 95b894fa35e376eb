"""Scaled dot-product attention under one mask description, lowered to whatever computes it best.

`attend` picks a lowering; all of them give the same numbers and gradients. "dense" builds the whole mask and is the
oracle of the others; it also serves the cache. "causal" is torch's own kernel for the plain causal mask.
"per_document" runs that kernel on every document or chunk alone. "native" is Herd's compiled CPU kernel for every
causal mask without a cache, "varlen" torch's GPU kernel for documents and chunks. A new lowering is a function
(q, k, v, ranges) → o in `LOWERINGS` and a line in `choose_lowering`.
Letters: B batch, S queries, N keys, H query heads, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from herd.model import native_attention, varlen_attention
from herd.model.attention_mask import AttentionMask, KeyRanges

Lowering = Callable[[Tensor, Tensor, Tensor, KeyRanges], Tensor]


def attend(
    q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, mask: AttentionMask | KeyRanges, *, lowering: str | None = None
) -> Tensor:
    """Attention output [B, S, H, K]: softmax over the visible keys of q·k / sqrt(K), times v.

    Query head h reads key head h // (H / G). `mask` may be lowered already (`mask.key_ranges(...)`), which a model does
    once for all its layers. `lowering` forces one of `LOWERINGS` (tests, benchmarks); None chooses.
    """
    if isinstance(mask, AttentionMask):
        mask = mask.key_ranges(q_BSHK.shape[1], k_BNGK.shape[1], q_BSHK.device)
    name = choose_lowering(q_BSHK, k_BNGK, mask) if lowering is None else lowering
    return LOWERINGS[name](q_BSHK, k_BNGK, v_BNGK, mask)


def choose_lowering(q_BSHK: Tensor, k_BNGK: Tensor, ranges: KeyRanges) -> str:
    """The name in `LOWERINGS` that suits these tensors."""
    if q_BSHK.device.type != "cpu" or not ranges.self_attention:
        if ranges.plain_causal:
            return "causal"
        return "varlen" if ranges.runs_R is not None and varlen_attention.takes(q_BSHK) else "dense"
    # benchmarks/attention.py: on the CPU the compiled kernel is the fastest one for every causal mask.
    if ranges.causal and native_attention.available(q_BSHK):
        return "native"
    if ranges.plain_causal:
        return "causal"
    # The documents' lengths must be known to Python to run them apart, which a compiled graph cannot.
    return "per_document" if ranges.causal and not torch.compiler.is_compiling() else "dense"


def dense(q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, ranges: KeyRanges) -> Tensor:
    """torch's SDPA with the whole mask, [B or 1, 1, S, N]: any mask, any device."""
    mask_BSN = ranges.dense(k_BNGK.shape[1])
    return _sdpa(q_BSHK, k_BNGK, v_BNGK, mask=mask_BSN.unsqueeze(1))


def causal(q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, ranges: KeyRanges) -> Tensor:
    """torch's SDPA for the plain causal mask, where every query sees its own place and all before it."""
    assert ranges.plain_causal
    return _sdpa(q_BSHK, k_BNGK, v_BNGK, is_causal=True)


def per_document(q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, ranges: KeyRanges) -> Tensor:
    """torch's causal SDPA on every run of queries that begin at the same key: packed documents, chunks."""
    assert ranges.causal and ranges.self_attention
    batch, n_queries = q_BSHK.shape[:2]
    rows_B1 = torch.arange(batch, device=q_BSHK.device).unsqueeze(1) * n_queries
    _, lengths = torch.unique_consecutive((ranges.first_BS + rows_B1).flatten(), return_counts=True)
    spans = (torch.split(x.flatten(0, 1), lengths.tolist()) for x in (q_BSHK, k_BNGK, v_BNGK))
    outputs = [_sdpa(q[None], k[None], v[None], is_causal=True)[0] for q, k, v in zip(*spans, strict=True)]
    return torch.unflatten(torch.cat(outputs), 0, (batch, n_queries))


def native(q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, ranges: KeyRanges) -> Tensor:
    """Herd's compiled CPU kernel (native_attention.py) for causal self-attention without a cache."""
    assert ranges.causal and ranges.self_attention
    first_BS = ranges.first_BS.expand(q_BSHK.shape[:2])
    return native_attention.attention(q_BSHK, k_BNGK, v_BNGK, first_BS, q_BSHK.shape[-1] ** -0.5)


def varlen(q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, ranges: KeyRanges) -> Tensor:
    """torch's variable-length kernel (varlen_attention.py) on every run of queries that begin at the same key."""
    assert ranges.runs_R is not None
    return varlen_attention.attention(q_BSHK, k_BNGK, v_BNGK, ranges.runs_R, ranges.first_BS.shape[0])


def _sdpa(
    q_BSHK: Tensor, k_BNGK: Tensor, v_BNGK: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    o_BHSK = functional.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2),
        k_BNGK.transpose(1, 2),
        v_BNGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BSHK.shape[2] != k_BNGK.shape[2],
    )
    return o_BHSK.transpose(1, 2)


LOWERINGS: dict[str, Lowering] = {
    "dense": dense,
    "causal": causal,
    "per_document": per_document,
    "native": native,
    "varlen": varlen,
}
