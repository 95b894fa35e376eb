"""Causal attention inside runs of neighbouring tokens on a GPU: torch's variable-length flash attention.

A packed row is a few documents, and each of them is attended to alone: no mask is built, and what a document costs
grows with its own length. Llama 4's chunks are such runs as well. In 16-bit numbers only.
Letters: B batch, S sequence, H query heads, G key/value heads, K head width, R runs.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn import functional


def available(device: torch.device) -> bool:
    """True where the kernel runs: a GPU of compute capability 8.0 or higher, and a torch that has it (2.13 has)."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # takes two seconds to import, which a CPU need not wait
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def takes(q_BSHK: Tensor) -> bool:
    """True when the kernel takes these numbers: 16 bits, K a multiple of 8 and not so wide that some GPUs refuse it."""
    width = q_BSHK.shape[-1]
    return q_BSHK.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 192


def attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, starts_R: Tensor, rows: int) -> Tensor:
    """Attention output [B, S, H, K], where a query sees the keys of its run up to itself.

    `starts_R`: where every run starts in `rows` rows of S tokens laid end to end; the other rows are alike.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, length = q_BSHK.shape[:2]
    copies_C = torch.arange(0, batch * length, rows * length, device=starts_R.device)
    bounds = functional.pad((copies_C.unsqueeze(1) + starts_R).flatten(), (0, 1), value=batch * length).to(torch.int32)
    # The longest run may be S long. Its true length would save some empty thread blocks, and recompile for each.
    o = varlen_attn(
        q_BSHK.flatten(0, 1),
        k_BSGK.flatten(0, 1),
        v_BSGK.flatten(0, 1),
        bounds,
        bounds,
        length,
        length,
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )
    assert isinstance(o, Tensor)
    return torch.unflatten(o, 0, (batch, length))
