"""Activation checkpointing: what the backward pass needs of a layer is kept, or computed again.

none keeps everything, full keeps a layer's input and runs it again, selective keeps what is dear to compute (matrix
products and attention) and runs the rest again: norms, rotations, SwiGLU (Korthikanti et al. 2022, arXiv 2205.05198,
section 5, turned around for attention kernels that keep no scores).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from herd.model import Llama

_DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}


def recompute(model: Llama, what: Literal["none", "selective", "full"]) -> None:
    """Let the model's layers keep only what `what` says."""
    if what == "none":
        return
    keywords: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        keywords["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    def run(block: Any, x_BSD: Tensor, places: Any) -> Tensor:
        y_BSD: Tensor = checkpoint(block, x_BSD, places, **keywords)
        return y_BSD

    model.run_block = run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = operator in _DEAR or getattr(operator, "namespace", "") == "herd"
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
