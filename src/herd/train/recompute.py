"""Activation checkpointing: what the backward pass needs of a layer is kept, or computed again.

none keeps everything, full keeps a layer's input and runs it again, selective keeps what is dear to compute (matrix
products and attention) and runs the rest again: norms, rotations, SwiGLU (Korthikanti et al. 2022, arXiv 2205.05198,
section 5, turned around for attention kernels that keep no scores).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from herd.model.llama import Block, Llama

# Not bmm: attention written in plain products, as over context ranks, would keep the scores of all its tiles.
_DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
_DEAR_NAMESPACES = ("herd", "torch_attn")
"""Our own kernels, and torch's variable-length attention."""


def recompute(model: Llama, what: Literal["none", "selective", "full"]) -> None:
    """Let the model's layers keep only what `what` says.

    A layer's forward is replaced and not the call of the layer: torch.compile then sees what is to be kept. Around a
    compiled layer, nothing but its inputs could be.
    """
    if what == "none":
        return
    keywords: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        keywords["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.layers:
        if isinstance(block, Block):
            block.forward = _checkpointed(block.forward, keywords)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor], keywords: dict[str, Any]) -> Callable[..., Tensor]:
    # A function of ours, since torch.compile looks into checkpoint only where something else calls it.
    def run(*inputs: Any) -> Tensor:
        y_BSD: Tensor = checkpoint(forward, *inputs, **keywords)
        return y_BSD

    return run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = operator in _DEAR or getattr(operator, "namespace", "") in _DEAR_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
