"""torch.compile of each block, where it pays, with a way back to eager execution that nobody has to ask for."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from herd.train.announce import announce
from herd.train.config import TrainConfig

WORTH_FLOPS = 2.5e13
"""Work from which compiling pays: about 100 s of training on two CPU cores, of which it saves 12 %."""


class CompiledBlocks:
    """The blocks of a model (its `layers`) and its final norm, compiled or not.

    Blocks are alike, so one compiled graph serves them all.
    """

    def __init__(self, model: nn.Module) -> None:
        layers, norm = getattr(model, "layers", None), getattr(model, "norm", None)
        self._blocks = list(layers) if isinstance(layers, nn.ModuleList) else []
        if self._blocks and isinstance(norm, nn.Module):
            self._blocks.append(norm)
        self.active = False

    def compile(self) -> None:
        """Compile on first use."""
        for block in self._blocks:
            if block._compiled_call_impl is None:
                block.compile(dynamic=False)
        self.active = bool(self._blocks)

    def restore(self) -> None:
        """Back to eager execution."""
        for block in self._blocks:
            block._compiled_call_impl = None
        self.active = False


def worth_compiling(config: TrainConfig, flops_per_token: float | None) -> bool:
    """Whether to compile: as configured, or on "auto" if the whole run is long enough and there is a compiler.

    Depends on the configuration and not on what is left to do, so that a resumed run computes in the same way.
    """
    if config.compile != "auto":
        return config.compile == "on"
    if max(config.parallel.tp, config.parallel.cp) > 1:  # compiled, such blocks gave other gradients
        return False
    if flops_per_token is None or config.steps * config.batch_tokens * flops_per_token < WORTH_FLOPS:
        return False
    if torch.cuda.is_available() and config.device != "cpu":
        return True
    if shutil.which("g++") or shutil.which("clang++"):
        return True
    announce("there is no C++ compiler, so blocks are not compiled; training is slower without")
    return False


def compiler_failed(error: BaseException) -> bool:
    """Whether an exception comes from torch.compile and not from the model's own code."""
    module = type(error).__module__
    return module.startswith(("torch._dynamo", "torch._inductor")) or isinstance(error, torch._dynamo.exc.Unsupported)


def eager() -> AbstractContextManager[Any]:
    """While the block runs, compiled modules execute eagerly: for an evaluation not worth a compilation."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
