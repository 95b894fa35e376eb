"""AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

[N, R, C] is a stack of N matrices of the same shape: Muon works on all of them in one batched product.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from herd.train.config import TrainConfig

# Quintic Newton-Schulz coefficients of Jordan et al. 2024 (Muon): the steepest at zero that stay near 1 after 5 rounds.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Optimizers:
    """One or several torch optimisers that share a schedule; each parameter group keeps its own peak rate."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def set_lr(self, factor: float) -> None:
        """Learning rate of every group: its peak times `factor`."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        """Change the weights by their gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """State by parameter name: independent of groups and of their order."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return {names[p]: dict(values) for part in self.parts for p, values in part.state.items()}

    def load_state(self, model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
        """Take back what `state()` gave; the optimisers own the tensors from then on."""
        parameters = dict(model.named_parameters())
        for part in self.parts:
            own = {id(p) for group in part.param_groups for p in group["params"]}
            part.state.clear()
            for name, values in state.items():
                if id(parameters[name]) in own:
                    part.state[parameters[name]] = dict(values)

    def reset(self) -> None:
        """Forget all state, as before the first step."""
        for part in self.parts:
            part.state.clear()

    def _groups(self) -> Iterable[dict[str, Any]]:
        return (group for part in self.parts for group in part.param_groups)


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizers:
    """The configured optimiser over the model's trainable parameters.

    Matrices (and stacks of matrices, as experts are) decay; vectors, that is norms, do not. Muon takes the matrices
    of the blocks (the model's `layers`); embedding, output and vectors stay with AdamW, as in Jordan et al. 2024.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trainable if config.optimizer == "muon" and name.startswith("layers.") and p.ndim >= 2]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in trainable if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    if not hidden:
        return Optimizers([adamw])
    muon = Muon(hidden, lr=config.muon_lr or config.lr, momentum=config.muon_momentum, weight_decay=config.weight_decay)
    return Optimizers([muon, adamw])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: all directions of a matrix learn at the same rate.

    B ← momentum·B + (1 - momentum)·G; update U = NewtonSchulz(G + momentum·(B - G)) (Nesterov); then decoupled decay
    and W ← W - lr·0.2·√max(R, C)·U. The factor gives U the root mean square of AdamW's updates, so that learning rate
    and decay carry over (Liu et al. 2025, "Muon is scalable for LLM training", arXiv 2502.16982). A parameter [E, R, C]
    is a stack of E matrices. Matrices of one shape are orthogonalised together: a small model's step stays cheap.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients. Closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[-2], p.shape[-1]].append(p)
            for (rows, columns), parameters in by_shape.items():
                direction_NRC = torch.cat([self._direction(p, group["momentum"]) for p in parameters])
                update_NRC = newton_schulz(direction_NRC)
                scale = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
                updates = torch.split(update_NRC, [p.numel() // (rows * columns) for p in parameters])
                views = [update.view_as(p) for update, p in zip(updates, parameters, strict=True)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, views, alpha=scale)

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of one parameter, as a stack [n, R, C]."""
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum).view(-1, p.shape[-2], p.shape[-1])


def newton_schulz(m_NRC: Tensor) -> Tensor:
    """Nearest to orthogonal of each matrix, roughly: singular values go to about 0.7 … 1.2, singular vectors stay.

    X ← aX + (bA + cA²)X with A = XXᵀ, five times, on X = M/‖M‖, in bf16 where the matrix unit has it (the iteration
    forgives its rounding) and on the smaller of the two sides. Returns fp32.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = m_NRC.shape[1] > m_NRC.shape[2]
    x = m_NRC.mT if tall else m_NRC
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(matrix_dtype(x.device))
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def matrix_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it faster than fp32, else fp32.

    By what the hardware is and not by a measurement, so that a run that goes on computes as it did. Intel's processors
    do the products of AVX-512 in bf16 at half the speed of fp32 (162 and 306 GFLOP/s on two cores), AMD's at twice.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    pairs = torch.cpu._is_avx512_bf16_supported() and processor_maker() != "GenuineIntel"
    return torch.bfloat16 if pairs or torch.cpu._is_amx_tile_supported() else torch.float32


@functools.cache
def processor_maker(file: Path = Path("/proc/cpuinfo")) -> str:
    """Who made the processor, as it says itself: GenuineIntel, AuthenticAMD; "" where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""
