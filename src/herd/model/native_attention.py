"""Causal attention for training on a CPU by Herd's compiled kernels, as an operator that autograd and compile know.

Each query sees a contiguous range of keys, `first_BS[b, s]` … s, which is enough for documents, Llama 4 chunks and
sliding windows. Arithmetic is float32; for bfloat16 inputs products take bfloat16
factors where the processor multiplies them. The result does not depend on the number of threads.
Measured against scaled_dot_product_attention: benchmarks/attention.py.

Letters: B batch, S sequence, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from herd import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]


def available(q_BSHK: Tensor) -> bool:
    """True when the kernels are built and take this tensor: on the CPU, float32 or bfloat16, K a multiple of 16."""
    width = q_BSHK.shape[-1]
    return (
        _native is not None
        and q_BSHK.device.type == "cpu"
        and q_BSHK.dtype in (torch.float32, torch.bfloat16)
        and width % 16 == 0
        and width <= 256
    )


def attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, first_BS: Tensor, scale: float) -> Tensor:
    """Attention output [B, S, H, K] in the inputs' dtype. `first_BS` is int32 with 0 <= first_BS[b, s] <= s."""
    o_BSHK, _ = _forward(q_BSHK, k_BSGK, v_BSGK, first_BS, scale)
    assert isinstance(o_BSHK, Tensor)
    return o_BSHK


@torch.library.custom_op("herd::causal_attention", mutates_args=())
def _forward(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, first_BS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = q_BSHK.contiguous(), k_BSGK.contiguous(), v_BSGK.contiguous()
    o, lse_BHS = torch.empty_like(q), _empty_lse(q)
    first = first_BS.contiguous()
    _native.attention_forward(_bits(q), _bits(k), _bits(v), first, scale, _bits(o), lse_BHS, torch.get_num_threads())
    return o, lse_BHS


@_forward.register_fake
def _(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, first_BS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BSHK, memory_format=torch.contiguous_format), _empty_lse(q_BSHK)


@torch.library.custom_op("herd::causal_attention_backward", mutates_args=())
def _backward(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    first_BS: Tensor,
    scale: float,
    o_BSHK: Tensor,
    grad_o_BSHK: Tensor,
    lse_BHS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = q_BSHK.contiguous(), k_BSGK.contiguous(), v_BSGK.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _native.attention_backward(
        _bits(q),
        _bits(k),
        _bits(v),
        first_BS.contiguous(),
        scale,
        _bits(o_BSHK.contiguous()),
        _bits(grad_o_BSHK.contiguous()),
        lse_BHS,
        _bits(grad_q),
        _bits(grad_k),
        _bits(grad_v),
        torch.get_num_threads(),
    )
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    first_BS: Tensor,
    scale: float,
    o_BSHK: Tensor,
    grad_o_BSHK: Tensor,
    lse_BHS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(q_BSHK, memory_format=dense),
        torch.empty_like(k_BSGK, memory_format=dense),
        torch.empty_like(v_BSGK, memory_format=dense),
    )


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, first, scale = inputs
    ctx.save_for_backward(q, k, v, first, *output)
    ctx.scale = scale


def _differentiate(ctx, grad_o: Tensor, grad_lse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, first, o, lse = ctx.saved_tensors
    return *_backward(q, k, v, first, ctx.scale, o, grad_o.to(q.dtype), lse), None, None


_forward.register_autograd(_differentiate, setup_context=_remember)


def _empty_lse(q_BSHK: Tensor) -> Tensor:
    batch, positions, heads, _ = q_BSHK.shape
    return torch.empty(batch, heads, positions, dtype=torch.float32, device=q_BSHK.device)


def _bits(x: Tensor) -> Tensor:
    """bfloat16 as the 16-bit patterns that the bindings take; float32 as it is."""
    x = x.detach()
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
