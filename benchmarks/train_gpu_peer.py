"""The peer of benchmarks/train_gpu.py: a Llama and its training step in plain PyTorch, put together as torchtitan does.

FSDP2 around every block and the rest (bf16 weights in the products, fp32 sums), torch.compile of every block and of the
loss, SDPA with cuDNN first, fused AdamW, clipping to norm 1, logits whole and in fp32 for the loss; float8 by torchao's
rowwise recipe on every linear layer but the output. Recomputation keeps products and attention. A real peer would
train in the same way; nothing of Herd is used but the numbers of the shape.
Letters: B batch, S sequence, D model width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from herd.architecture import LlamaConfig

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
        """Same shape as `x_BSD`."""
        q, k, v = (torch.unflatten(w(x_BSD), -1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (rotate(x, cos_SK, sin_SK).transpose(1, 2) for x in (q, k))
        with sdpa_kernel(BACKENDS, set_priority=True):
            o = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        y_BSD: Tensor = self.wo(o.transpose(1, 2).flatten(2))
        return y_BSD


def rotate(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotary positions on halves, in fp32."""
    a, b = x_BSHK.float().chunk(2, -1)
    cos, sin = cos_SK.unsqueeze(1), sin_SK.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BSHK.dtype)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        y: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return y


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
        """Same shape as `x`."""
        h = x + self.attention(self.attention_norm(x), cos_SK, sin_SK)
        y: Tensor = h + self.ffn(self.ffn_norm(h))
        return y


class PlainLlama(nn.Module):
    """A Llama 3 whose RoPE has no scaling: angles cost the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        x = self.embed(tokens_BS)
        for block in self.layers:
            x = block(x, cos_SK, sin_SK)
        x = self.norm(x)
        return functional.linear(x, self.embed.weight) if self.config.tied_embeddings else self.output(x)


class PlainTrainer:
    """The usual loop around it: `step` takes the micro-batches of one optimiser step and returns their mean loss."""

    def __init__(
        self,
        config: LlamaConfig,
        seq_len: int,
        device: torch.device,
        mesh: DeviceMesh,
        *,
        compiled: bool,
        float8: bool,
        recompute: bool,
        reshard: bool,
    ) -> None:
        self.device = device
        with torch.device("meta"):
            model = PlainLlama(config)
        if float8:
            rowwise(model, emulate=not (device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9)))
        if recompute:
            keep = functools.partial(create_selective_checkpoint_contexts, _policy)
            for i, block in enumerate(model.layers):
                model.layers[i] = checkpoint_wrapper(block, context_fn=keep, preserve_rng_state=False)
        if compiled:
            for block in model.layers:
                block.compile()
        sharded: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
        }
        if not config.tied_embeddings:
            fully_shard(model.embed, **sharded, reshard_after_forward=reshard)
            fully_shard([model.norm, model.output], **sharded, reshard_after_forward=False)
        for block in model.layers:
            fully_shard(block, **sharded, reshard_after_forward=reshard)
        fully_shard(model, **sharded)
        self.model = model.to_empty(device=device)
        for parameter in self.model.parameters():
            nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
        places_S1 = torch.arange(seq_len, device=device).unsqueeze(1)
        pairs = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
        angles_SK = places_S1 / config.rope_theta**pairs
        self.turn = angles_SK.cos(), angles_SK.sin()
        loss: Callable[[Tensor, Tensor], Tensor] = torch.compile(cross_entropy) if compiled else cross_entropy
        self.loss = loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """One optimiser step."""
        total = torch.zeros((), device=self.device)
        for tokens_BS, targets_BS in batches:
            logits_BSV = self.model(tokens_BS.to(self.device, non_blocking=True), *self.turn)
            loss = self.loss(logits_BSV, targets_BS.to(self.device, non_blocking=True)) / len(batches)
            del logits_BSV
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """The mean over all tokens."""
    return functional.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())


def rowwise(model: nn.Module, *, emulate: bool) -> None:
    """Every linear layer but the output in float8."""
    import dataclasses

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "output"

    convert_to_float8_training(model, config=config, module_filter_fn=chosen)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
