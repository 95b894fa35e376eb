"""Llama 4's mixture of experts: a sigmoid router, experts computed for their own tokens only, one shared expert.

The score multiplies the expert's INPUT, and scores are not normalised (Meta's reference code).
Letters: T tokens (or T·top_k routed copies of them), D model width, F inner width, E experts, I and O input and output
width of a grouped product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from herd.architecture import MoeConfig
from herd.model.feed_forward import FeedForward


class Experts(nn.Module):
    """The weights of all routed experts, stacked."""

    def __init__(self, dim: int, moe: MoeConfig) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(moe.n_experts, moe.ffn_dim, dim))
        self.w3 = nn.Parameter(torch.empty(moe.n_experts, moe.ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(moe.n_experts, dim, moe.ffn_dim))

    def forward(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        """SwiGLU of every token by its expert; tokens are sorted by expert, counts_E[e] of them for expert e."""
        return _grouped(self.hidden(x_TD, counts_E), self.w2, counts_E)

    def hidden(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        """What `w2` is multiplied by, [T, F]."""
        gate_TF = _grouped(x_TD, self.w1, counts_E)
        return functional.silu(gate_TF) * _grouped(x_TD, self.w3, counts_E)


class MixtureOfExperts(nn.Module):
    """shared(x) + sum over the top_k experts e of expert_e(sigmoid(router_e(x)) · x)."""

    def __init__(self, dim: int, moe: MoeConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.router = nn.Linear(dim, moe.n_experts, bias=False)
        self.experts = Experts(dim, moe)
        self.shared = FeedForward(dim, moe.ffn_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as `x_BSD`."""
        x_TD = x_BSD.flatten(0, 1)
        logits_Tk, chosen_Tk = self.router(x_TD).topk(self.top_k, dim=-1)
        scores_T = logits_Tk.float().sigmoid().to(x_TD.dtype).flatten()
        order_T = chosen_Tk.flatten().argsort(stable=True)
        experts = torch.arange(self.router.out_features, device=x_TD.device)
        counts_E = (chosen_Tk.reshape(-1, 1) == experts).sum(0)
        source_T = order_T // self.top_k
        routed_TD = self.experts(x_TD[source_T] * scores_T[order_T, None], counts_E)
        shared_TD: Tensor = self.shared(x_TD)
        out_TD = shared_TD.index_add(0, source_T, routed_TD.to(shared_TD.dtype))
        return out_TD.view(x_BSD.shape)


def _grouped(x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """`grouped_linear` under autocast: custom operators are not on its list, so the casts stand here."""
    device = x_TI.device.type
    if hasattr(weight_EOI, "to_local"):  # experts that are split over ranks: this rank's
        weight_EOI = weight_EOI.to_local()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TI, weight_EOI = x_TI.to(dtype), weight_EOI.to(dtype)
    y_TO: Tensor = grouped_linear(x_TI.contiguous(), weight_EOI, counts_E)
    return y_TO


@torch.library.custom_op("herd::grouped_linear", mutates_args=())
def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """y_t = weight[expert of t] · x_t for tokens sorted by expert, [T, O]. Experts without tokens cost nothing.

    One operator to torch.compile, which could not trace through the data-dependent counts.
    """
    if in_one_call(x_TI, weight_EOI):
        return functional.grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=_ends(counts_E))
    y_TO = x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])
    for e, start, end in groups(counts_E):
        torch.mm(x_TI[start:end], weight_EOI[e].T, out=y_TO[start:end])
    return y_TO


@torch.library.custom_op("herd::grouped_outer", mutates_args=())
def grouped_outer(grad_TO: Tensor, x_TI: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient of `grouped_linear` in its weight: sum over an expert's tokens of grad ⊗ x, [E, O, I]."""
    if in_one_call(grad_TO, x_TI):
        outer_EOI = functional.grouped_mm(grad_TO.T, x_TI, offs=_ends(counts_E))
        # Not every GPU writes zeros for an expert without tokens (pytorch/pytorch#172439).
        return outer_EOI.masked_fill_((counts_E == 0)[:, None, None], 0)
    weight_EOI = x_TI.new_zeros(counts_E.shape[0], grad_TO.shape[1], x_TI.shape[1])
    for e, start, end in groups(counts_E):
        torch.mm(grad_TO[start:end].T, x_TI[start:end], out=weight_EOI[e])
    return weight_EOI


def in_one_call(x_TI: Tensor, other: Tensor) -> bool:
    """Whether to leave these to torch's grouped product, as GPUs of compute capability 8 have it.

    There it neither waits for the counts, as the loop over experts does, nor starts a kernel for every expert. On CPUs
    the loop is as fast or faster (docs/lab-log.md).
    """
    return x_TI.is_cuda and torch.cuda.get_device_capability(x_TI.device) >= (8, 0) and fits_one_call(x_TI, other)


def fits_one_call(x_TI: Tensor, other: Tensor) -> bool:
    """Whether torch's grouped product takes these: some rows of bf16 of whole 16 bytes."""
    widths = (x_TI.shape[-1], *other.shape[1:])
    aligned = x_TI.dtype == torch.bfloat16 and not any(width % 8 for width in widths)
    return aligned and x_TI.shape[0] > 0 and hasattr(functional, "grouped_mm")


def _ends(counts_E: Tensor) -> Tensor:
    """Where the tokens of every expert end."""
    return counts_E.cumsum(0).to(torch.int32)


@grouped_linear.register_fake
def _(x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])


@grouped_outer.register_fake
def _(grad_TO: Tensor, x_TI: Tensor, counts_E: Tensor) -> Tensor:
    return x_TI.new_empty(counts_E.shape[0], grad_TO.shape[1], x_TI.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_TI, weight_EOI, counts_E = ctx.saved_tensors
    grad_TO = grad_TO.contiguous()
    dx_TI = grouped_linear(grad_TO, weight_EOI.transpose(1, 2), counts_E)
    return dx_TI, grouped_outer(grad_TO, x_TI, counts_E), None


grouped_linear.register_autograd(_differentiate, setup_context=_remember)


def groups(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first token, end) of every expert that has tokens."""
    groups, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            groups.append((expert, start, start + count))
        start += count
    return groups
